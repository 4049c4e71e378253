"""BYOL (Grill et al., arXiv 2006.07733): the student predicts the teacher's other view; there are no negatives."""

from __future__ import annotations

from torch import Tensor

from fastrm.kernels import residual_loss
from fastrm.methods.base import Encoder, Encoding, Method
from fastrm.models import Backbone, mlp
from fastrm.settings.config import MethodConfig


class BYOL(Method[Encoding]):
    """Projector and predictor with BatchNorm in the hidden layer; loss 2 - 2 cos, both directions summed."""

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        hidden, out = config.hidden_dim, config.output_dim
        super().__init__(
            Encoder(backbone, mlp((backbone.dim, hidden, out), hidden_norm=True)),
            config,
            predictor=mlp((out, config.predictor_hidden_dim, out), hidden_norm=True),
            backend=backend,
        )

    def direction(
        self, d: int, student: Encoding, key: Encoding, same: Encoding | None, residual_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """BYOL's own loss is the expression of the residual term, between the two views."""
        own = residual_loss(student.output, key.output, backend=self.backend)
        return self.with_residual(own, student, same, residual_weight)
