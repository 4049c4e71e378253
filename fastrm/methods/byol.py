"""BYOL (Grill et al., arXiv 2006.07733): the student predicts the teacher's output for another view; no negatives."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastrm.data.augmentation import Augmentation
from fastrm.kernels import residual_loss
from fastrm.methods.base import Encoder, Encoding, Method
from fastrm.methods.published import LARS_R50, SOLO_CIFAR, SOLO_IN100, SOLO_LARS, asymmetric
from fastrm.methods.registry import register
from fastrm.models import Backbone, mlp
from fastrm.settings.config import MethodConfig


@register("byol")
class BYOL(Method[Encoding]):
    """Projector and predictor with BatchNorm in the hidden layer; loss 2 - 2 cos, both directions summed."""

    recipes: ClassVar = {
        # The publication's settings, with its batch size of 4096.
        "byol-r50-300ep": {**LARS_R50, "epochs": 300, "lr": 0.3, "crop_min": 0.08},
        "byol-r18-cifar100-1000ep": {
            **SOLO_CIFAR,
            **SOLO_LARS,
            "lr": 1.0,
            "weight_decay": 1e-5,
            "predictor_hidden_dim": 4096,
        },
        "byol-r18-imagenet100-400ep": {
            **SOLO_IN100,
            **SOLO_LARS,
            "lr": 0.5,
            "weight_decay": 1e-6,
            "predictor_hidden_dim": 8192,
        },
    }

    uses = frozenset({"predictor_hidden_dim"})

    @classmethod
    def augmentation(cls, crop_min: float) -> Augmentation:
        """Two views; the first is always blurred, and only the second is solarized."""
        return asymmetric(crop_min, "bicubic")

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        hidden, out = config.hidden_dim, config.output_dim
        super().__init__(
            Encoder(backbone, mlp((backbone.dim, hidden, out), hidden_norm=True)),
            config,
            predictor=mlp((out, config.predictor_hidden_dim, out), hidden_norm=True),
            backend=backend,
        )

    def own_loss(self, direction: int, student: Encoding, key: Encoding) -> Tensor:
        """2 - 2 cos between the two views, the same expression as the residual term."""
        return residual_loss(student.output, key.output, backend=self.backend)
