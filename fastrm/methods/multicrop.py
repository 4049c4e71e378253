"""Views of several sizes: which of them are large, and how they go through a network."""

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
    """How many views are large: two of two, whatever their sizes, and of more those with the most pixels."""
    pixels = [height * width for height, width in sizes]
    return len(pixels) if len(pixels) <= 2 else pixels.count(max(pixels))


def large_first(views: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Views with the large ones in front, otherwise in their order, and how many are large."""
    count = large([(view.shape[2], view.shape[3]) for view in views])
    if count == len(views):
        return list(views), count
    return sorted(views, key=lambda view: -view.shape[2] * view.shape[3]), count


def encoded(encode: Callable[[Tensor], E], views: Sequence[Tensor], which: Sequence[int]) -> dict[int, E]:
    """What a network says of some of the views, by their place.

    Of more than two, those of one size go through together, and BatchNorm sees them together, as multi-crop was
    published (SwAV, DINO). Of two each goes through by itself, as MoCo and BYOL were published.

    Args:
        encode: from images [B, C, H, W] to a dataclass of tensors [B, …].
        views: all of them.
        which: the places of those that the network sees, in the order in which it sees them.
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
    """The encodings of so many views, of that of all of them."""
    columns = {field.name: getattr(encoding, field.name).chunk(count) for field in fields(encoding)}
    return [replace(encoding, **{name: parts[i] for name, parts in columns.items()}) for i in range(count)]
