"""The view of an image in an evaluation."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from fastrm.data.formats import RGB, PixelFormat

_LONG = 16  # ratio of the sides up to which the whole image is resized; of longer images only the visible part
_SQUARED = 64  # side of a view in pixels up to which the whole image is visible


def eval_view(pixels: Tensor, image_size: int, format: PixelFormat = RGB) -> Tensor:
    """The usual evaluation view: resize the shorter side to 256/224 of the size and take the centre; small views show
    the whole image.

    Args:
        pixels: [C, H, W] as ``format`` fits them, of any shape; memory is bounded by the image and the view.
        image_size: side S of the view; up to 64, the whole image is visible, as a square.
        format: format of the pixels.

    Returns:
        float32 [channels, S, S], normalised by the format's mean and standard deviation.
    """
    part_seen = _squared if image_size <= _SQUARED else _centre
    seen = [functional.to_image(part_seen(part, image_size)) for part in _parts(pixels)]
    scaled = torch.cat([functional.to_dtype(part, torch.float32, scale=True) for part in seen])
    if not format.bytes:
        scaled = scaled / 255
    views = scaled.expand(format.channels, -1, -1)
    return functional.normalize(views, list(format.mean), list(format.std))


def seen_of(height: int, width: int, image_size: int) -> tuple[float, float, float, float]:
    """The part of an image of this size that :func:`eval_view` shows: top, left, bottom and right, in pixels."""
    if image_size <= _SQUARED:
        return 0, 0, height, width
    high, wide = (int(_short(image_size) * side / min(height, width)) for side in (height, width))
    top, left = (round((side - image_size) / 2) for side in (high, wide))
    y, x = height / high, width / wide
    return top * y, left * x, (top + image_size) * y, (left + image_size) * x


def _short(image_size: int) -> int:
    """The target size of the shorter side."""
    return round(image_size * 256 / 224)


def _parts(pixels: Tensor) -> list[Image.Image]:
    """The images that Pillow resizes at once: RGB in uint8, or one band."""
    arrays = pixels.numpy()
    if pixels.dtype == torch.uint8 and len(arrays) == 3:
        return [Image.fromarray(np.ascontiguousarray(arrays.transpose(1, 2, 0)))]
    return [Image.fromarray(np.ascontiguousarray(band)) for band in arrays]


def _squared(picture: Image.Image, size: int) -> Image.Image:
    if picture.height > _LONG * picture.width:  # resizing rows last would build all rows at this width
        picture = picture.resize((picture.width, size), Image.Resampling.BILINEAR)
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def _centre(picture: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side is somewhat longer than ``size``, and take the centre, as torchvision does."""
    width, height = picture.size
    if max(width, height) <= _LONG * min(width, height):
        return functional.center_crop(functional.resize(picture, [_short(size)], antialias=True), [size])
    # Only the visible pixels: the whole image, if it is one pixel wide, would be 256 times as long.
    top, left, bottom, right = seen_of(height, width, size)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
