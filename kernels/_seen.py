"""A cache of values prepared for lists of tensors, valid while the tensors stay at their addresses.

It has no weak references to the tensors, because torch refuses to exchange a tensor that has one
(``torch.utils.swap_tensors``, with which a module may convert or move its parameters). So a tensor may be deleted
without notice, and its ``id`` and its address may be those of another one later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The guards of torch.compile: types, dtypes, sizes and strides of many tensors, compared in one call.
_GUARDS: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)

TENSORS = 1 << 14  # in the lists that are remembered: those of 50 ResNet-50s with their teachers

Lists = Sequence[Sequence[Tensor] | None]


class Forms:
    """The types, dtypes, devices, shapes and strides of tensors, to notice conversions. It holds no tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._types, self._forms = [*map(type, tensors)], _forms(tensors)
        self._alike = _GUARDS and _GUARDS(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def fit(self, tensors: list[Tensor]) -> bool:
        """Whether these tensors have the same forms."""
        if len(tensors) != len(self._types):
            return False
        if self._alike is not None and self._alike(*tensors):
            return True
        # The guards also fail if a tensor is listed twice or now requires grad, so each tensor is compared by itself.
        return [*map(type, tensors)] == self._types and _forms(tensors) == self._forms


def _forms(tensors: list[Tensor]) -> list[Any]:
    return [(tensor.dtype, tensor.device, tensor.shape, tensor.stride()) for tensor in tensors]


class Places(Forms):
    """The forms of tensors and their addresses, to notice moves too."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(tensors)
        self._addresses = [*map(Tensor.data_ptr, tensors)]

    def fit(self, tensors: list[Tensor]) -> bool:
        """Whether these tensors have the same forms and addresses."""
        return super().fit(tensors) and [*map(Tensor.data_ptr, tensors)] == self._addresses


class _Entry(NamedTuple):
    prepared: Any
    size: int
    places: Places


class Seen:
    """Prepared values of the last lists, by the number of tensors and the first tensors."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry] = {}

    def find(self, kind: str | None, lists: Lists) -> Any:
        """The value prepared for these lists if their tensors have not moved, otherwise None."""
        entry = self._entries.get(_key(kind, lists))
        return entry.prepared if entry is not None and entry.places.fit(_joined(lists)) else None

    def keep(self, kind: str | None, lists: Lists, prepared: Any) -> None:
        """Store a prepared value, which must not hold references to the tensors."""
        key, tensors = _key(kind, lists), _joined(lists)
        self._entries.pop(key, None)
        known = [(old, entry.size) for old, entry in [*self._entries.items()]]
        excess = len(tensors) + sum(count for _, count in known) - TENSORS
        for old, count in known:  # the oldest first
            if excess <= 0:
                break
            self._entries.pop(old, None)
            excess -= count
        self._entries[key] = _Entry(prepared, len(tensors), Places(tensors))


def _key(kind: str | None, lists: Lists) -> tuple[Any, ...]:
    return kind, *(None if tensors is None else (len(tensors), *map(id, tensors[:1])) for tensors in lists)


def _joined(lists: Lists) -> list[Tensor]:
    joined: list[Tensor] = []
    for tensors in lists:
        joined += tensors or ()
    return joined
