"""The augmentation of a batch, compared with its separate operations, torchvision's v2 transforms, and kornia.

    pytest benchmarks/bench_views.py --benchmark-only

Each call makes MoCo-v3's two views of a batch in bf16. torchvision's transforms draw once per batch and treat all
images alike; the others draw per image.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks._timing import DEVICE, Row, compare
from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, View
from fastrm.data.draws import Draws, blur_radius, draw
from fastrm.kernels import augment_views
from fastrm.methods import find

DTYPE = torch.bfloat16
GPU = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Case:
    """A batch of crops of ``size`` pixels, as from DALI, or of whole images of ``whole`` pixels."""

    name: str
    count: int
    size: int
    whole: int | None


CASES = [
    Case("crops of 224", 256 if GPU else 16, 224, None),
    Case("CIFAR, 32 of 32", 512 if GPU else 64, 32, 32),
    Case("STL-10, 96 of 96", 512 if GPU else 16, 96, 96),
]


def inputs(case: Case) -> tuple[Tensor, list[tuple[View, Draws]]]:
    """Images uint8 [B, H, W, 3] with the correlations of photographs, and the drawn parameters of their two views."""
    generator = torch.Generator().manual_seed(0)
    side = case.whole or case.size
    coarse = torch.rand(case.count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    noisy = 255 * smooth + 12 * torch.randn(case.count, 3, side, side, generator=generator)
    images = noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().to(DEVICE)
    sides = torch.full((case.count,), side)
    views = find("mocov3").augmentation(0.2).views
    return images, [(view, draw(view, sides, sides, case.size, generator)) for view in views]


Call = Callable[[], list[Tensor]]


def contenders(case: Case, note: Callable[[str], None]) -> dict[str, Call]:
    """The contenders by name; each returns one tensor [B, 3, S, S] per view."""
    images, pairs = inputs(case)
    count, size = case.count, case.size

    def ours(backend: str | None) -> Callable[[], list[Tensor]]:
        def make() -> list[Tensor]:
            return [
                augment_views(
                    images, draws if case.whole else draws.after_the_crop(), out_size=size, dtype=DTYPE,
                    mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation=view.interpolation,
                    blur_radius=blur_radius(view, size), backend=backend,
                )
                for view, draws in pairs
            ]  # fmt: skip

        return make

    def torchvision() -> Callable[[], list[Tensor]]:
        v2 = importlib.import_module("torchvision.transforms.v2")
        planes = images.permute(0, 3, 1, 2).contiguous()
        made = []
        for view, _ in pairs:
            colours = (view.brightness, view.contrast, view.saturation, view.hue)
            radius, scale = blur_radius(view, size), size / 224
            crop = v2.RandomResizedCrop(size, scale=view.crop_scale, antialias=True) if case.whole else v2.Identity()
            made.append(v2.Compose([
                crop, v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(*colours)], view.jitter_probability),
                v2.RandomGrayscale(view.grayscale_probability),
                v2.RandomApply([v2.GaussianBlur(2 * radius + 1, tuple(s * scale for s in view.blur_sigma))],
                               view.blur_probability),
                v2.RandomSolarize(128, view.solarize_probability), v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]))  # fmt: skip
        return lambda: [transform(planes).to(DTYPE, memory_format=torch.channels_last) for transform in made]

    def kornia() -> Callable[[], list[Tensor]]:
        K = importlib.import_module("kornia.augmentation")
        planes = images.permute(0, 3, 1, 2).contiguous()
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        made = []
        for view, _ in pairs:
            colours = (view.brightness, view.contrast, view.saturation, view.hue)
            radius, scale = blur_radius(view, size), size / 224
            crop = [K.RandomResizedCrop((size, size), scale=view.crop_scale)] if case.whole else []
            made.append(torch.nn.Sequential(
                *crop, K.RandomHorizontalFlip(), K.ColorJitter(*colours, p=view.jitter_probability),
                K.RandomGrayscale(p=view.grayscale_probability),
                K.RandomGaussianBlur((2 * radius + 1,) * 2, tuple(s * scale for s in view.blur_sigma),
                                     p=view.blur_probability),
                K.RandomSolarize(p=view.solarize_probability), K.Normalize(mean, std),
            ).to(DEVICE))  # fmt: skip
        return lambda: [f(planes.float() / 255).to(DTYPE, memory_format=torch.channels_last) for f in made]

    ready = {"augment_views": ours(None), "one operation after the other": ours("reference")}
    for name, make in (("torchvision v2, one draw per batch", torchvision), ("kornia", kornia)):
        try:
            ready[name] = make()
        except ImportError as error:
            note(f"{name} cannot: {error}")
    shapes = {name: [tuple(view.shape) for view in call()] for name, call in ready.items()}
    assert set(map(str, shapes.values())) == {str([(count, 3, size, size)] * 2)}
    return ready


def floor(case: Case) -> int:
    """Minimum bytes: images read once, or twice if contrast needs a large one's mean, and views written once."""
    _, pairs = inputs(case)
    image, view = 3 * (case.whole or case.size) ** 2, 3 * case.size**2 * DTYPE.itemsize
    twice = [int(draws.jitter.sum()) if case.size > 64 else 0 for _, draws in pairs]
    return sum(case.count * (image + view) + more * image for more in twice)


def launches(call: Callable[[], object]) -> tuple[int, int]:
    """Number of kernels, and of memory copies and fills, of a call on the GPU."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return len(names) - copies, copies


def measure(case: Case, ready: dict[str, Call]) -> list[Row]:
    """Check the contenders' results, then time them."""
    names = list(ready)
    for mine, want in zip(ready[names[0]](), ready[names[1]](), strict=True):
        error = (mine.float() - want.float()).abs()
        assert float(error.mean()) < 0.02, float(error.mean())  # rounding of bf16, in units of a standard deviation
        assert float(error.max()) < 0.1, float(error.max())
    return compare(f"2 views, {case.name}, {case.count} images", ready, floor(case), repeats=3 if GPU else 1, rounds=9)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_views(case: Case, enter_rows: Any, note: Any) -> None:
    ready = contenders(case, note)
    enter_rows(measure(case, ready))
    if GPU:
        counted = {name: launches(call) for name, call in ready.items()}
        lines = [f"| {case.name} | {name} | {kernels} | {copies} |" for name, (kernels, copies) in counted.items()]
        note("| case | what | kernels | copies |\n|---|---|--:|--:|\n" + "\n".join(lines))
        kernels, copies = counted["augment_views"]
        assert kernels <= 6
        assert copies <= 2
