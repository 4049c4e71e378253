"""MoCo-v2 (Chen et al., arXiv 2003.04297): a queue of negatives; the student sees the first view only.

With ``symmetric``, both directions have a loss and a queue, and the losses are averaged (MoCo-v2+ of solo-learn).
"""

from __future__ import annotations

from typing import ClassVar

from fastrm.methods.base import Encoder
from fastrm.methods.contrastive import Contrastive
from fastrm.methods.published import QUEUE_LINEAR, QUEUE_R50, SOLO_CIFAR, SOLO_IN100
from fastrm.methods.registry import register
from fastrm.models import Backbone, mlp
from fastrm.settings.config import MethodConfig

_R18 = {
    "symmetric": True,
    "optimizer": "sgd",
    "lr": 0.3,
    "weight_decay": 1e-4,
    "temperature": 0.2,
    "teacher_momentum": 0.99,
    "teacher_momentum_end": 0.999,
    "hidden_dim": 2048,
}


@register("mocov2")
class MoCoV2(Contrastive):
    """A projector of two layers without BatchNorm, and no predictor."""

    recipes: ClassVar = {
        "mocov2-r50-200ep": {**QUEUE_R50, "epochs": 200, "lr": 0.03},
        "mocov2-r18-cifar100-1000ep": {**SOLO_CIFAR, **_R18, "queue_size": 32768},
        "mocov2-r18-imagenet100-400ep": {**SOLO_IN100, **_R18, "queue_size": 65536},
    }
    uses = frozenset({"temperature", "queue_size", "queue_dtype", "symmetric"})
    linear_protocol = QUEUE_LINEAR

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        directions = 2 if config.symmetric else 1
        super().__init__(
            Encoder(backbone, mlp((backbone.dim, config.hidden_dim, config.output_dim))),
            config,
            directions=directions,
            queues=directions,
            scale=1 / directions,
            backend=backend,
        )
