"""A cache of values prepared for lists of tensors, valid while the tensors stay at their addresses."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# The guards of torch.compile: types, dtypes, sizes and strides of many tensors, compared in one call.
_GUARDS: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)

Lists = Sequence[Sequence[Tensor] | None]


def places(tensors: Sequence[Tensor]) -> list[Any]:
    """The addresses of tensors, to detect moves."""
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.stride, tensors), *map(Tensor.numel, tensors)]


class _Entry:
    def __init__(self, prepared: Any, tensors: list[Tensor], forget: Callable[[object], object]) -> None:
        self.prepared = prepared
        self.ids, self.places = [*map(id, tensors)], places(tensors)
        self.addresses = self.places[: len(tensors)]
        self.alike = _GUARDS and _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        self.refs = [weakref.ref(tensor, forget) for tensor in tensors]

    def fits(self, tensors: list[Tensor]) -> bool:
        if self.alike is not None and self.alike(*tensors):
            return [*map(Tensor.data_ptr, tensors)] == self.addresses
        # The guards also fail if a tensor is listed twice or now requires grad, so each tensor is compared by itself.
        return [*map(id, tensors)] == self.ids and places(tensors) == self.places


class Seen:
    """Prepared values, by the number of tensors and the first tensors; they are deleted with their tensors."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, kind: str | None, lists: Lists) -> Any:
        """The value prepared for these lists if their tensors have not moved, otherwise None."""
        entry = self._entries.get(_key(kind, lists))
        return entry.prepared if entry is not None and entry.fits(_joined(lists)) else None

    def keep(self, kind: str | None, lists: Lists, prepared: Any) -> None:
        """Store a prepared value, which must not hold references to the tensors."""
        key = _key(kind, lists)
        self._entries[key] = _Entry(prepared, _joined(lists), lambda _: self._entries.pop(key, None))


def _key(kind: str | None, lists: Lists) -> tuple[Any, ...]:
    return kind, *(None if tensors is None else (len(tensors), *map(id, tensors[:1])) for tensors in lists)


def _joined(lists: Lists) -> list[Tensor]:
    joined: list[Tensor] = []
    for tensors in lists:
        joined += tensors or ()
    return joined
