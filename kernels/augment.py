"""The augmentation of views in few launches: crop, flip, colour changes, grayscale, blur, solarize, normalise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _augment, batched
from .dispatch import check_no_grad, check_strided, choose, no_autocast
from .view_parameters import OP, Drawn, ViewParameters, completed

_TINY = 2**11  # images with fewer values are cropped together: a call per image would take longer
_INPUTS = (torch.uint8, torch.float32)
_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the kernels write."""


@dataclass(frozen=True)
class Work:
    """The checked arguments of a call."""

    images: Tensor
    """[N, H, W, C]."""
    index: Tensor | None
    """[B] indices of images, on the CPU; None for all in order."""
    drawn: Drawn
    out: Tensor
    """[B, C, H, W], channels last."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bicubic: bool
    radius: int
    """Radius of the blur in pixels."""


def _planes(work: Work) -> Tensor:
    """The images of the batch [B, C, H, W]."""
    planes = work.images.permute(0, 3, 1, 2)
    if work.index is None:
        return planes
    return planes.index_select(0, work.index.to(planes.device, non_blocking=True))


def _flipped(planes: Tensor, flip: Tensor) -> Tensor:
    """A contiguous float32 copy [B, C, H, W], with the chosen images flipped."""
    images = planes.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    if flip.any():
        at = flip.nonzero()[:, 0].to(images.device)
        images.index_copy_(0, at, images.index_select(0, at).flip(-1))
    return images


def _finish(work: Work, images: Tensor) -> None:
    batched.recolour_(images, work.drawn, blur_radius=work.radius)
    batched.normalise(images, work.mean, work.std, out=work.out)


@torch.no_grad()
def _reference(work: Work) -> None:
    """Apply one operation after the other to the whole batch."""
    planes, drawn = _planes(work), work.drawn
    if drawn.unchanged():
        batched.normalise(planes, work.mean, work.std, out=work.out)
        return
    if drawn.box is None:
        images = _flipped(planes, drawn.flip)
    else:
        images = batched.crop_resize(planes, drawn.box, drawn.flip, work.out.shape[2:], bicubic=work.bicubic)
    _finish(work, images)


@torch.no_grad()
def _cpu(work: Work) -> None:
    """Crop each image in uint8, then process as many images at a time as fit into the cache."""
    drawn, (count, _, height, width) = work.drawn, work.out.shape
    if drawn.box is None or work.images[0].numel() < _TINY:
        return _reference(work)
    interpolation = "bicubic" if work.bicubic else "bilinear"
    images = torch.empty(count, work.images.shape[3], height, width, dtype=torch.float32, device="cpu")
    places = range(count) if work.index is None else work.index.tolist()
    pixels = work.images.permute(0, 3, 1, 2)
    for row, at, box, flip in zip(images, places, drawn.box.tolist(), drawn.flip.tolist(), strict=True):
        row.copy_(batched.crop(pixels[at], box, flip, (height, width), interpolation)[0])
    _finish(work, images)


def _triton(work: Work) -> None:
    if work.out.dtype not in _OUTPUTS or not _augment.launch(work):
        _reference(work)


_IMPLEMENTATIONS = {"triton": _triton, "cpu": _cpu, "reference": _reference}


def augment_views(
    images: Tensor,
    parameters: ViewParameters,
    *,
    out_size: int | Sequence[int],
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float],
    std: Sequence[float],
    index: Tensor | None = None,
    interpolation: str = "bilinear",
    blur_radius: int | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Make a view of each image: crop, flip, colour changes in any order, grayscale, blur, solarize, normalise.

    Each operation equals torchvision's v2 functional transform of that name (``resized_crop`` with antialiasing,
    ``adjust_brightness``, ``adjust_contrast``, ``adjust_saturation``, ``adjust_hue``, ``rgb_to_grayscale``,
    ``gaussian_blur``, ``solarize`` at 128, ``normalize``), computed in float32 without rounding to bytes in between.
    Images without exactly three bands get no saturation, hue and grayscale; their contrast uses the mean of the bands.

    On a GPU, at most two launches make views of up to 64 pixels, and three make larger ones. Images are read once
    (twice for the contrast of larger views), views are written once, and the bits are the same each time. One table of
    parameters is uploaded, and the host does not wait. The blur is computed in fp16, with an error of at most 0.2 on
    the scale from 0 to 255. Views over 64 pixels with a blur radius over 24 pixels are left to the reference.

    Args:
        images: uint8, or float32 with white at 255: crops [B, H, W, C] of ``out_size``; or, with ``parameters.box``,
            whole images [B, H, W, C] of one size. Any strides are allowed: for [B, C, H, W], pass ``x.permute(0, 2, 3,
            1)``.
        parameters: parameters of the operations per image.
        out_size: side of the views, or their height and width, in pixels.
        dtype: dtype of the views; the kernels write ``torch.float32``, ``torch.bfloat16`` and ``torch.float16``.
        mean, std: mean to subtract and standard deviation to divide by per channel, for values from 0 to 1. Several
            channels are allowed for images with one band, which is then repeated.
        index: int64 [B] on the CPU; view i is made from ``images[index[i]]``, of whole images [N, H, W, C].
        interpolation: ``"bilinear"`` or ``"bicubic"``.
        blur_radius: taps of the blur on each side of a pixel; torchvision's ``kernel_size`` is ``2 * blur_radius + 1``.
            None for three times the largest standard deviation.
        out: a tensor to write, [B, C, H, W] of ``dtype`` in channels-last order.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        Views [B, C, H, W] in channels-last order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number does not fit, or the backend is not available. Then
            nothing is written.
    """
    check_strided(OP, "images", images)
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"{OP}: images has shape {tuple(images.shape)}; it must be [B, H, W, C]")
    if images.dtype not in _INPUTS:
        raise TypeError(f"{OP}: images is {images.dtype}; it must be torch.uint8 or torch.float32")
    check_no_grad(OP, "images", images)
    height, width = _sides(out_size)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{OP}: dtype is {dtype}; it must be a floating one")
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"{OP}: interpolation={interpolation!r}; it must be 'bilinear' or 'bicubic'")
    if index is not None:
        _check_index(index, len(images))
    count = len(images) if index is None else len(index)
    drawn = completed(parameters, count)
    shape = tuple(images.shape[1:3])
    if drawn.box is None and shape != (height, width):
        raise ValueError(
            f"{OP}: images are {shape[0]}x{shape[1]} and out_size is {height}x{width}; without a box they must agree"
        )
    if drawn.box is not None:
        _check_boxes(drawn.box, *shape)
    numbers = _numbers("mean", mean), _numbers("std", std)
    channels = len(numbers[0])
    if not channels or len(numbers[1]) != channels or images.shape[3] not in (1, channels):
        raise ValueError(
            f"{OP}: mean has {channels} numbers, std {len(numbers[1])}, and images {images.shape[3]} bands; "
            "it must be as many of each"
        )
    if not all(map(math.isfinite, (*numbers[0], *numbers[1]))) or 0 in numbers[1]:
        raise ValueError(f"{OP}: mean is {numbers[0]} and std {numbers[1]}; they must be finite, and std not 0")
    widest = float(drawn.sigma.max()) if count else 0.0
    if blur_radius is not None and not isinstance(blur_radius, int):
        raise TypeError(f"{OP}: blur_radius={blur_radius!r}; it must be a whole number")
    radius = max(1, math.ceil(3 * widest)) if blur_radius is None else blur_radius
    if widest > 0 and not 0 < radius < min(height, width):
        raise ValueError(
            f"{OP}: blur_radius={radius}, of a largest sigma of {widest:g}; it must be at least 1 and below the "
            f"{min(height, width)} pixels of a view"
        )
    wanted = (count, channels, height, width)
    if out is None:
        out = batched.empty_views(count, (height, width), dtype, images.device, channels=channels)
    elif not isinstance(out, Tensor):
        raise TypeError(f"{OP}: out is a {type(out).__name__}; it must be a tensor")
    elif (tuple(out.shape), out.dtype, out.device) != (wanted, dtype, images.device) or not out.is_contiguous(
        memory_format=torch.channels_last
    ):
        raise ValueError(
            f"{OP}: out is {out.dtype} {tuple(out.shape)} of strides {out.stride()} on {out.device}; it must be "
            f"{dtype} {wanted} in channels-last order on {images.device}"
        )
    run = choose(OP, backend, _IMPLEMENTATIONS, images.device)
    if count:
        with no_autocast(images.device):
            run(Work(images, index, drawn, out, *numbers, interpolation == "bicubic", radius))
    return out


def _sides(out_size: int | Sequence[int]) -> tuple[int, int]:
    pair = isinstance(out_size, Sequence) and len(out_size) == 2
    found = batched.sides(out_size) if isinstance(out_size, int) or pair else ()
    if not found or not all(isinstance(side, int) and 0 < side <= 2**14 for side in found):
        raise ValueError(f"{OP}: out_size={out_size!r}; it must be one or two whole numbers from 1 to {2**14}")
    return found


def _numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError):
        raise TypeError(f"{OP}: {name}={values!r}; it must be a sequence of numbers, one per channel") from None


def _check_index(index: Tensor, count: int) -> None:
    check_strided(OP, "index", index)
    if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32) or index.device.type != "cpu":
        raise ValueError(
            f"{OP}: index is {index.dtype} {tuple(index.shape)} on {index.device}; it must be int64 [B] on the CPU"
        )
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < count):
        raise ValueError(f"{OP}: index goes from {int(index.min())} to {int(index.max())}; there are {count} images")


def _check_boxes(box: Tensor, height: int, width: int) -> None:
    top, left, high, wide = box.long().unbind(1)
    inside = (top >= 0) & (left >= 0) & (high > 0) & (wide > 0) & (top + high <= height) & (left + wide <= width)
    if not inside.all():
        wrong = box[int(inside.logical_not().nonzero()[0, 0])].tolist()
        raise ValueError(
            f"{OP}: box has {wrong} (top, left, height, width), which is not within {height}x{width} pixels"
        )
