"""Settings: the published recipes, the precedence of flags, recipes and defaults, and the errors for wrong values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastrm.errors import UsageError
from fastrm.methods import recipes
from fastrm.settings.config import Config, build, defaults, from_flat, resolved
from fastrm.settings.flags import read_flags

# The published numbers, written out a second time, by hand, from the table of settings.
R50_MOCOV3 = {
    "method": "mocov3", "arch": "resnet50", "optimizer": "lars", "trust_coefficient": 0.001, "batch_size": 4096,
    "warmup_epochs": 10, "teacher_momentum_end": 1.0, "temperature": 1.0, "hidden_dim": 4096, "output_dim": 256,
    "predictor_hidden_dim": 4096, "crop_min": 0.2,
}  # fmt: skip
R50_MOCOV2 = {
    "arch": "resnet50", "optimizer": "sgd", "weight_decay": 1e-4, "batch_size": 256, "warmup_epochs": 0,
    "teacher_momentum": 0.999, "teacher_momentum_end": 0.999, "temperature": 0.2, "queue_size": 65536,
    "hidden_dim": 2048, "output_dim": 128, "crop_min": 0.2, "symmetric": False,
}  # fmt: skip
R18 = {"arch": "resnet18", "batch_size": 256, "warmup_epochs": 10, "warmup_start_lr": 3e-5, "output_dim": 256}
CIFAR = {**R18, "epochs": 1000, "data": "cifar100", "image_size": 32, "crop_min": 0.2}
IN100 = {**R18, "epochs": 400, "image_size": 224, "crop_min": 0.08}
R18_LARS = {
    "optimizer": "lars", "trust_coefficient": 0.02, "teacher_momentum": 0.99, "teacher_momentum_end": 1.0,
    "hidden_dim": 4096,
}  # fmt: skip
R18_MOCOV2 = {
    "method": "mocov2", "optimizer": "sgd", "lr": 0.3, "weight_decay": 1e-4, "temperature": 0.2, "hidden_dim": 2048,
    "teacher_momentum": 0.99, "teacher_momentum_end": 0.999, "symmetric": True,
}  # fmt: skip
R18_MOCOV3 = {"method": "mocov3", "lr": 0.3, "weight_decay": 1e-6, "temperature": 0.2, "predictor_hidden_dim": 4096}
# The defaults of main_dino.py, and the changes that the README of its repository states for 300 epochs and ResNet-50.
DINO = {
    "method": "dino", "batch_size": 512, "epochs": 100, "warmup_epochs": 10, "min_lr": 1e-6, "clip_norm": 3.0,
    "teacher_momentum": 0.996, "temperature": 0.1, "teacher_temperature": 0.04, "prototypes": 65536,
    "freeze_prototypes_epochs": 1, "output_dim": 256, "hidden_dim": 2048,
}  # fmt: skip
VIT_DINO = {
    **DINO, "arch": "vit_small_patch16_224", "optimizer": "adamw", "lr": 5e-4, "weight_decay": 0.04,
    "weight_decay_end": 0.4, "drop_path": 0.1, "crop_min": 0.4,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "dino-vits16-100ep": {**VIT_DINO, "norm_prototypes": True, "teacher_temperature_warmup_epochs": 0},
    "dino-vits16-300ep": {
        **VIT_DINO, "epochs": 300, "batch_size": 1024, "norm_prototypes": False, "teacher_temperature": 0.07,
        "teacher_temperature_warmup_epochs": 30,
    },
    "dino-r50-100ep": {
        **DINO, "arch": "resnet50", "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "crop_min": 0.14,
        "drop_path": 0,
    },
    "mocov3-r50-100ep": {**R50_MOCOV3, "epochs": 100, "lr": 0.6, "weight_decay": 1e-6, "teacher_momentum": 0.99},
    "mocov3-r50-300ep": {**R50_MOCOV3, "epochs": 300, "lr": 0.3, "weight_decay": 1e-6, "teacher_momentum": 0.99},
    "mocov3-r50-1000ep": {**R50_MOCOV3, "epochs": 1000, "lr": 0.3, "weight_decay": 1.5e-6, "teacher_momentum": 0.996},
    "mocov3-vits-300ep": {
        "method": "mocov3", "arch": "vit_small_patch16_224", "epochs": 300, "optimizer": "adamw", "lr": 1.5e-4,
        "weight_decay": 0.1, "warmup_epochs": 40, "temperature": 0.2, "batch_size": 4096,
    },
    "mocov2-r50-200ep": {**R50_MOCOV2, "method": "mocov2", "epochs": 200, "lr": 0.03},
    "densecl-r50-coco-800ep": {**R50_MOCOV2, "method": "densecl", "epochs": 800, "lr": 0.3, "dense_weight": 0.5},
    "byol-r50-300ep": {
        "method": "byol", "arch": "resnet50", "epochs": 300, "optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6,
        "teacher_momentum": 0.99, "teacher_momentum_end": 1.0, "hidden_dim": 4096, "output_dim": 256,
        "predictor_hidden_dim": 4096, "crop_min": 0.08, "batch_size": 4096, "warmup_epochs": 10,
    },
    "mocov3-r18-cifar100-1000ep": {**CIFAR, **R18_LARS, **R18_MOCOV3},
    "mocov2-r18-cifar100-1000ep": {**CIFAR, **R18_MOCOV2, "queue_size": 32768},
    "byol-r18-cifar100-1000ep": {
        **CIFAR, **R18_LARS, "method": "byol", "lr": 1.0, "weight_decay": 1e-5, "predictor_hidden_dim": 4096,
    },
    "mocov3-r18-imagenet100-400ep": {**IN100, **R18_LARS, **R18_MOCOV3},
    "mocov2-r18-imagenet100-400ep": {**IN100, **R18_MOCOV2, "queue_size": 65536},
    "byol-r18-imagenet100-400ep": {
        **IN100, **R18_LARS, "method": "byol", "lr": 0.5, "weight_decay": 1e-6, "predictor_hidden_dim": 8192,
    },
}  # fmt: skip


def test_every_recipe_is_compared_with_its_publication() -> None:
    assert recipes().keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_numbers(name: str) -> None:
    config = build(**{"data": "folder", **recipes()[name], "recipe": name}).flat()
    assert {key: config[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_settings_have_unique_names() -> None:
    groups = [getattr(Config(), group.name) for group in dataclasses.fields(Config)]
    names = [leaf.name for group in groups for leaf in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_the_default_is_mocov3_with_residual_momentum() -> None:
    config = read_flags(["--arch", "resnet50", "--data", "/imagenet"]).flat()
    expected = {**PUBLISHED["mocov3-r50-100ep"], "batch_size": None, "residual_weight": 0.1, "recipe": None}
    assert {key: config[key] for key in expected} == expected
    assert resolved(build(data="x"), 4).input.batch_size == 1024


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method", "mocov2"], {"optimizer": "sgd", "lr": 0.03, "batch_size": None}),
        (["--recipe", "mocov2-r50-200ep"], {"method": "mocov2", "lr": 0.03, "batch_size": 256}),
        (["--recipe", "mocov2-r50-200ep", "--lr", "0.5"], {"lr": 0.5, "weight_decay": 1e-4}),
        (["--recipe=mocov3-r50-300ep", "--batch-size=64"], {"lr": 0.3, "batch_size": 64, "epochs": 300}),
        (["--arch", "vit_base_patch16_224"], {"optimizer": "adamw", "temperature": 0.2}),
        (["--epochs", "12"], {"warmup_epochs": 1.2}),
        (["--epochs", "12", "--warmup-epochs", "5"], {"warmup_epochs": 5.0}),
        (["--epochs", "400"], {"warmup_epochs": 10.0}),
    ],
)
def test_flags_override_recipes_and_defaults(flags: list[str], expected: dict[str, Any]) -> None:
    config = read_flags(["--data", "digits", *flags]).flat()
    assert {key: config[key] for key in expected} == expected


def test_settings_survive_writing_and_reading() -> None:
    config = build(data="digits", out="somewhere", batch_size=64)
    assert from_flat(config.flat()).flat() == config.flat()


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ({"data": ""}, "--data is missing"),
        ({"temperature": 0.0}, "--temperature 0.0 is out of range; it must be above 0"),
        ({"lr": float("nan")}, "--lr nan is out of range"),
        ({"queue_size": 0}, "--queue-size 0 is out of range; it must be at least 1"),
        ({"residual_weight": -1.0}, "--residual-weight -1.0"),
        ({"teacher_momentum": 1.5}, "--teacher-momentum 1.5"),
        ({"teacher_momentum": 0.9, "teacher_momentum_end": 0.5}, "must not be above --teacher-momentum-end"),
        ({"epochs": 3, "warmup_epochs": 3.0}, "--warmup-epochs 3 must be less than --epochs 3"),
        ({"residual_at": "head"}, "--residual-at head is unknown; choose one of output, projector, backbone"),
        ({"method": "moco"}, "--method moco is unknown"),
        ({"recipe": "best"}, "--recipe best is unknown"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_wrong_settings_are_named(leaves: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        build(**{"data": "digits", **leaves})


def test_batch_size_must_be_a_multiple_of_accumulate() -> None:
    with pytest.raises(UsageError, match="--batch-size 10 must be a multiple of 4"):
        resolved(build(data="digits", batch_size=10, accumulate=4), 1)


def test_unknown_method_has_no_defaults() -> None:
    with pytest.raises(UsageError, match="mocov3, mocov2, byol, densecl, dino"):
        defaults(method="swav")
