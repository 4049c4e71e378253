"""augment_views equals torchvision's v2 functional transforms on every backend; its launches and memory traffic."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastrm.data import make_loader
from fastrm.kernels import ViewParameters, _augment, augment_views, batched, dispatch
from fastrm.kernels._augment_ops import COLUMN
from fastrm.kernels.dispatch import triton
from tests.conftest import natural_pictures
from tests.interpreted import (
    BACKENDS,
    DEFAULTS,
    INTERPRETED,
    SLOW_TRITON,
    device_of,
    often_and_slow,
    other_defaults,
    run_triton_cases,
)
from tests.test_batched import composed

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANGES = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
# In steps of 1/255. The Triton blur is a matrix product in fp16, whose values have errors of up to 1/8 step.
MEAN_ERROR, LARGEST = 0.1, 0.5


def pictures(count: int, height: int, width: int, bands: int = 3) -> Tensor:
    """uint8 images [count, height, width, bands]."""
    planes = natural_pictures(count, height, width)
    return torch.cat([planes] * (bands // 3 + 1), dim=1)[:, :bands].permute(0, 2, 3, 1).contiguous()


def parameters(count: int, seed: int, *, widest: float = 1.0, **fixed: Any) -> ViewParameters:
    """View parameters of ``count`` images, in which each change applies to some of the images."""
    draw = torch.Generator().manual_seed(seed)

    def share(*shape: int) -> Tensor:
        """Uniform random numbers in [0, 1)."""
        return torch.rand(*shape, generator=draw)

    drawn = {
        "flip": share(count) < 0.5,
        "jitter": share(count) < 0.8,
        "factors": torch.cat([0.6 + 0.8 * share(count, 3), 0.3 * share(count, 1) - 0.15], dim=1),
        "order": share(count, 4).argsort(dim=1),
        "gray": share(count) < 0.3,
        "sigma": (share(count) < 0.5) * (0.2 + (widest - 0.2) * share(count)),
        "solarize": share(count) < 0.3,
    }
    return ViewParameters(**{**drawn, **fixed})


def boxes(count: int, height: int, width: int, seed: int) -> Tensor:
    """Random boxes int64 [count, 4] (top, left, height, width) within a picture."""
    draw = np.random.default_rng(seed)
    sides = draw.integers(1, (height + 1, width + 1), (count, 2))
    return torch.from_numpy(np.hstack([draw.integers(0, np.array([height, width]) - sides + 1), sides]))


def torchvisions(
    image: Tensor, drawn: ViewParameters, i: int, size: int, mode: str, radius: int, *, in_bytes: bool
) -> Tensor:
    """A view [3, size, size] in [0, 1] of an image [H, W, 3] by torchvision, in float32.

    ``in_bytes`` makes the crop in uint8.
    """
    out = image.permute(2, 0, 1) if in_bytes else image.permute(2, 0, 1).float()
    of = {name: None if value is None else value[i] for name, value in vars(drawn).items()}
    if of["box"] is not None:
        out = F.resized_crop(out, *of["box"].tolist(), [size, size], InterpolationMode(mode), antialias=True)
    out = out.float().clamp(0, 255) / 255
    if of["flip"]:
        out = F.horizontal_flip(out)
    if of["jitter"]:
        for kind in of["order"].tolist():
            out = CHANGES[kind](out, float(of["factors"][kind]))
    if of["gray"]:
        out = F.rgb_to_grayscale(out, 3)
    if of["sigma"] is not None and of["sigma"] > 0:
        out = F.gaussian_blur(out, [2 * radius + 1] * 2, [float(of["sigma"])] * 2)
    return F.solarize(out, 127.5 / 255) if of["solarize"] else out


def off(views: Tensor, want: Tensor, std: tuple[float, ...] = STD) -> Tensor:
    """Absolute differences of normalised views, in steps of 1/255."""
    return (views.cpu().float() - want.float()).abs() * 255 * torch.tensor(std)[:, None, None]


def check_torchvisions(
    images: Tensor, drawn: ViewParameters, size: int, backend: str, *, mode: str = "bilinear", radius: int = 3,
    dtype: torch.dtype = F32,
) -> None:  # fmt: skip
    """Assert that augment_views equals torchvision within the tolerance of the dtype."""
    views = augment_views(
        images.to(device_of(backend)), drawn, out_size=size, dtype=dtype, mean=MEAN, std=STD, interpolation=mode,
        blur_radius=radius, backend=backend,
    )  # fmt: skip
    assert views.shape == (len(images), 3, size, size)
    assert views.dtype == dtype
    assert views.is_contiguous(memory_format=torch.channels_last)
    in_bytes = backend == "cpu" and images[0].numel() >= 2**11  # the CPU backend crops larger images in uint8
    want = [torchvisions(image, drawn, i, size, mode, radius, in_bytes=in_bytes) for i, image in enumerate(images)]
    error = off(views, F.normalize(torch.stack(want), list(MEAN), list(STD)))
    coarse = {F32: 0.0, F16: 0.1, BF16: 0.8}[dtype]
    assert float(error.mean()) < MEAN_ERROR + coarse / 2
    assert float(error.max()) < LARGEST + coarse


@often_and_slow
def test_triton_cases_in_the_interpreter(cases: str) -> None:
    run_triton_cases(__file__, cases)


ALONE: dict[str, dict[str, Tensor]] = {
    "nothing": {},
    "flip": {"flip": torch.tensor([True, False, True])},
    "brightness": {"factors": torch.tensor([[f, 1.0, 1.0, 0.0] for f in (0.0, 0.7, 1.4)])},
    "contrast": {"factors": torch.tensor([[1.0, f, 1.0, 0.0] for f in (0.0, 0.7, 1.4)])},
    "saturation": {"factors": torch.tensor([[1.0, 1.0, f, 0.0] for f in (0.0, 0.7, 1.4)])},
    "hue": {"factors": torch.tensor([[1.0, 1.0, 1.0, f] for f in (-0.33, 0.05, 0.33)])},
    "gray": {"gray": torch.tensor([True, False, True])},
    "blur": {"sigma": torch.tensor([0.3, 0.0, 1.1])},
    "solarize": {"solarize": torch.tensor([True, False, True])},
}


@pytest.mark.parametrize("backend", ["reference", "cpu", SLOW_TRITON])
@pytest.mark.parametrize("name", ALONE)
def test_each_operation_equals_torchvision(name: str, backend: str) -> None:
    given = ALONE[name]
    whole = {**given}
    if "factors" in given:
        whole |= {"jitter": torch.ones(3, dtype=torch.bool), "order": torch.arange(4).repeat(3, 1)}
    images = pictures(3, 24, 24)
    check_torchvisions(images, ViewParameters(**whole), 24, backend)
    one, other = (
        augment_views(images.to(device_of(backend)), ViewParameters(**fields), out_size=24, mean=MEAN, std=STD,
                      blur_radius=3, backend=backend)
        for fields in (given, whole)
    )  # fmt: skip
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [16, pytest.param(72, marks=[pytest.mark.slow] if INTERPRETED else [])])
def test_whole_views_of_crops_equal_torchvision(size: int, backend: str) -> None:
    check_torchvisions(pictures(6, size, size), parameters(6, 0), size, backend)


@pytest.mark.parametrize("backend", ["reference", "cpu", SLOW_TRITON])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(20, 20, 24), (40, 31, 16), (50, 60, 75)])
def test_whole_views_of_boxes_equal_torchvision(height: int, width: int, size: int, mode: str, backend: str) -> None:
    count = 2 if INTERPRETED else 5
    drawn = parameters(count, 1, box=boxes(count, height, width, 1))
    check_torchvisions(pictures(count, height, width), drawn, size, backend, mode=mode)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(F16, marks=pytest.mark.slow)])
def test_half_precision_views_equal_torchvision(dtype: torch.dtype, backend: str) -> None:
    check_torchvisions(pictures(2, 16, 16), parameters(2, 2), 16, backend, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", SLOW_TRITON])
@pytest.mark.parametrize("radius", [24, 25])
def test_blurs_at_and_above_the_widest_that_fits_a_tile(radius: int, backend: str) -> None:
    check_torchvisions(pictures(1, 88, 88), ViewParameters(sigma=torch.tensor([7.0])), 88, backend, radius=radius)


def test_views_are_near_those_that_torchvision_makes_in_bytes() -> None:
    images = pictures(24, 48, 48)
    drawn = parameters(24, 3, box=torch.tensor([0, 0, 48, 48]).repeat(24, 1))
    views = augment_views(images, drawn, out_size=48, mean=(0,) * 3, std=(1,) * 3, blur_radius=3)
    want = [composed(image.permute(2, 0, 1), drawn, i, "bilinear", 48, 3) for i, image in enumerate(images)]
    error = off(views, torch.stack(want), (1, 1, 1))
    # torchvision truncates to bytes after each change, half a step on average, and colour changes take five of them.
    assert drawn.jitter is not None
    assert float(error.mean()) < 1.5
    assert float(error[~drawn.jitter].mean()) < 0.5
    assert float(error[~drawn.jitter].max()) < 3


CASES = st.fixed_dictionaries(
    {
        "size": st.tuples(st.integers(3, 40), st.integers(3, 40)),
        "whole": st.none() | st.tuples(st.integers(1, 30), st.integers(1, 30)),
        "bands": st.sampled_from([3, 3, 1, 2, 5]),
        "repeated": st.booleans(),
        "count": st.integers(1, 4),
        "dtype": st.sampled_from([F32, BF16, F16]),
        "bytes": st.booleans(),
        "planar": st.booleans(),
        "interpolation": st.sampled_from(["bilinear", "bicubic"]),
        "seed": st.integers(0, 10_000),
    }
)


def check_against_the_reference(case: dict[str, Any], backend: str) -> None:
    """Assert that a backend equals the reference backend on a random case, and that two calls give the same bits."""
    count, (height, width) = case["count"], case["whole"] or case["size"]
    # the CPU backend would crop uint8 images in uint8, as torchvision does
    in_bytes = case["bytes"] and backend != "cpu"
    images = pictures(count, height, width, case["bands"]).to(torch.uint8 if in_bytes else F32)
    if case["planar"]:
        images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    drawn = parameters(count, case["seed"], widest=0.7)
    index = None
    if case["whole"]:
        drawn = replace(drawn, box=boxes(count, height, width, case["seed"]))
        index = torch.arange(count).flip(0)
    channels = 4 if case["bands"] == 1 and case["repeated"] else case["bands"]
    mean, std = [0.1 * i for i in range(channels)], [0.2 + 0.1 * i for i in range(channels)]
    options: dict[str, Any] = {
        "out_size": case["size"], "mean": mean, "std": std, "interpolation": case["interpolation"], "index": index,
        "blur_radius": 2,
    }  # fmt: skip
    want = augment_views(images, drawn, **options, backend="reference")
    device = device_of(backend)
    views = augment_views(images.to(device), drawn, **options, dtype=case["dtype"], backend=backend)
    again = augment_views(images.to(device), drawn, **options, dtype=case["dtype"], backend=backend)
    assert torch.equal(views, again)
    error = (views.cpu().float() - want).abs()
    spacing = {F32: 2e-7, F16: 1e-3, BF16: 8e-3 if not INTERPRETED else 1.6e-2}[case["dtype"]] * want.abs()
    blurred = drawn.sigma[:, None, None, None] > 0
    bound = torch.where(blurred, LARGEST, 0.02)
    assert (error <= bound / (255 * torch.tensor(std)[:, None, None]) + spacing).all()


@given(case=CASES)
def test_random_sizes_bands_orders_and_dtypes_equal_the_reference(case: dict[str, Any]) -> None:
    check_against_the_reference(case, "cpu")


# Triton compiles each size anew.
@pytest.mark.parametrize("backend", [SLOW_TRITON])
@settings(max_examples=8)
@given(case=CASES)
def test_small_triton_views_equal_the_reference(backend: str, case: dict[str, Any]) -> None:
    check_against_the_reference(case, backend)


@pytest.mark.parametrize("backend", [SLOW_TRITON])
@settings(max_examples=4)
@given(case=CASES)
def test_larger_triton_views_equal_the_reference(backend: str, case: dict[str, Any]) -> None:
    height, width = case["size"]
    check_against_the_reference({**case, "size": (height + 50, width + 50), "count": 2}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_autocast_float64_and_no_images(backend: str) -> None:
    device = device_of(backend)
    images, drawn = pictures(2, 16, 16).to(device), parameters(2, 4)
    out = torch.full((2, 3, 16, 16), float("nan"), device=device).to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"out_size": 16, "mean": MEAN, "std": STD, "backend": backend}
    assert augment_views(images, drawn, **options, out=out) is out
    with torch.autocast(device.type, dtype=BF16):
        assert torch.equal(out, augment_views(images, drawn, **options))
    double = augment_views(images, drawn, **options, dtype=torch.float64)
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), out, atol=0.02)
    none = augment_views(images[:0], ViewParameters(), **options)
    assert none.shape == (0, 3, 16, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["memory", "torch"])
def test_loaders_make_the_same_views_on_a_gpu(loader: str) -> None:
    """The views of a GPU equal those of the CPU, also if the GPU is busy and the caller overwrites each batch."""
    kept = []
    for device in ("cpu", "cuda"):
        batches = make_loader(
            "digits", method="mocov3", image_size=32, batch_size=256, device=device, workers=0, seed=3, loader=loader
        )
        views = []
        for batch in batches:
            if device == "cuda":
                torch.cuda._sleep(10_000_000)
            views.append([view.clone() for view in batch.views])
            for view in batch.views:
                view.fill_(float("nan"))
        kept.append(torch.stack([torch.stack(pair) for pair in views]).cpu())
    assert kept[0].shape[2:] == (256, 3, 32, 32)
    assert float(off(kept[1], kept[0]).max()) < LARGEST


class Recorded:
    """A kernel that records its launches and runs nothing."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda **arguments: self.launches.append({"grid": grid[0], **arguments})


@pytest.mark.skipif(triton is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("size", "bands", "most"), [(224, 3, 3), (96, 3, 3), (64, 3, 2), (32, 1, 2), (32, 4, 3), (224, 1, 3)]
)
def test_number_and_grid_of_the_launches(size: int, bands: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Recorded()
    monkeypatch.setattr(_augment, "gray_kernel", kernel)
    monkeypatch.setattr(_augment, "view_kernel", kernel)
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: None)
    images = torch.zeros(8, size, size, bands, dtype=torch.uint8)
    options: dict[str, Any] = {"out_size": size, "mean": [0.5] * bands, "std": [0.5] * bands, "backend": "triton"}
    some = torch.tensor([True, False] * 4)
    drawn = ViewParameters(factors=torch.ones(8, 4) / 4, jitter=some, sigma=torch.tensor([0.0, 0, 1, 1] * 2))
    augment_views(images, drawn, **options, blur_radius=2)
    assert len(kernel.launches) == most
    seen = []
    for launch in kernel.launches:
        rows = launch["table_ptr"][launch["first"] :][: launch["grid"] // launch["TILES"]]
        at = rows[:, COLUMN["view"]].sort().values
        chosen = (drawn.sigma > 0) == launch["BLUR"] if "BLUR" in launch else some  # type: ignore[operator]
        assert torch.equal(at, chosen.nonzero()[:, 0].int())
        seen += at.tolist() if "BLUR" in launch else []
    assert sorted(seen) == list(range(8))
    kernel.launches.clear()
    augment_views(images, ViewParameters(flip=some), **options)
    assert [launch["BLUR"] for launch in kernel.launches] == [False]
    programs = (-(-size // (size if size <= 64 else 32))) ** 2
    assert kernel.launches[0]["grid"] == 8 * programs


@pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreter loads and stores")
@pytest.mark.parametrize(("size", "whole"), [(16, None), (72, None), pytest.param(20, 32, marks=pytest.mark.slow)])
def test_triton_reads_images_once_or_twice_for_a_mean(
    size: int, whole: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per launch, the bytes read and written at different addresses are those of the images and the views.

    A mean for the contrast of a large image reads it a second time. Repeated reads of one address hit the cache.
    """
    from triton.runtime.interpreter import interpreter_builder

    moved: list[list[set[int]]] = []
    loads, stores = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def count(ptrs: Any, mask: Any, what: int) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        at = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        moved[-1][what].update((at[..., None] + np.arange(size, dtype=at.dtype)).ravel().tolist())

    def load(ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count(ptrs, mask, 0)
        return loads(ptrs, mask, *rest, **options)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        count(ptrs, mask, 1)
        return stores(ptrs, value, mask, *rest, **options)

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Any:
            moved.append([set(), set()])
            return self.kernel[grid]

    monkeypatch.setattr(interpreter_builder, "create_masked_load", load)
    monkeypatch.setattr(interpreter_builder, "create_masked_store", store)
    for name in ("gray_kernel", "view_kernel"):
        monkeypatch.setattr(_augment, name, Counted(getattr(_augment, name)))
    side = whole or size
    images, count_ = pictures(4, side, side), 4
    drawn = parameters(count_, 5, sigma=torch.tensor([0.0, 0, 1, 1]), jitter=torch.tensor([True, False] * 2))
    if whole:
        drawn = replace(drawn, box=torch.tensor([0, 0, whole, whole]).repeat(count_, 1))
    augment_views(images, drawn, out_size=size, dtype=BF16, mean=MEAN, std=STD, blur_radius=3, backend="triton")
    read, written = (sum(len(launch[what]) for launch in moved) for what in (0, 1))
    again = 2 * side * side * 3 if size > 64 else 0  # the two images whose contrast is changed are read twice
    views = count_ * size * size * 3 * 2
    small = 1024  # bytes of the table, the numbers and the sums
    assert images.numel() + again <= read <= images.numel() + again + small
    assert views <= written <= views + small
    assert read + written <= 1.5 * (images.numel() + again + views)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"images": torch.zeros(2, 8, 8)}, r"images has shape \(2, 8, 8\); it must be \[B, H, W, C\]"),
    ({"images": torch.zeros(2, 8, 8, 3).double()}, "images is torch.float64"),
    ({"images": [1]}, "images is a list"),
    ({"images": torch.zeros(2, 8, 8, 3, requires_grad=True)}, "images requires grad"),
    ({"out_size": 9}, "images are 8x8 and out_size is 9x9"),
    ({"out_size": 0}, "out_size=0"),
    ({"out_size": (8, 8, 8)}, r"out_size=\(8, 8, 8\)"),
    ({"dtype": torch.uint8}, "dtype is torch.uint8"),
    ({"mean": (0.5,)}, "mean has 1 numbers, std 3, and images 3 bands"),
    ({"std": (0.0, 1.0, 1.0)}, "std not 0"),
    ({"mean": 0.5}, "mean=0.5; it must be a sequence of numbers"),
    ({"std": "abc"}, "std='abc'; it must be a sequence of numbers"),
    ({"out_size": 8.0}, "out_size=8.0; it must be one or two whole numbers"),
    ({"blur_radius": 2.5}, "blur_radius=2.5; it must be a whole number"),
    ({"out": [1]}, "out is a list"),
    ({"interpolation": "nearest"}, "interpolation='nearest'"),
    ({"blur_radius": 8}, "blur_radius=8, of a largest sigma of 1"),
    ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ({"index": torch.tensor([0, 2])}, "index goes from 0 to 2; there are 2 images"),
    ({"index": torch.tensor([0.0])}, "index is torch.float32"),
    ({"out": torch.zeros(2, 3, 8, 8)}, "channels-last order"),
    ({"parameters": None}, "parameters is a NoneType"),
    ({"parameters": {"flip": torch.zeros(2)}}, "flip is torch.float32; it must be bool"),
    ({"parameters": {"sigma": torch.zeros(3)}}, r"sigma has shape \(3,\); it must be \[2\]"),
    ({"parameters": {"sigma": torch.tensor([0.0, float("nan")])}}, "sigma has a number outside its limits"),
    ({"parameters": {"factors": torch.tensor([[1, 1, -1, 0.0]] * 2)}}, "factors has a number outside its limits"),
    ({"parameters": {"factors": torch.tensor([[1, 1, 1, 0.5]] * 2)}}, "factors has a number outside its limits"),
    (
        {"parameters": {"order": torch.tensor([[0, 1, 2, 2]] * 2)}},
        "each row of order must have each of 0, 1, 2 and 3 once",
    ),
    ({"parameters": {"box": torch.tensor([[0, 0, 8, 9]] * 2)}}, r"box has \[0, 0, 8, 9\] .* not within 8x8"),
]


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_of_torch_do_not_change_views(backend: str, kind: str) -> None:
    images, drawn = pictures(4, 20, 24).to(device_of(backend)), parameters(4, 1, box=boxes(4, 20, 24, 1))
    found = []
    for some in (drawn, ViewParameters(box=drawn.box), ViewParameters(box=drawn.box, sigma=drawn.sigma)):
        for changed in (True, False):
            batched._spread.cache_clear()
            with other_defaults(kind) if changed else contextlib.nullcontext():
                found.append(augment_views(images, some, out_size=16, mean=MEAN, std=STD, backend=backend))
    assert all(torch.equal(mine, right) for mine, right in zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said[:30] for _, said in WRONG])
def test_wrong_input_is_named(wrong: dict[str, Any], said: str) -> None:
    usual: dict[str, Any] = {
        "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "out_size": 8, "mean": MEAN, "std": STD,
        "parameters": {"sigma": torch.tensor([0.0, 1.0])}, "blur_radius": 2,
    }  # fmt: skip
    arguments = {**usual, **wrong}
    if isinstance(arguments["parameters"], dict):
        arguments["parameters"] = ViewParameters(**arguments["parameters"])
    with pytest.raises((ValueError, TypeError), match=said):
        augment_views(**arguments)
