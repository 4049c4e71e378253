"""DTensors (FSDP2, tensor parallelism) and fake tensors.

An elementwise update of a DTensor is the update of its local part, if its partners are sharded alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

PLAIN = {Tensor, torch.nn.Parameter}


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a fake tensor, with a shape but without elements."""
    return isinstance(tensor, FakeTensor)


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor; does not import torch.distributed.tensor, which is slow."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def all_plain(tensors: Iterable[Any]) -> bool:
    """Whether none of ``tensors`` is a DTensor or a fake tensor; this check is fast."""
    kinds = set(map(type, tensors)) - PLAIN
    return not any(issubclass(kind, FakeTensor) or kind.__name__ == "DTensor" for kind in kinds)


def local(tensor: Any) -> Any:
    """The local part of a DTensor; any other tensor unchanged."""
    # Not to_local(), which returns a new object at each call: prepared values are cached by the identity of tensors.
    return tensor._local_tensor if is_sharded(tensor) else tensor


def rebuilt(part: Tensor, like: Tensor) -> Tensor:
    """A tensor with the local part ``part``, sharded like ``like``."""
    if not is_sharded(like):
        return part
    spec: Any = like
    return type(spec).from_local(
        part, spec.device_mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride()
    )


def check_alike(op: str, **row: Tensor | None) -> None:
    """Raise if one of the named tensors is a DTensor and another is not sharded like it."""
    (name, first), *others = [(name, tensor) for name, tensor in row.items() if tensor is not None]
    if not any(is_sharded(tensor) for _, tensor in [(name, first), *others]):
        return
    for other_name, tensor in [(name, first), *others]:
        if not is_sharded(first) or not is_sharded(tensor):
            raise TypeError(
                f"{op}: {name} is a {type(first).__name__} and {other_name} a {type(tensor).__name__}; they must be "
                "sharded alike, or not at all"
            )
        mine, its = (_how(x) for x in (first, tensor))
        if mine != its or any(placement.is_partial() for placement in its[1]):
            raise TypeError(
                f"{op}: {name} is a DTensor with placements {mine[1]}, and {other_name} one with {its[1]}; they must "
                "be alike, on one device mesh, and not partial"
            )


def _how(tensor: Any) -> tuple[Any, ...]:
    return tensor.device_mesh, tensor.placements, tensor.shape


def localised(
    op: str, teacher: Sequence[Tensor], student: Sequence[Tensor], shadow: Sequence[Tensor] | None
) -> tuple[list[Any], list[Any], list[Any] | None]:
    """The local parts of tensors that belong together, index by index."""
    for i, row in enumerate(zip(teacher, student, *(() if shadow is None else (shadow,)), strict=False)):
        names = (f"{name}[{i}]" for name in ("teacher", "student", "shadow"))
        check_alike(op, **dict(zip(names, row, strict=False)))
    lists = (
        None if tensors is None else [local(tensor) for tensor in tensors] for tensors in (teacher, student, shadow)
    )
    return tuple(lists)  # type: ignore[return-value]
