"""Multi-crop: finds the large ones among views of several sizes, and encodes views of one size together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

E = TypeVar("E")

Size = tuple[int, int]
"""Height and width."""


def large(sizes: Sequence[Size]) -> int:
    """Number of large views: all if there are at most two, otherwise those with the most pixels."""
    pixels = [height * width for height, width in sizes]
    return len(pixels) if len(pixels) <= 2 else pixels.count(max(pixels))


def large_first(views: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The views with the large ones first, otherwise in order, and the number of large ones."""
    count = large([(view.shape[2], view.shape[3]) for view in views])
    if count == len(views):
        return list(views), count
    return sorted(views, key=lambda view: -view.shape[2] * view.shape[3]), count


def encoded(encode: Callable[[Tensor], E], views: Sequence[Tensor], which: Sequence[int]) -> dict[int, E]:
    """The encodings of some views, by index.

    If there are more than two views, views of one size are encoded, and seen by BatchNorm, as one batch, as in SwAV
    and DINO. Two views are encoded separately, as in MoCo and BYOL.

    Args:
        encode: function from images [B, C, H, W] to a dataclass of tensors [B, …].
        views: all views, [B, C, H, W] each.
        which: indices of the views to encode, in this order.
    """
    groups: dict[Any, list[int]] = {}
    for i in which:
        groups.setdefault(i if len(views) == 2 else views[i].shape, []).append(i)
    found: dict[int, E] = {}
    for group in groups.values():
        if len(group) == 1:
            found[group[0]] = encode(views[group[0]])
        else:
            found |= zip(group, _parts(encode(torch.cat([views[i] for i in group])), len(group)), strict=True)
    return found


def _parts(encoding: Any, count: int) -> list[Any]:
    """Split the encoding of ``count`` concatenated views."""
    columns = {field.name: getattr(encoding, field.name).chunk(count) for field in fields(encoding)}
    return [replace(encoding, **{name: parts[i] for name, parts in columns.items()}) for i in range(count)]
