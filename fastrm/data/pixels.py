"""Splits the items of a Dataset into image and label, and reads the values of the image."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastrm.data.decode import BrokenImage, check_drawn, told
from fastrm.data.stored import Values, checked, values_of

_IMAGE_KEYS = ("image", "img")
LABEL_KEY = "label"


class Item(NamedTuple):
    """An item of a Dataset."""

    image: Any
    label: Any
    """The label, or None."""


def parted(item: Any) -> Item:
    """Split an item: an image, (image, label), (image, label, …), or a dict with ``image`` and ``label``.

    Raises:
        BrokenImage: it is a dict without an image, or an empty tuple.
    """
    if isinstance(item, Mapping):
        key = next((key for key in _IMAGE_KEYS if key in item), None)
        if key is None:
            raise BrokenImage(
                f"it is a dict of {', '.join(map(str, item))} without the key image; give an image, or (image, label)"
            )
        return Item(item[key], item.get(LABEL_KEY))
    if isinstance(item, tuple | list):
        if not item:
            raise BrokenImage(f"it is an empty {type(item).__name__}; give an image, or (image, label)")
        return Item(item[0], item[1] if len(item) > 1 else None)
    return Item(item, None)


def whole_number(label: Any) -> int | None:
    """A label as an int; None if it is not a single whole number."""
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def values_in(image: Any, channels: int | None = None) -> Values:
    """The values [H, W, bands] of an image object, in their own dtype.

    Transparency is dropped: that of PIL images, and the second or fourth band of uint8 tensors and arrays.

    Args:
        image: a PIL image; or a tensor [C, H, W] or [H, W], or an array [H, W, C] or [H, W].
        channels: number of uint8 bands that have no transparency.

    Raises:
        BrokenImage: it is another object; the message says which.
    """
    if isinstance(image, Image.Image):
        return values_of(image)
    with told():
        values = checked(_planes(image).transpose(1, 2, 0))
        if values.dtype == np.uint8 and values.shape[2] in (2, 4) and values.shape[2] != channels:
            check_drawn(values)
            return values[..., :-1]
        return values


def _planes(image: Any) -> NDArray[Any]:
    """The values [C, H, W] of a tensor or an array."""
    if isinstance(image, Tensor):
        values, kind, order, turned = array_of(image), "tensor", "[C, H, W]", "permute(2, 0, 1)"
    elif isinstance(image, np.ndarray):
        values, kind, order, turned = image, "array", "[H, W, C]", "transpose(1, 2, 0)"
    else:
        meant = ""
        if isinstance(image, str | Path):
            meant = ", or give a list of paths"
        elif isinstance(image, list | tuple):  # as from a transform of another library that makes views
            meant = "; if it holds views, leave this transform out of the Dataset and give it as the augmentation"
        raise BrokenImage(
            f"it is a {type(image).__name__}; it must be a PIL image, a tensor [C, H, W] or an array [H, W, C]{meant}"
        )
    if values.ndim == 2:
        return values[None]
    if values.ndim != 3 or 0 in values.shape:
        raise BrokenImage(f"it is a {kind} of shape {list(image.shape)}; it must be {order}, not empty")
    first, last = values.shape[0], values.shape[2]
    channels, other = (first, last) if kind == "tensor" else (last, first)
    if channels > 4 and other in (1, 3, 4):
        raise BrokenImage(f"it is a {kind} of shape {list(image.shape)}; it must be {order}: {turned} makes it so")
    return values if kind == "tensor" else values.transpose(2, 0, 1)


def digest(image: Any) -> bytes:
    """A digest of 16 bytes of the kind, shape and values of an image. Raises like :func:`values_in`."""
    found = blake2b(type(image).__name__.encode(), digest_size=16)
    with told():
        if isinstance(image, Image.Image):
            found.update(f"{image.mode} {image.size}".encode() + image.tobytes())
        elif isinstance(image, Tensor | np.ndarray):
            values = array_of(image)
            found.update(f"{values.dtype} {values.shape}".encode() + values.tobytes())
    return found.digest()


def array_of(image: Tensor | NDArray[Any]) -> NDArray[Any]:
    """The values of a tensor or an array."""
    if isinstance(image, np.ndarray):
        return image
    held = image.detach().as_subclass(Tensor).cpu()
    array: NDArray[Any] = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
    return array
