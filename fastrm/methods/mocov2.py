"""MoCo-v2 (Chen et al., arXiv 2003.04297): a queue of negatives; the student sees the first view only.

``symmetric`` scores both directions, each against a queue of its own, and averages (MoCo-v2+ of solo-learn).
"""

from __future__ import annotations

from fastrm.kernels import FeatureQueue
from fastrm.methods.base import Encoder, Encoding, Method
from fastrm.models import Backbone, mlp
from fastrm.settings.config import MethodConfig


class MoCoV2(Method[Encoding]):
    """A projector of two layers without BatchNorm, and no predictor."""

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        directions = 2 if config.symmetric else 1
        super().__init__(
            Encoder(backbone, mlp((backbone.dim, config.hidden_dim, config.output_dim))),
            config,
            directions=directions,
            scale=1 / directions,
            backend=backend,
        )
        self.queues.extend(FeatureQueue(config.queue_size, config.output_dim) for _ in range(directions))
