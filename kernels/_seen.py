"""A cache of values prepared for lists of tensors, valid while the tensors stay at their addresses.

It has no weak references to the tensors, because torch refuses to exchange a tensor that has one
(``torch.utils.swap_tensors``, with which a module may convert or move its parameters). So a tensor may be deleted
without notice, and its ``id`` and its address may be those of another one later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# The guards of torch.compile: types, dtypes, sizes and strides of many tensors, compared in one call.
_GUARDS: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)

TENSORS = 1 << 14  # in the lists that are remembered: those of 50 ResNet-50s with their teachers

Lists = Sequence[Sequence[Tensor] | None]


def places(tensors: Sequence[Tensor]) -> list[Any]:
    """The addresses of tensors, to detect moves."""
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors), *map(Tensor.numel, tensors)]


class _Entry:
    def __init__(self, prepared: Any, tensors: list[Tensor]) -> None:
        self.prepared = prepared
        self.types, self.forms, self.places = [*map(type, tensors)], _forms(tensors), places(tensors)
        self.addresses = self.places[: len(tensors)]
        self.alike = _GUARDS and _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def fits(self, tensors: list[Tensor]) -> bool:
        if self.alike is not None and self.alike(*tensors):
            return [*map(Tensor.data_ptr, tensors)] == self.addresses
        # The guards also fail if a tensor is listed twice or now requires grad, so each tensor is compared by itself.
        alike = [*map(type, tensors)] == self.types and _forms(tensors) == self.forms
        return alike and places(tensors) == self.places


def _forms(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.device, tensor.shape) for tensor in tensors]


class Seen:
    """Prepared values of the last lists, by the number of tensors and the first tensors."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def find(self, kind: str | None, lists: Lists) -> Any:
        """The value prepared for these lists if their tensors have not moved, otherwise None."""
        entry = self._entries.get(_key(kind, lists))
        return entry.prepared if entry is not None and entry.fits(_joined(lists)) else None

    def keep(self, kind: str | None, lists: Lists, prepared: Any) -> None:
        """Store a prepared value, which must not hold references to the tensors."""
        key, tensors = _key(kind, lists), _joined(lists)
        self._entries.pop(key, None)
        known = [(old, len(entry.types)) for old, entry in [*self._entries.items()]]
        excess = len(tensors) + sum(count for _, count in known) - TENSORS
        for old, count in known:  # the oldest first
            if excess <= 0:
                break
            self._entries.pop(old, None)
            excess -= count
        self._entries[key] = _Entry(prepared, tensors)


def _key(kind: str | None, lists: Lists) -> tuple[Any, ...]:
    return kind, *(None if tensors is None else (len(tensors), *map(id, tensors[:1])) for tensors in lists)


def _joined(lists: Lists) -> list[Tensor]:
    joined: list[Tensor] = []
    for tensors in lists:
        joined += tensors or ()
    return joined
