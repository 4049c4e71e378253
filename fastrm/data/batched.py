"""The operations of a view on a batch at once, on any device; defined by torchvision's v2 functional transforms.

Images are float32 [B, C, H, W] in [0, 1]. A gray picture may stay at C = 1 all the way: saturation, hue and grayscale
leave it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrm.data.draws import Draws

_CACHED = 2**18  # values that a CPU core keeps at hand
_LUMA = (0.2989, 0.587, 0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


def carry_out(pixels: Tensor, draws: Draws, *, image_size: int, bicubic: bool, blur_radius: int) -> Tensor:
    """Return the view that was drawn, before it is normalised.

    Args:
        pixels: uint8 [B, C, H, W], C 1 or 3.
        draws: of the same B images.
        image_size: S, in pixels.
        bicubic: how the crop is resized; bilinear otherwise.
        blur_radius: taps of the blur on each side.

    Returns:
        float32 [B, C, S, S] in [0, 1], on the device of ``pixels``.
    """
    images = crop_resize(pixels, draws.box, draws.flip, image_size, bicubic=bicubic)
    return recolour_(images, draws, blur_radius=blur_radius)


def recolour_(images: Tensor, draws: Draws, *, blur_radius: int) -> Tensor:
    """Carry out in place, on [B, C, S, S], all that follows the crop and the flip, only where it was drawn."""
    # On a CPU a few at a time, so that they stay in its cache between the operations.
    count = max(1, _CACHED // images[0].numel()) if images.device.type == "cpu" else len(images)
    for start in range(0, len(images), count):
        _recolour_(images[start : start + count], draws.part(slice(start, start + count)), blur_radius)
    return images


def _recolour_(images: Tensor, draws: Draws, radius: int) -> None:
    _replace(images, draws.jitter, lambda part, at: jitter(part, draws.factors[at], draws.order[at]))
    if images.shape[1] == 3:
        _replace(images, draws.gray, lambda part, at: grayscale(part))
    _replace(images, draws.sigma > 0, lambda part, at: blur(part, draws.sigma[at], radius))
    _replace(images, draws.solarize, lambda part, at: solarize(part))


def _replace(images: Tensor, mask: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change the images that the mask, on the CPU, chooses."""
    at = mask.nonzero()[:, 0]
    if len(at) == len(images):
        images.copy_(change(images, at))
    elif len(at):
        index = at.to(images.device, non_blocking=True)
        images.index_copy_(0, index, change(images.index_select(0, index), at))


def crop_resize(pixels: Tensor, box: Tensor, flip: Tensor, size: int, *, bicubic: bool) -> Tensor:
    """Crop, resize with antialiasing, and flip: each image between a weight matrix for rows and one for columns.

    Args:
        pixels: uint8 [B, C, H, W].
        box: int64 [B, 4]: top, left, height, width.
        flip: bool [B].
        size: S.
        bicubic: or bilinear.

    Returns:
        float32 [B, C, S, S] in [0, 1].
    """
    box = box.to(pixels.device, non_blocking=True)
    flip = flip.to(pixels.device, non_blocking=True)
    rows = _resize_weights(box[:, 0], box[:, 2], pixels.shape[-2], size, bicubic)
    columns = _resize_weights(box[:, 1], box[:, 3], pixels.shape[-1], size, bicubic)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    out = rows[:, None] @ (pixels.float() / 255) @ columns[:, None].transpose(-1, -2)
    return out.clamp_(0, 1)  # a bicubic overshoots


def _resize_weights(start: Tensor, length: Tensor, source: int, size: int, bicubic: bool) -> Tensor:
    """Weights [B, size, source] of each source pixel in each output pixel; the filter widens as the picture shrinks."""
    scale = length[:, None, None] / size
    width = scale.clamp(min=1)
    at = torch.arange(source, device=start.device) - start[:, None, None]  # from the crop's edge
    centre = (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    x = ((at + 0.5 - centre) / width).abs()
    if bicubic:  # Keys' filter with a = -1/2
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    else:
        weight = (1 - x).clamp(min=0)
    weight = weight * ((at >= 0) & (at < length[:, None, None]))
    return weight / weight.sum(dim=2, keepdim=True)


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, each image in its own order.

    Args:
        images: float32 [B, C, H, W].
        factors: float32 [B, 4], on the CPU.
        order: int64 [B, 4], on the CPU.
    """
    for place in range(4):
        kind = order[:, place]
        factor = factors.gather(1, kind[:, None])[:, 0]
        blended = kind != _HUE
        if images.shape[1] == 1:
            blended &= kind != _SATURATION
        else:
            turned = (~blended).nonzero()[:, 0]
            index, shift = (t.to(images.device, non_blocking=True) for t in (turned, factor[turned]))
            images = images.index_copy(0, index, hue(images.index_select(0, index), shift))
        images = _blend(images, kind, torch.where(blended, factor, 1.0))
    return images


def _blend(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """Move each image away from black, its mean gray or its own gray: brightness, contrast or saturation."""
    kind, factor = (t.to(images.device, non_blocking=True)[:, None, None, None] for t in (kind, factor))
    gray = luma(images)
    base = gray * (kind == _SATURATION) + gray.mean(dim=(2, 3), keepdim=True) * (kind == _CONTRAST)
    return torch.lerp(base.expand_as(images), images, factor).clamp_(0, 1)


def luma(images: Tensor) -> Tensor:
    """Gray [B, 1, H, W] of [B, C, H, W]."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue


def grayscale(images: Tensor) -> Tensor:
    """Gray pictures of unchanged shape."""
    return luma(images).expand_as(images)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of [B, 3, H, W] by shares [B] of the colour circle, at the same HSV saturation and value."""
    red, green, blue = images.unbind(1)
    value, low = images.amax(dim=1), images.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sector = sector + 6 * shift[:, None, None]
    distance = [(sector + n).remainder(6) for n in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in distance], dim=1)


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur [B, C, S, S] by Gaussians of ``sigma`` [B] pixels, reflected at the edges; ``radius`` must be below S."""
    size = images.shape[-1]
    tap = torch.arange(-radius, radius + 1, device=images.device)
    sigma = sigma.to(images.device, non_blocking=True)
    kernel = (-0.5 * (tap / sigma[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    at = (torch.arange(size, device=images.device)[:, None] + tap).abs()
    at = torch.where(at >= size, 2 * (size - 1) - at, at)  # [S, taps]
    # A matrix product for rows and one for columns: at the sizes of sets that fit in memory faster than a convolution.
    matrix = images.new_zeros(len(images), size, size)
    matrix.scatter_add_(2, at.expand(len(images), -1, -1), kernel[:, None].expand(-1, size, -1))
    return matrix[:, None] @ images @ matrix[:, None].transpose(-1, -2)


def solarize(images: Tensor) -> Tensor:
    """Invert what rounds to 128 of 255 or more."""
    return torch.where(images >= 127.5 / 255, 1 - images, images)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """float32 [B, 3, H, W] in channels-last order, from [B, 1 or 3, H, W]."""
    shape = (1, 3, 1, 1)
    centre, spread = (images.new_tensor(values).view(shape) for values in (mean, std))
    return ((images - centre) / spread).contiguous(memory_format=torch.channels_last)
