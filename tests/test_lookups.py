"""Unknown names and numbers out of range from Python: one error that states the valid values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from fastrm.data import Augmentation, View, make_loader, open_source
from fastrm.data.named import open_named
from fastrm.errors import UsageError
from fastrm.evaluate import EvaluateConfig, evaluate
from fastrm.export import ExportConfig, export
from fastrm.machine.device import choose_compile, choose_device, choose_kernels, choose_precision
from fastrm.methods import build_method, find
from fastrm.models import build_backbone
from fastrm.optim import build_optimizer
from fastrm.run.step import Step
from fastrm.settings.config import Config, MethodConfig, OptimConfig, build, defaults

METHODS = "mocov3, mocov2, byol, densecl, dino"
TINY = build(data="digits", arch="test_resnet", image_size=32, hidden_dim=8, output_dim=4, predictor_hidden_dim=8)
CPU = torch.device("cpu")


def loader(data: Any = "digits", **changed: Any) -> Any:
    """A loader with valid settings, some of them changed."""
    sound = {"method": "mocov2", "image_size": 24, "batch_size": 16, "device": "cpu", "workers": 0, "seed": 5}
    return make_loader(data, **{**sound, **changed})


def with_method(**changed: Any) -> Config:
    """Valid settings with some settings of the method changed."""
    return replace(TINY, method=replace(MethodConfig(), **changed))


def step(**changed: Any) -> Step:
    """A training step with valid settings, some of them changed."""
    sound: dict[str, Any] = {"precision": "fp32", "accumulate": 1, "clip_norm": None, "layout": torch.channels_last}
    return Step(build_method(TINY), None, **{**sound, **changed})


UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "method of a loader": (lambda: loader(method="nonsense"), f"--method nonsense is unknown; choose one of {METHODS}"),
    "method in capitals": (lambda: loader(method="MoCoV3"), f"--method MoCoV3 is unknown; choose one of {METHODS}"),
    "no method": (lambda: loader(method=None), f"method is a NoneType; it must be one of {METHODS}, a f"),
    "a torchvision transform": (lambda: loader(method=v2.RandomHorizontalFlip()), "augmentation gave a Im"),
    "a view alone": (lambda: loader(method=View()), "method is a View; it must be"),
    "method": (lambda: find("simclr"), f"--method simclr is unknown; choose one of {METHODS}; .* it is registered"),
    "a class of another kind": (lambda: loader(method=dict), "--method <class 'dict'> is unknown; choose one of"),
    "loader": (lambda: loader(loader="nonsense"), "--loader nonsense is unknown; choose one of auto, dali, torch, mem"),
    "device of a loader": (lambda: loader(device="gpu"), "device 'gpu' is unknown; it must be cpu, cuda"),
    "data": (lambda: loader("nonsense"), "--data nonsense does not exist"),
    "no data": (lambda: open_source(""), "--data is missing"),
    "data of another kind": (lambda: loader(5), "data is a int; it must be a path, the name of a set, a map-style"),
    "named set": (lambda: open_named("mnist", Path()), "--data mnist is unknown; choose one of digits"),
    "dtype": (lambda: loader(dtype=torch.uint8), "dtype torch.uint8 cannot hold views"),
    "recipe": (lambda: defaults(recipe="best"), "--recipe best is unknown; choose one of mocov3-r50-100ep"),
    "recipe of another kind": (lambda: defaults(recipe=["best"]), "--recipe"),  # type: ignore[arg-type]
    "method of a network": (lambda: build_method(with_method(method="swav")), f"--method swav .* {METHODS}"),
    "place": (lambda: build_method(with_method(residual_at="head")), "--residual-at head .* output, projector"),
    "optimizer": (
        lambda: build_optimizer(build_method(TINY), replace(OptimConfig(), optimizer="adam")),  # type: ignore[arg-type]
        "--optimizer adam is unknown; choose one of lars, sgd, adamw, lamb",
    ),
    "stem": (lambda: build_backbone("test_resnet", image_size=32, stem="tiny"), "--stem tiny .* auto, imagenet, small"),
    "arch": (lambda: build_backbone("resnet5", image_size=32), "--arch resnet5 is not a timm model; similar names"),
    "device": (lambda: choose_device("gpu"), "--device gpu is unknown; choose one of auto, cuda, mps, cpu"),
    "precision": (lambda: choose_precision("float16", CPU), "--precision float16 .* auto, bf16, fp16, fp32"),
    "precision on an Apple GPU": (lambda: choose_precision("bf16", torch.device("mps")), "with --device mps use fp32"),
    "precision of a step": (lambda: step(precision="half"), "--precision half .* fp32, bf16, fp16"),
    "compile": (lambda: choose_compile("yes", CPU), "--compile yes is unknown; choose one of auto, on, off"),
    "kernels": (lambda: choose_kernels("cuda", CPU), "--kernels cuda is unknown; choose one of auto, triton, cpu, ref"),
    "format": (
        lambda: export(ExportConfig(checkpoint=Path("x"), format="keras", out=Path("x"))),  # type: ignore[arg-type]
        "--format keras is unknown; choose one of timm, torchvision, safetensors, onnx",
    ),
    "which": (
        lambda: export(ExportConfig(checkpoint=Path("x"), format="timm", which="both", out=Path("x"))),  # type: ignore[arg-type]
        "--which both is unknown; choose one of student, teacher",
    ),
    "device of an evaluation": (
        lambda: evaluate(EvaluateConfig(checkpoint=Path("x"), device="gpu", knn=True)),  # type: ignore[arg-type]
        "--device gpu is unknown",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNKNOWN)
def test_an_unknown_name_is_refused_with_the_valid_names(what: str) -> None:
    look_up, message = UNKNOWN[what]
    with pytest.raises(UsageError, match=message):
        look_up()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 0), ("image_size", 24.0), ("image_size", "24"), ("batch_size", 0), ("batch_size", -4),
        ("batch_size", None), ("batch_size", True), ("workers", -1), ("workers", None), ("seed", -1), ("seed", 0.5),
        ("rank", 1), ("rank", -1), ("world_size", 0), ("crop_min", 0.0), ("crop_min", 1.5), ("crop_min", float("nan")),
        ("crop_min", "a"), ("data_root", 3),
    ],
)  # fmt: skip
def test_invalid_numbers_of_a_loader_are_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}|{name.replace('_', '-')}|rank"):
        loader(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("interpolation", "nearest", "bilinear or bicubic"),
        ("interpolation", None, "bilinear or bicubic"),
        ("flip_probability", -0.1, "a number from 0 to 1"),
        ("blur_probability", 1.5, "a number from 0 to 1"),
        ("jitter_probability", float("nan"), "a number from 0 to 1"),
        ("grayscale_probability", "often", "a number from 0 to 1"),
        ("solarize_probability", None, "a number from 0 to 1"),
        ("brightness", -1.0, "a number from 0"),
        ("contrast", float("inf"), "a number from 0"),
        ("saturation", (0.5, 1.5), "a number from 0"),
        ("hue", 0.5, "a number from 0 to a third"),
        ("crop_scale", (1.0, 0.2), "2 numbers above 0 up to 1, the lower one first"),
        ("crop_scale", (0.0, 1.0), "2 numbers above 0"),
        ("crop_scale", (0.2, 1.2), "2 numbers above 0 up to 1"),
        ("crop_scale", 0.2, "2 numbers"),
        ("crop_scale", (0.2,), "2 numbers"),
        ("crop_scale", (0.2, float("nan")), "2 numbers"),
        ("crop_ratio", (4 / 3, 3 / 4), "the lower one first"),
        ("crop_ratio", (0, 1), "2 numbers above 0"),
        ("blur_sigma", (2.0, 0.1), "the lower one first"),
        ("blur_sigma", "12", "2 numbers above 0"),
    ],
)
def test_an_invalid_field_of_a_view_is_named(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"View: {name} is .*; it must be .*{wanted}"):
        View(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": ()}, r"views is \(\); it must be a tuple of one View or more"),
        ({"views": View()}, "views is View.*; it must be a tuple"),
        ({"views": (v2.RandomHorizontalFlip(),)}, "views has a RandomHorizontalFlip in it; each must be a View"),
        ({"views": (View(),), "mean": 0.5}, "mean is 0.5; it must be a number per channel"),
        (
            {"views": (View(),), "std": (0.2,), "mean": (0.2, 0.2)},
            "mean has 2 numbers and std 1; it must be one per channel",
        ),
        ({"views": (View(),), "std": (0.2, 0.0, 0.2)}, "std is .*; it must be a number per channel above 0"),
        ({"views": (View(),), "mean": (0.0, float("nan"), 0.0)}, "mean is .*; it must be a number per channel"),
    ],
)
def test_an_invalid_field_of_an_augmentation_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)


def test_valid_extreme_values_are_accepted() -> None:
    view = View(crop_scale=(1, 1), hue=0, brightness=0, blur_probability=1)
    made = loader(Path("digits"), method=Augmentation(views=(view,), mean=(-1.0, 0, 0.5)), device=CPU)
    assert next(iter(made)).views[0].shape == (16, 3, 24, 24)
