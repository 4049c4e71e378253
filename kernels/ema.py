"""The multi-tensor update of the teacher as a moving average of the student."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import reference
from ._dispatch import check_scalar, choose

_EMA = {"reference": reference.ema_}
_WRAPPERS = frozenset({"module", "_orig_mod"})  # DistributedDataParallel's and torch.compile's

Tensors = Iterable[Tensor] | nn.Module


def _plain_names(module: nn.Module, argument: str) -> dict[str, Tensor]:
    """Parameters by name, without the name parts that wrappers add."""
    named: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain in named:
            raise ValueError(f"fused_ema_: {argument} has two parameters named {plain!r} once wrappers are ignored")
        named[plain] = parameter
    return named


def _listed(argument: str, tensors: Tensors) -> list[Tensor]:
    if isinstance(tensors, (Tensor, nn.Module)):
        raise TypeError(f"fused_ema_: {argument} is a {type(tensors).__name__}; it must be an iterable of tensors")
    listed = list(tensors)
    for i, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"fused_ema_: {argument}[{i}] is a {type(tensor).__name__}; it must be a tensor")
    return listed


def _pair(teacher: Tensors, student: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Both as lists, index for index; modules are matched by parameter name."""
    if isinstance(teacher, nn.Module) and isinstance(student, nn.Module):
        ours, theirs = _plain_names(teacher, "teacher"), _plain_names(student, "student")
        if ours.keys() != theirs.keys():
            only = {
                name: sorted(left)[:5]
                for name, left in (("teacher", ours.keys() - theirs.keys()), ("student", theirs.keys() - ours.keys()))
                if left
            }
            raise ValueError(f"fused_ema_: parameters without a partner: {only}; teacher and student must match")
        return list(ours.values()), [theirs[name] for name in ours]
    return _listed("teacher", teacher), _listed("student", student)


def _check_alike(i: int, name: str, other: Tensor, teacher: Tensor) -> None:
    if other.shape != teacher.shape or other.device != teacher.device:
        raise ValueError(
            f"fused_ema_: {name}[{i}] has shape {tuple(other.shape)} on {other.device}, but teacher[{i}] has "
            f"{tuple(teacher.shape)} on {teacher.device}; they must be alike"
        )


def _check_pair(i: int, teacher: Tensor, student: Tensor, shadow: Tensor | None) -> None:
    _check_alike(i, "student", student, teacher)
    if teacher.is_floating_point():
        fits = student.is_floating_point()
    else:
        fits = student.dtype == teacher.dtype
    if teacher.is_complex() or not fits:
        raise TypeError(
            f"fused_ema_: teacher[{i}] is {teacher.dtype} and student[{i}] {student.dtype}; "
            "both must be floating, or both the same integer dtype"
        )
    if shadow is not None:
        _check_alike(i, "shadow", shadow, teacher)
        if shadow.is_floating_point() != teacher.is_floating_point():
            raise TypeError(f"fused_ema_: shadow[{i}] is {shadow.dtype}, but teacher[{i}] is {teacher.dtype}")
    for name, written in (("teacher", teacher), ("shadow", shadow)):
        if written is not None and _expanded(written):
            raise ValueError(f"fused_ema_: {name}[{i}] is expanded (a stride is 0), so its elements cannot be written")


def _expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _prepare(
    teacher: Tensors, student: Tensors, shadow: Iterable[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Pair, check, and leave out the repeats of tied tensors, which are updated once."""
    teachers, students = _pair(teacher, student)
    shadows = None if shadow is None else _listed("shadow", shadow)
    for name, listed in (("student", students), ("shadow", shadows)):
        if listed is not None and len(listed) != len(teachers):
            raise ValueError(
                f"fused_ema_: {len(listed)} {name} tensors for {len(teachers)} teacher tensors; they must pair up"
            )
    first_with: dict[int, int] = {}
    for i, (t, s) in enumerate(zip(teachers, students, strict=True)):
        _check_pair(i, t, s, None if shadows is None else shadows[i])
        first = first_with.setdefault(id(t), i)
        if students[first] is not s:
            raise ValueError(f"fused_ema_: teacher[{first}] and teacher[{i}] are one tensor with two students")
    kept = list(first_with.values())
    return (
        [teachers[i] for i in kept],
        [students[i] for i in kept],
        None if shadows is None else [shadows[i] for i in kept],
    )


def _device(teachers: list[Tensor]) -> torch.device:
    return teachers[0].device if teachers else torch.device("cpu")


class EMA:
    """The prepared form of :func:`fused_ema_`: pairs are matched and checked once, then updated many times.

    Args:
        teacher, student, shadow: as in :func:`fused_ema_`. The tensors are kept by reference.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: as in :func:`fused_ema_`.
    """

    def __init__(
        self,
        teacher: Tensors,
        student: Tensors,
        *,
        shadow: Iterable[Tensor] | None = None,
        backend: str | None = None,
    ) -> None:
        self.teacher, self.student, self.shadow = _prepare(teacher, student, shadow)
        self._run = choose("fused_ema_", backend, _EMA, _device(self.teacher))

    def update_(self, momentum: float | Tensor) -> None:
        """Update the teacher (and its shadow) in place; ``momentum`` as in :func:`fused_ema_`."""
        check_scalar("fused_ema_", "momentum", momentum, low=0, high=1)
        self._run(self.teacher, self.student, momentum, self.shadow)


def fused_ema_(
    teacher: Tensors,
    student: Tensors,
    momentum: float | Tensor,
    *,
    shadow: Iterable[Tensor] | None = None,
    backend: str | None = None,
) -> None:
    """Update a teacher in place: ``teacher <- momentum * teacher + (1 - momentum) * student``.

    The update of mean teachers (Tarvainen and Valpola, arXiv 1703.01780) and MoCo (He et al., arXiv 1911.05722),
    computed in float32 (float64 where a tensor is float64) whatever the tensors' dtypes, which may be mixed: a bf16
    student into a float32 teacher is the intended use. A bf16 or fp16 *teacher* is allowed, but loses every change
    smaller than half its spacing: at momentum .999 that is most of them.

    Args:
        teacher: iterable of tensors, or a module: its parameters are matched with those of a student module by
            name, where the name parts ``module`` and ``_orig_mod`` that wrappers add are ignored. Integer tensors
            are copied. Buffers take part only if you pass them. A tensor that is listed twice is updated once.
        student: like ``teacher``, tensor for tensor of the same shape and device; never changed.
        momentum: number from 0 to 1, or a 0-d tensor (whose value is not checked).
        shadow: iterable of low-precision copies of the teacher, which get the new values in the same pass.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: the lists do not pair up, shapes, dtypes or devices do not fit, a tensor to be written
            is expanded, or the backend cannot be had. Nothing is written then.
    """
    check_scalar("fused_ema_", "momentum", momentum, low=0, high=1)
    teachers, students, shadows = _prepare(teacher, student, shadow)
    choose("fused_ema_", backend, _EMA, _device(teachers))(teachers, students, momentum, shadows)
