"""MoCo-v3 (Chen et al., arXiv 2104.02057): in-batch negatives, predictor, both directions, loss times 2τ."""

from __future__ import annotations

from fastrm.methods.base import Encoder, Encoding, Method
from fastrm.models import Backbone, mlp
from fastrm.settings.config import MethodConfig


class MoCoV3(Method[Encoding]):
    """Linear layers have no bias; the projector ends in BatchNorm without affine.

    For transformers the projector has a third layer and the predictor ends in that BatchNorm too.
    """

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        hidden, out = config.hidden_dim, config.output_dim
        transformer = backbone.transformer
        widths = (backbone.dim, hidden, hidden, out) if transformer else (backbone.dim, hidden, out)
        super().__init__(
            Encoder(backbone, mlp(widths, bias=False, hidden_norm=True, last_norm=True)),
            config,
            predictor=mlp((out, config.predictor_hidden_dim, out), bias=False, hidden_norm=True, last_norm=transformer),
            scale=2 * config.temperature,
            backend=backend,
        )
