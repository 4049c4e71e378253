"""MoCo-v3 (Chen et al., arXiv 2104.02057): in-batch negatives, predictor, both directions, loss times 2τ."""

from __future__ import annotations

from typing import Any, ClassVar

from fastrm.data.augmentation import Augmentation
from fastrm.methods.base import Encoder
from fastrm.methods.contrastive import Contrastive
from fastrm.methods.published import LARS_R50, SOLO_CIFAR, SOLO_IN100, SOLO_LARS, asymmetric
from fastrm.methods.registry import register
from fastrm.models import Backbone, mlp
from fastrm.models.module import ModuleBackbone
from fastrm.models.vit import is_vit, prepare_moco_vit
from fastrm.settings.config import MethodConfig

_R50 = {**LARS_R50, "crop_min": 0.2}
_R18 = {**SOLO_LARS, "lr": 0.3, "weight_decay": 1e-6, "temperature": 0.2, "predictor_hidden_dim": 4096}
_VIT = {
    **_R50,
    "arch": "vit_small_patch16_224",
    "epochs": 300,
    "optimizer": "adamw",
    "lr": 1.5e-4,
    "weight_decay": 0.1,
    "warmup_epochs": 40.0,
    "temperature": 0.2,
}


@register("mocov3")
class MoCoV3(Contrastive):
    """Linear layers have no bias; the projector ends in BatchNorm without affine.

    For transformers, the projector has a third layer, and the predictor ends in BatchNorm without affine too.
    """

    recipes: ClassVar = {
        "mocov3-r50-100ep": {**_R50, "epochs": 100, "lr": 0.6},
        "mocov3-r50-300ep": {**_R50, "epochs": 300, "lr": 0.3},
        "mocov3-r50-1000ep": {**_R50, "epochs": 1000, "lr": 0.3, "weight_decay": 1.5e-6, "teacher_momentum": 0.996},
        "mocov3-vits-300ep": _VIT,
        "mocov3-r18-cifar100-1000ep": {**SOLO_CIFAR, **_R18},
        "mocov3-r18-imagenet100-400ep": {**SOLO_IN100, **_R18},
    }

    uses = frozenset({"temperature", "predictor_hidden_dim"})

    @classmethod
    def defaults(cls, arch: str) -> dict[str, Any]:
        """Default settings, which differ for ViTs."""
        return {**_VIT, "batch_size": None} if arch.startswith("vit_") else super().defaults(arch)

    @classmethod
    def augmentation(cls, crop_min: float) -> Augmentation:
        """BYOL's views, with bilinear resampling."""
        return asymmetric(crop_min, "bilinear")

    @classmethod
    def prepare(cls, backbone: Backbone, arch: str) -> None:
        """Give a ViT fixed sin-cos positions, a frozen patch projection and Xavier-uniform weights (section 4)."""
        if not is_vit(backbone.net):
            return
        if isinstance(backbone, ModuleBackbone):
            backbone.notes.append(f"MoCo-v3's changes to a ViT are not applied to {arch}, since it is your own module")
            return
        for reason in prepare_moco_vit(backbone.net, backbone.channels):
            backbone.notes.append(f"one of MoCo-v3's changes to a ViT is not applied to {arch}: {reason}")

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
