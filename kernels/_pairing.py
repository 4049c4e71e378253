"""Which student tensor goes with which teacher tensor, and the checks that nothing is written before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

Tensors = Iterable[Tensor] | nn.Module

_WRAPPERS = frozenset({"module", "_orig_mod"})  # DistributedDataParallel's and torch.compile's


def _plain_names(op: str, argument: str, module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, without the name parts that wrappers add."""
    named: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        plain = name
        if any(wrapper in name for wrapper in _WRAPPERS):
            plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in named:
            raise ValueError(f"{op}: {argument} has two parameters named {plain!r} once wrappers are ignored")
        named[plain] = parameter
    return named


def listed(op: str, argument: str, tensors: Iterable[Any] | nn.Module) -> list[Any]:
    """``tensors`` as a list; what is in it is for :func:`check` to see."""
    if isinstance(tensors, (Tensor, nn.Module)):
        raise TypeError(f"{op}: {argument} is a {type(tensors).__name__}; it must be an iterable of tensors")
    return list(tensors)


def pair(op: str, teacher: Tensors, student: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Both as lists, index for index; modules are matched by parameter name."""
    if isinstance(teacher, nn.Module) and isinstance(student, nn.Module):
        ours, theirs = _plain_names(op, "teacher", teacher), _plain_names(op, "student", student)
        if ours.keys() != theirs.keys():
            only = {
                name: sorted(left)[:5]
                for name, left in (("teacher", ours.keys() - theirs.keys()), ("student", theirs.keys() - ours.keys()))
                if left
            }
            raise ValueError(f"{op}: parameters without a partner: {only}; teacher and student must match")
        return list(ours.values()), [theirs[name] for name in ours]
    return listed(op, "teacher", teacher), listed(op, "student", student)


def _expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _place(tensor: Tensor) -> tuple[object, ...]:
    """The elements that ``tensor`` stands for: a state_dict lists a tied parameter as two tensors in one place."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _check_alike(op: str, i: int, name: str, other: Tensor, teacher: Tensor) -> None:
    if other.shape != teacher.shape or other.device != teacher.device:
        raise ValueError(
            f"{op}: {name}[{i}] has shape {tuple(other.shape)} on {other.device}, but teacher[{i}] has "
            f"{tuple(teacher.shape)} on {teacher.device}; they must be alike"
        )


def _check_pair(op: str, i: int, teacher: Tensor, student: Tensor, shadow: Tensor | None) -> None:
    _check_alike(op, i, "student", student, teacher)
    if teacher.is_floating_point():
        fits = student.is_floating_point()
    else:
        fits = student.dtype == teacher.dtype
    if teacher.is_complex() or not fits:
        raise TypeError(
            f"{op}: teacher[{i}] is {teacher.dtype} and student[{i}] {student.dtype}; "
            "both must be floating, or both the same integer dtype"
        )
    if shadow is not None:
        _check_alike(op, i, "shadow", shadow, teacher)
        if shadow.is_floating_point() != teacher.is_floating_point():
            raise TypeError(f"{op}: shadow[{i}] is {shadow.dtype}, but teacher[{i}] is {teacher.dtype}")
    for name, written in (("teacher", teacher), ("shadow", shadow)):
        if written is not None and _expanded(written):
            raise ValueError(f"{op}: {name}[{i}] is expanded (a stride is 0), so its elements cannot be written")


def check(op: str, teacher: Sequence[Tensor], student: Sequence[Tensor], shadow: Sequence[Tensor] | None) -> list[int]:
    """Raise unless the lists pair up; return the indices to update, which leave out repeats of tied tensors."""
    for name, others in (("teacher", teacher), ("student", student), ("shadow", shadow or ())):
        for i, tensor in enumerate(others):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{op}: {name}[{i}] is a {type(tensor).__name__}; it must be a tensor")
    for name, paired in (("student", student), ("shadow", shadow)):
        if paired is not None and len(paired) != len(teacher):
            raise ValueError(
                f"{op}: {len(paired)} {name} tensors for {len(teacher)} teacher tensors; they must pair up"
            )
    first_with: dict[tuple[object, ...], int] = {}
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        _check_pair(op, i, t, s, None if shadow is None else shadow[i])
        first = first_with.setdefault(_place(t), i)
        if _place(student[first]) != _place(s):
            raise ValueError(f"{op}: teacher[{first}] and teacher[{i}] are one tensor with two students")
    return list(first_with.values())
