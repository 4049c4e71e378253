"""The batched operations equal torchvision's v2 functional transforms; the distributions of random parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fastrm.data.__main__ import main
from fastrm.data.augmentation import View
from fastrm.data.draws import Draws, draw
from fastrm.errors import UsageError
from fastrm.kernels import batched
from fastrm.methods import find
from tests.conftest import natural_pictures

# torchvision resizes bytes in fixed point and rounds the result: an error of at most 0.5/255, and of 0.25/255 on
# average.
ROUNDING = 0.5 / 255
# In float32, results differ only by the order of summation.
EXACT = 1e-5


@pytest.fixture
def pixels() -> Tensor:
    """uint8 images [6, 3, 60, 80]."""
    return natural_pictures(6, 60, 80)


@pytest.fixture
def images(pixels: Tensor) -> Tensor:
    """float32 images [6, 3, 48, 48] in [0, 1]."""
    return pixels[..., :48, :48].float() / 255


def error(mine: Tensor, theirs: Tensor) -> float:
    """Mean absolute difference between images in [0, 255] and images in [0, 1], on the scale of [0, 1]."""
    assert mine.shape == theirs.shape
    return float((mine / 255 - theirs).abs().mean())


def changed(images: Tensor, change_: Callable[..., object], *parameters: object, **options: object) -> Tensor:
    """The images, given in [0, 1], after an in-place operation on [0, 255]; the result is in [0, 255]."""
    copy = images * 255
    change_(copy, *parameters, **options)
    return copy


def jitter_(images: Tensor, factors: Tensor, order: Tensor) -> None:
    chosen = torch.ones(len(images), dtype=torch.bool)
    batched.carry_out_(batched.jitter(chosen, factors, order, images.shape[1]), images)


@pytest.mark.parametrize("size", [24, 32, 112])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crop_resize_and_flip_equal_torchvision(pixels: Tensor, mode: str, size: int) -> None:
    box = torch.tensor([[0, 0, 60, 80], [5, 7, 40, 31], [30, 2, 9, 70], [0, 0, 1, 1], [59, 79, 1, 1], [3, 3, 57, 20]])
    flip = torch.tensor([True, False, True, False, True, False])
    mine = batched.crop_resize(pixels, box, flip, size, bicubic=mode == "bicubic")
    for i, (image, (top, left, height, width)) in enumerate(zip(pixels, box.tolist(), strict=True)):
        want = F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode(mode), antialias=True)
        want = F.horizontal_flip(want) if flip[i] else want
        assert error(mine[i], want / 255) < ROUNDING, i
        alone = batched.crop(image, (top, left, height, width), bool(flip[i]), size, mode)
        assert error(alone[0].float(), want / 255) < ROUNDING, i


@pytest.mark.parametrize(
    ("column", "theirs"),
    list(enumerate((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue))),
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_each_colour_change_equals_torchvision(
    images: Tensor, column: int, theirs: Callable[[Tensor, float], Tensor]
) -> None:
    values = [-0.33, -0.1, -0.03, 0.0, 0.07, 0.33] if column == 3 else [0.0, 0.6, 0.8, 1.0, 1.2, 1.4]
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(6, 1)
    factors[:, column] = torch.tensor(values)
    mine = changed(images, jitter_, factors, torch.tensor([2, 0, 3, 1]).repeat(6, 1))
    for i, value in enumerate(values):
        assert error(mine[i], theirs(images[i], value)) < EXACT, value


def test_colour_changes_follow_the_order_of_each_image(images: Tensor) -> None:
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    factors = torch.tensor([1.4, 0.6, 1.4, 0.1]).repeat(6, 1)
    orders = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1], [3, 1, 2, 0], [0, 3, 1, 2]])
    mine = changed(images, jitter_, factors, orders)
    for i, order in enumerate(orders.tolist()):
        want = images[i]
        for kind in order:
            want = changes[kind](want, float(factors[i, kind]))
        assert error(mine[i], want) < EXACT


def test_grayscale_blur_solarize_and_normalise_equal_torchvision(images: Tensor) -> None:
    assert error(changed(images, batched.saturation_, torch.zeros(6)), F.rgb_to_grayscale(images, 3)) < EXACT
    sigmas = torch.tensor([0.1, 0.43, 0.8, 1.2, 1.6, 2.0])
    mine = changed(images, batched.blur_, batched.gaussian(sigmas, 6))
    for i, sigma in enumerate(sigmas.tolist()):
        assert error(mine[i], F.gaussian_blur(images[i], [13, 13], [sigma, sigma])) < EXACT
    large = torch.rand(1, 3, 130, 130)  # more than two blocks of the band matrix of the blur
    mine = changed(large, batched.blur_, batched.gaussian(sigmas[-1:], 6))
    assert error(mine[0], F.gaussian_blur(large[0], [13, 13], [2.0, 2.0])) < EXACT
    as_bytes = (images * 255).round().to(torch.uint8)
    assert error(changed(as_bytes.float() / 255, batched.solarize_), F.solarize(as_bytes, 128) / 255) < EXACT
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    want = F.normalize(images, list(mean), list(std))
    for dtype, spacing in ((torch.float32, EXACT), (torch.bfloat16, 2**-8)):
        out = batched.empty_views(6, 48, dtype, torch.device("cpu"))
        batched.normalise(images * 255, mean, std, out=out)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert float((out - want).abs().max()) < spacing * float(want.abs().max())


@pytest.mark.parametrize("size", [32, 64, 112])
def test_single_operations_on_some_images_equal_torchvision(size: int) -> None:
    images = natural_pictures(5, size, size).float() / 255
    sigma = torch.tensor([0.3, 0.7, 1.1, 1.5, 2.0])
    widths = [[value, value] for value in sigma.tolist()]
    factors = torch.tensor([0.6, 0.8, 1.0, 1.2, 1.4])
    shifts = torch.tensor([-0.33, -0.1, 0.0, 0.1, 0.33])
    operations: list[tuple[Callable[..., object], Tensor, Callable[[Tensor, int], Tensor]]] = [
        (batched.brightness_, factors, lambda image, i: F.adjust_brightness(image, float(factors[i]))),
        (batched.contrast_, factors, lambda image, i: F.adjust_contrast(image, float(factors[i]))),
        (batched.saturation_, factors, lambda image, i: F.adjust_saturation(image, float(factors[i]))),
        (batched.hue_, shifts, lambda image, i: F.adjust_hue(image, float(shifts[i]))),
        (batched.saturation_, 0 * factors, lambda image, i: F.rgb_to_grayscale(image, 3)),
        (batched.blur_, batched.gaussian(sigma, 6), lambda image, i: F.gaussian_blur(image, [13, 13], widths[i])),
        (lambda images, _: batched.solarize_(images), factors, lambda image, i: F.solarize(image, 127.5 / 255)),
    ]
    for change_, parameter, theirs in operations:
        chosen = [True, False, True, True, True]
        mine = images * 255
        batched.carry_out_([batched.Step(change_, chosen, parameter)], mine)
        want = torch.stack([theirs(image, i) if chosen[i] else image for i, image in enumerate(images)])
        off = (mine - 255 * want).abs()
        assert float(off.max()) <= 1.5, change_
        assert float(off.mean()) < 0.1, change_


@pytest.mark.parametrize("size", [8, 32, 64, 96])
def test_views_do_not_depend_on_the_number_changed_at_a_time(size: int) -> None:
    view = View(blur_probability=0.6, solarize_probability=0.3)
    sides = torch.full((8,), size)
    draws = draw(view, sides, sides, size, torch.Generator().manual_seed(2))
    together = natural_pictures(8, size, size).float()
    apart = together.clone()
    batched.recolour_(together, draws, blur_radius=2)
    planned = batched.steps(draws, 3, 2, torch.device("cpu"))
    for start, count in ((0, 1), (1, 1), (2, 3), (5, 3)):
        batched.carry_out_(planned, apart[start : start + count], start)
    assert torch.equal(together, apart)


def composed(image: Tensor, draws: Draws, i: int, mode: str, size: int, radius: int) -> Tensor:
    """One image's view in [0, 1] by torchvision, in uint8 and in the order of the fields of View, as users have it."""
    top, left, height, width = draws.box[i].tolist()
    out = F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode(mode), antialias=True)
    if draws.jitter[i]:
        changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for kind in draws.order[i].tolist():
            out = changes[kind](out, float(draws.factors[i, kind]))
    if draws.gray[i]:
        out = F.rgb_to_grayscale(out, 3)
    if draws.sigma[i] > 0:
        out = F.gaussian_blur(out, [2 * radius + 1] * 2, [float(draws.sigma[i])] * 2)
    if draws.solarize[i]:
        out = F.solarize(out, 128)
    return (F.horizontal_flip(out) if draws.flip[i] else out) / 255


@pytest.mark.parametrize("method", ["mocov2", "mocov3", "byol"])
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_views_equal_torchvision(method: str, channels: int) -> None:
    pixels = natural_pictures(64, 60, 80)[:, :channels]
    for view in find(method).augmentation(0.2).views:
        heights, widths = torch.full((64,), 60), torch.full((64,), 80)
        draws = draw(view, heights, widths, 48, torch.Generator().manual_seed(1))
        bicubic = view.interpolation == "bicubic"
        mine = batched.crop_resize(pixels, draws.box, draws.flip, 48, bicubic=bicubic)
        batched.recolour_(mine, draws, blur_radius=2)
        wants = [composed(p.expand(3, -1, -1), draws, i, view.interpolation, 48, 2) for i, p in enumerate(pixels)]
        # The tolerance covers seven roundings to bytes, and pixels that fall on the other side of the solarizing
        # threshold.
        errors = [error(a.expand(3, -1, -1), b) for a, b in zip(mine, wants, strict=True)]
        assert np.median(errors) < 1.5 / 255
        assert max(errors) < 6 / 255


def test_random_parameters_have_the_described_distributions() -> None:
    count, side = 5000, 10_000
    view = View(crop_scale=(0.08, 0.5), solarize_probability=0.2)
    sides = torch.full((count,), side)
    draws = draw(view, sides, sides, 224, torch.Generator().manual_seed(3))
    top, left, height, width = draws.box.double().unbind(1)

    def uniform(values: Tensor, low: float, high: float) -> None:
        assert stats.kstest(values.double().numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3

    uniform(height * width / side**2, 0.08, 0.5)  # a crop of at most half of a large square always fits
    uniform((width / height).log(), float(np.log(3 / 4)), float(np.log(4 / 3)))
    uniform(top / (side - height), 0, 1)
    uniform(left / (side - width), 0, 1)
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)]):
        uniform(draws.factors[:, column], low, high)
    uniform(draws.sigma[draws.sigma > 0], 0.1, 2.0)
    for drawn, probability in (
        (draws.jitter, 0.8), (draws.gray, 0.2), (draws.sigma > 0, 0.5), (draws.solarize, 0.2), (draws.flip, 0.5),
    ):  # fmt: skip
        assert stats.binomtest(int(drawn.sum()), count, probability).pvalue > 1e-3
    _, counts = draws.order.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_crops_lie_inside_images_of_extreme_shapes() -> None:
    heights, widths = torch.tensor([2, 20, 4000, 1, 1, 300]), torch.tensor([3, 4000, 20, 1, 500, 200])
    for seed in range(50):
        top, left, height, width = draw(View(), heights, widths, 224, torch.Generator().manual_seed(seed)).box.unbind(1)
        assert (torch.stack([top, left]) >= 0).all()
        assert (torch.stack([height, width]) >= 1).all()
        assert (top + height <= heights).all()
        assert (left + width <= widths).all()


def test_the_contact_sheet(tmp_path: Path) -> None:
    main(["--data", "digits", "--image-size", "32", "--images", "4", "--out", str(tmp_path / "views.png")])
    with Image.open(tmp_path / "views.png") as sheet:
        assert sheet.width > 3 * 128  # an image and two views, each enlarged
        assert sheet.height > 4 * 128
    for wrong in (["--images", "0"], ["--image-size", "0"], ["--data", "nowhere"], ["--loader", "dali"]):
        with pytest.raises(UsageError, match=wrong[0]):
            main(["--data", "digits", "--out", str(tmp_path / "x.png"), *wrong])
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(UsageError, match=r"--out .*views\.xyz cannot be written"):
        main(["--data", "digits", "--image-size", "32", "--out", str(tmp_path / "views.xyz")])
