"""Published settings by name: sets of defaults for the leaves of :class:`fastrm.settings.config.Config`."""

from __future__ import annotations

from typing import Any

# Published settings. ImageNet: the official MoCo, MoCo-v3 and DenseCL repositories; CIFAR-100 and ImageNet-100:
# solo-learn; BYOL on ImageNet: Grill et al., arXiv 2006.07733, with their batch of 4096. All heads in the order
# hidden, output, predictor's hidden.
_MOCOV3 = {
    "method": "mocov3",
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
    "crop_min": 0.2,
}
_MOCOV2 = {
    "method": "mocov2",
    "arch": "resnet50",
    "batch_size": 256,
    "optimizer": "sgd",
    "lr": 0.03,
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
_SOLO = {"arch": "resnet18", "batch_size": 256, "warmup_epochs": 10.0, "warmup_start_lr": 3e-5, "output_dim": 256}
_SOLO_CIFAR = {**_SOLO, "epochs": 1000, "data": "cifar100", "image_size": 32, "crop_min": 0.2}
_SOLO_IN100 = {**_SOLO, "epochs": 400, "crop_min": 0.08}
_SOLO_LARS = {"optimizer": "lars", "trust_coefficient": 0.02, "teacher_momentum": 0.99, "teacher_momentum_end": 1.0}
_SOLO_MOCOV3 = {
    **_SOLO_LARS,
    "method": "mocov3",
    "lr": 0.3,
    "weight_decay": 1e-6,
    "temperature": 0.2,
    "hidden_dim": 4096,
    "predictor_hidden_dim": 4096,
}
_SOLO_MOCOV2 = {
    "method": "mocov2",
    "symmetric": True,
    "optimizer": "sgd",
    "lr": 0.3,
    "weight_decay": 1e-4,
    "temperature": 0.2,
    "teacher_momentum": 0.99,
    "teacher_momentum_end": 0.999,
    "hidden_dim": 2048,
}
_SOLO_BYOL = {**_SOLO_LARS, "method": "byol", "hidden_dim": 4096}

RECIPES: dict[str, dict[str, Any]] = {
    "mocov3-r50-100ep": {**_MOCOV3, "epochs": 100, "lr": 0.6},
    "mocov3-r50-300ep": {**_MOCOV3, "epochs": 300, "lr": 0.3},
    "mocov3-r50-1000ep": {**_MOCOV3, "epochs": 1000, "lr": 0.3, "weight_decay": 1.5e-6, "teacher_momentum": 0.996},
    "mocov3-vits-300ep": {
        **_MOCOV3,
        "arch": "vit_small_patch16_224",
        "epochs": 300,
        "optimizer": "adamw",
        "lr": 1.5e-4,
        "weight_decay": 0.1,
        "warmup_epochs": 40.0,
        "temperature": 0.2,
    },
    "mocov2-r50-200ep": {**_MOCOV2, "epochs": 200},
    "densecl-r50-coco-800ep": {**_MOCOV2, "method": "densecl", "epochs": 800, "lr": 0.3, "dense_weight": 0.5},
    "byol-r50-300ep": {
        **_MOCOV3,
        "method": "byol",
        "epochs": 300,
        "lr": 0.3,
        "crop_min": 0.08,
    },
    "mocov3-r18-cifar100-1000ep": {**_SOLO_CIFAR, **_SOLO_MOCOV3},
    "mocov2-r18-cifar100-1000ep": {**_SOLO_CIFAR, **_SOLO_MOCOV2, "queue_size": 32768},
    "byol-r18-cifar100-1000ep": {
        **_SOLO_CIFAR,
        **_SOLO_BYOL,
        "lr": 1.0,
        "weight_decay": 1e-5,
        "predictor_hidden_dim": 4096,
    },
    "mocov3-r18-imagenet100-400ep": {**_SOLO_IN100, **_SOLO_MOCOV3},
    "mocov2-r18-imagenet100-400ep": {**_SOLO_IN100, **_SOLO_MOCOV2, "queue_size": 65536},
    "byol-r18-imagenet100-400ep": {
        **_SOLO_IN100,
        **_SOLO_BYOL,
        "lr": 0.5,
        "weight_decay": 1e-6,
        "predictor_hidden_dim": 8192,
    },
}
