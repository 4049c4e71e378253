"""Published settings and augmentations that several methods share.

The sources are the official code of MoCo-v2 and MoCo-v3 for ImageNet, and solo-learn for CIFAR-100 and ImageNet-100.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrm.data.augmentation import Augmentation, Interpolation, View
from fastrm.methods.protocol import LinearProtocol

Recipe = Mapping[str, Any]
"""Values by name of the setting, such as ``{"epochs": 100, "lr": 0.6}``."""

QUEUE_R50: Recipe = {
    "arch": "resnet50",
    "batch_size": 256,
    "optimizer": "sgd",
    "weight_decay": 1e-4,
    "warmup_epochs": 0.0,
    "teacher_momentum": 0.999,
    "teacher_momentum_end": 0.999,
    "temperature": 0.2,
    "queue_size": 65536,
    "hidden_dim": 2048,
    "output_dim": 128,
    "crop_min": 0.2,
}
LARS_R50: Recipe = {
    "arch": "resnet50",
    "batch_size": 4096,
    "optimizer": "lars",
    "weight_decay": 1e-6,
    "trust_coefficient": 0.001,
    "warmup_epochs": 10.0,
    "teacher_momentum": 0.99,
    "teacher_momentum_end": 1.0,
    "temperature": 1.0,
    "hidden_dim": 4096,
    "output_dim": 256,
    "predictor_hidden_dim": 4096,
}
_SOLO: Recipe = {
    "arch": "resnet18",
    "batch_size": 256,
    "warmup_epochs": 10.0,
    "warmup_start_lr": 3e-5,
    "output_dim": 256,
}
SOLO_CIFAR: Recipe = {**_SOLO, "epochs": 1000, "data": "cifar100", "image_size": 32, "crop_min": 0.2}
SOLO_IN100: Recipe = {**_SOLO, "epochs": 400, "crop_min": 0.08}
SOLO_LARS: Recipe = {
    "optimizer": "lars",
    "trust_coefficient": 0.02,
    "teacher_momentum": 0.99,
    "teacher_momentum_end": 1.0,
    "hidden_dim": 4096,
}

QUEUE_LINEAR = LinearProtocol(lr=30.0, batch_size=256, epochs=100, milestones=(0.6, 0.8))
"""The protocol of MoCo, MoCo-v2 and DenseCL."""


def alike(crop_min: float) -> Augmentation:
    """MoCo-v2's two views, which have the same distribution."""
    view = View(crop_scale=(crop_min, 1.0))
    return Augmentation(views=(view, view))


def asymmetric(crop_min: float, interpolation: Interpolation) -> Augmentation:
    """BYOL's two views; the first is always blurred, and only the second is solarized."""
    first = View(crop_scale=(crop_min, 1.0), saturation=0.2, interpolation=interpolation, blur_probability=1.0)
    second = View(
        crop_scale=(crop_min, 1.0),
        saturation=0.2,
        interpolation=interpolation,
        blur_probability=0.1,
        solarize_probability=0.2,
    )
    return Augmentation(views=(first, second))
