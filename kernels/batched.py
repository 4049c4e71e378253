"""The operations of ``augment_views`` on whole batches, on any device; defined by torchvision's v2 transforms.

Images are float32 [B, C, H, W] with 0 for black and 255 for white. Saturation, hue and grayscale need RGB and are
skipped for other numbers of bands. Grayscale images may keep C = 1 until they are normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .view_parameters import Drawn

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray (ITU-R BT.601)."""

_CACHED = 2**20  # values per chunk on a CPU: smaller chunks add call overhead, larger ones leave the cache
_LARGE = 2**17  # images with more values are changed one by one: gathering them costs more than separate calls
_ALL = 2**31  # images per chunk on a GPU
_BAND = 56  # rows or columns per block of the blur
_FEW = 16  # rows of a product below which a CPU's sums depend on the batch size


class Step(NamedTuple):
    """An operation on some images of a batch."""

    change_: Callable[[Tensor, Tensor], object]
    chosen: list[bool]
    """Whether to change each image, [B]; a list, because indexing tensors is slow compared with a small view."""
    parameter: Tensor
    """[B, ...], on the device of the images; the second argument of ``change_``."""


def recolour_(images: Tensor, drawn: Drawn, *, blur_radius: int) -> Tensor:
    """Apply the operations after crop and flip to [B, C, H, W] in place, to each image only those that were drawn."""
    planned = steps(drawn, images.shape[1], blur_radius, images.device)
    count = at_a_time(images[0].numel(), images.device)
    for start in range(0, len(images), count):
        carry_out_(planned, images[start : start + count], start)
    return images


def at_a_time(values: int, device: torch.device) -> int:
    """Images per chunk, for images of ``values`` values; on a CPU a chunk stays in the cache between operations."""
    if device.type != "cpu":
        return _ALL
    return 1 if values > _LARGE else max(1, _CACHED // values)


def steps(drawn: Drawn, channels: int, radius: int, device: torch.device) -> list[Step]:
    """The steps of :func:`recolour_` for a batch, in order."""
    factors = drawn.factors.to(device, non_blocking=True)
    kernel = gaussian(drawn.sigma.to(device, non_blocking=True), radius)
    planned = jitter(drawn.jitter, factors, drawn.order, channels)
    if channels == 3:
        planned.append(Step(saturation_, drawn.gray.tolist(), torch.zeros_like(factors[:, 0])))
    planned.append(Step(blur_, (drawn.sigma > 0).tolist(), kernel))
    planned.append(Step(lambda images, _: solarize_(images), drawn.solarize.tolist(), factors))
    return planned


def carry_out_(planned: Iterable[Step], images: Tensor, start: int = 0) -> None:
    """Apply the steps to images [N, C, H, W] in place; they are images ``start`` to ``start + N`` of the batch."""
    count = len(images)
    some = slice(start, start + count)
    for change_, chosen, parameter in planned:
        at = [i for i, mine in enumerate(chosen[some]) if mine]
        if len(at) == count:
            change_(images, parameter[some])
        elif at:
            index = torch.tensor(at, device="cpu").to(images.device, non_blocking=True)
            part = images.index_select(0, index)
            change_(part, parameter[some].index_select(0, index))
            images.index_copy_(0, index, part)


def crop(picture: Tensor, box: Sequence[int], flip: bool, size: int | Sequence[int], interpolation: str) -> Tensor:
    """Crop, resize with antialiasing, and flip one image, in its own dtype, on the CPU.

    Args:
        picture: uint8 or float32 [C, H, W].
        box: top, left, height and width in pixels.
        flip: whether to flip horizontally.
        size: S, or height and width.
        interpolation: ``"bilinear"`` or ``"bicubic"``.

    Returns:
        [1, C, H, W] of ``size``.
    """
    top, left, height, width = box
    part = picture[None, :, top : top + height, left : left + width]
    if part.dtype == torch.uint8 and part.stride(1) == 1:  # decoders' order, which torch would otherwise copy away
        part = part.contiguous(memory_format=torch.channels_last)
    resized = functional.interpolate(part, sides(size), mode=interpolation, antialias=True)
    return resized.flip(-1) if flip else resized


def crop_resize(pixels: Tensor, box: Tensor, flip: Tensor, size: int | Sequence[int], *, bicubic: bool) -> Tensor:
    """Crop, resize with antialiasing, and flip a batch, by one product with a weight matrix per side of each image.

    Args:
        pixels: uint8 [B, C, H, W].
        box: int64 [B, 4]: top, left, height and width in pixels.
        flip: bool [B], whether to flip horizontally.
        size: S, or height and width.
        bicubic: bicubic filter if true, otherwise bilinear.

    Returns:
        float32 [B, C, H, W] of ``size``, from 0 to 255.
    """
    box = box.to(pixels.device, non_blocking=True)
    flip = flip.to(pixels.device, non_blocking=True)
    height, width = sides(size)
    rows = _resize_weights(box[:, 0], box[:, 2], pixels.shape[-2], height, bicubic)
    columns = _resize_weights(box[:, 1], box[:, 3], pixels.shape[-1], width, bicubic)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    out = rows[:, None] @ pixels.float() @ columns[:, None].transpose(-1, -2)
    return out.clamp_(0, 255)  # the bicubic filter overshoots


def _resize_weights(start: Tensor, length: Tensor, source: int, size: int, bicubic: bool) -> Tensor:
    """Weights [B, size, source] of source pixels in output pixels; the filter widens as the image shrinks."""
    # In float32, whatever torch's default dtype, to which integers would be converted.
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size
    width = scale.clamp(min=1)
    at = torch.arange(source, dtype=torch.float32, device=start.device) - start  # from the crop's edge
    centre = (torch.arange(size, dtype=torch.float32, device=start.device)[None, :, None] + 0.5) * scale
    x = ((at + 0.5 - centre) / width).abs()
    if bicubic:  # Keys' filter with a = -1/2
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weight = (1 - x).clamp(min=0)
    weight = weight * ((at >= 0) & (at < length))
    return weight / weight.sum(dim=2, keepdim=True)


def jitter(chosen: Tensor, factors: Tensor, order: Tensor, channels: int) -> list[Step]:
    """The steps that change brightness, contrast, saturation and hue of the chosen images, each in its own order.

    Args:
        chosen: bool [B].
        factors: float32 [B, 4], on the device of the images.
        order: int64 [B, 4].
        channels: bands of the images; the last two changes need RGB.
    """
    changes = (brightness_, contrast_, saturation_, hue_) if channels == 3 else (brightness_, contrast_)
    return [
        Step(change_, (chosen & (place == column)).tolist(), factors[:, column])
        for place in order.unbind(1)
        for column, change_ in enumerate(changes)
    ]


def brightness_(images: Tensor, factor: Tensor) -> None:
    """Multiply [B, C, H, W] by ``factor`` [B], in place."""
    images.mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 255)


def contrast_(images: Tensor, factor: Tensor) -> None:
    """Multiply the difference of [B, C, H, W] from the image's mean gray by ``factor`` [B], in place."""
    factor = factor.view(-1, 1, 1, 1)
    mean = luma(images.mean(dim=(2, 3), keepdim=True))
    images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def saturation_(images: Tensor, factor: Tensor) -> None:
    """Multiply the difference of [B, 3, H, W] from the pixel's gray by ``factor`` [B], in place; 0 gives grayscale."""
    images.lerp_(luma(images), (1 - factor).view(-1, 1, 1, 1)).clamp_(0, 255)


def luma(images: Tensor) -> Tensor:
    """Gray [B, 1, H, W] of [B, C, H, W]: for RGB as in ITU-R BT.601, otherwise the mean of the bands."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def hue_(images: Tensor, shift: Tensor) -> None:
    """Shift the hue (of HSV) of [B, 3, H, W] by ``shift`` [B] turns of the colour circle, at most 1/3, in place.

    On a circle of circumference 6 with red at 0, green at 2 and blue at -2, a channel is ``low + chroma *
    clamp(2 - distance from its position, 0, 1)``. Solved for the hue, this is ``1 + (green + blue - red - low) /
    chroma``, positive towards green and negative towards blue. This form has no case distinctions, on which the usual
    conversion to HSV spends most of its time on a CPU.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    turned = (green + blue).sub_(red).sub_(low).div_(chroma.clamp(min=1e-5)).add_(1)
    turned = torch.copysign(turned, green - blue).add_(6 * shift.view(-1, 1, 1))
    for channel, place in ((red, 0), (green, 2), (blue, -2)):
        # | |difference| - 3 | equals 3 - distance for differences up to 6; up to 7 it exceeds 2, which clamps to 1 too.
        share = (turned - place).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
        torch.addcmul(low, chroma, share, out=channel)


def gaussian(sigma: Tensor, radius: int) -> Tensor:
    """Kernels [B, 2 * radius + 1] of Gaussians of ``sigma`` [B] pixels."""
    at = torch.arange(-radius, radius + 1, device=sigma.device) / sigma[:, None]
    # Beyond six sigmas the weights have no effect, and denormal numbers are twenty times slower on a CPU.
    kernel = (-0.5 * at**2).exp() * (at.abs() <= 6)
    return kernel / kernel.sum(dim=1, keepdim=True)


def blur_(images: Tensor, kernel: Tensor) -> None:
    """Convolve rows and columns of [B, C, H, W], reflected at the edges, with ``kernel`` [B, 2 * radius + 1], in place.

    The radius must be below H and W.
    """
    # Blocks of rows or columns are multiplied by a band matrix of the kernel. This is faster on a CPU than a depthwise
    # convolution; with small blocks, few products are with the zeros outside the band.
    count, channels, height, width = images.shape
    radius = kernel.shape[1] // 2
    padded = functional.pad(images, (0, 0, radius, radius), mode="reflect").flatten(0, 1)
    out, each = images.view(-1, height, width), _band(kernel, height).repeat_interleave(channels, dim=0)
    for start, n in _blocks(height):
        seen = n + 2 * radius
        out[:, start : start + n] = _product(each[:, :n, :seen], padded[:, start : start + seen], n, count)
    padded = functional.pad(images, (radius, radius, 0, 0), mode="reflect").flatten(1, 2)
    out, each = images.view(count, -1, width), _band(kernel, width).mT
    for start, n in _blocks(width):
        seen = n + 2 * radius
        out[..., start : start + n] = _product(padded[..., start : start + seen], each[:, :seen, :n], n, count)


def _band(kernel: Tensor, size: int) -> Tensor:
    """Band matrices [B, block, block + taps - 1]: each row has the kernel one column further to the right."""
    count, taps = kernel.shape
    block = min(size, _BAND)
    wide = block + taps - 1
    band = kernel.new_zeros(count, block, wide)
    band.as_strided((count, block, taps), (block * wide, wide + 1, 1)).copy_(kernel[:, None])
    return band


def _blocks(size: int) -> list[tuple[int, int]]:
    """Start and length of each block."""
    return [(start, min(_BAND, size - start)) for start in range(0, size, _BAND)]


def _product(left: Tensor, right: Tensor, n: int, count: int) -> Tensor:
    """Batched matrix products of ``n`` rows or columns, with the same bits for any number ``count`` of images.

    A CPU sums products of few rows in another order if there are several images; those are computed per image.
    """
    if n >= _FEW or left.device.type != "cpu":
        return torch.bmm(left, right)
    pairs = zip(left.chunk(count), right.chunk(count), strict=True)
    return torch.cat([torch.bmm(one, other) for one, other in pairs])


def solarize_(images: Tensor) -> None:
    """Invert values that round to 128 or more, in place; this is the minimum of a value and its inverse."""
    torch.minimum(images, 255 - images, out=images)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, out: Tensor) -> Tensor:
    """Write ``(images / 255 - mean) / std`` of [B, 1 or C, H, W] into ``out`` [B, C, H, W] of any dtype and strides."""
    work = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    height, width = images.shape[2:]
    mean_, std_ = _spread(mean, height, width, out.device), _spread(std, height, width, out.device)
    count = at_a_time(work[0].numel(), work.device)
    for source, part in zip(images.split(count), work.split(count), strict=True):
        part.copy_(source).sub_(mean_).div_(std_)  # converted first: mixed dtypes are not vectorised on a CPU
    return work if work is out else out.copy_(work)


@lru_cache(maxsize=32)  # because uploading host values makes the host wait for the GPU
def _spread(values: tuple[float, ...], height: int, width: int, device: torch.device) -> Tensor:
    """255 times a number per channel, expanded to [1, C, H, W]: broadcasting would run inner loops of only C
    elements."""
    channels = torch.tensor([255 * value for value in values], dtype=torch.float32, device=device).view(1, -1, 1, 1)
    return channels.expand(-1, -1, height, width).contiguous(memory_format=torch.channels_last)


def empty_views(
    count: int, size: int | Sequence[int], dtype: torch.dtype, device: torch.device, *, channels: int = 3
) -> Tensor:
    """An uninitialised tensor [B, C, H, W] in channels-last order; ``size`` is H = W, or (H, W)."""
    shape = (count, channels, *sides(size))
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of ``size``: the side of a square, or (height, width)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
