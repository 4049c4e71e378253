"""The cross-entropy between a teacher's and a student's assignment of their rows to prototypes.

The limits on derivatives in ``contrastive`` apply here too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _prototypes, reference
from ._scoring import Assignment
from .dispatch import check_no_grad, check_number, check_rows, check_strided, choose_derivable, has_tangent

_OP = "prototype_cross_entropy"
_BACKENDS: dict[str, Callable[..., Any]] = {"reference": reference.prototype_cross_entropy} | {
    backend: partial(_prototypes.differentiable, backend) for backend in _prototypes.BACKENDS
}


def _check_center(center: Tensor, prototypes: Tensor) -> None:
    check_strided(_OP, "center", center, waiting=True)
    if center.shape != prototypes.shape[:1]:
        raise ValueError(
            f"{_OP}: center has shape {tuple(center.shape)}; it must be [{prototypes.shape[0]}], one per prototype"
        )
    if not center.is_floating_point():
        raise TypeError(f"{_OP}: center is {center.dtype}; it must be a floating dtype")
    if center.device != prototypes.device:
        raise ValueError(f"{_OP}: center is on {center.device}; it must be on {prototypes.device} like prototypes")
    check_no_grad(_OP, "center", center)


def _check_pairs(pairs: Tensor | None, student: Tensor, teacher: Tensor) -> None:
    n, m = student.shape[0], teacher.shape[0]
    if pairs is None:
        if n != m:
            raise ValueError(
                f"{_OP}: student has {n} rows and teacher {m}; without pairs, row i of one is paired with row i of "
                "the other, so they must have as many rows"
            )
        return
    check_strided(_OP, "pairs", pairs)
    if pairs.dtype != torch.int64:
        raise TypeError(f"{_OP}: pairs is {pairs.dtype}; it must be int64")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{_OP}: pairs has shape {tuple(pairs.shape)}; it must be [P, 2]")
    if pairs.device != student.device:
        raise ValueError(f"{_OP}: pairs is on {pairs.device}; it must be on {student.device} like student")
    # On a device, reading the values would make the host wait; a compiler has no values yet.
    if type(pairs) is Tensor and pairs.device.type == "cpu" and len(pairs) and not torch.compiler.is_compiling():
        low, high = pairs.amin(dim=0).tolist(), pairs.amax(dim=0).tolist()
        if min(low) < 0 or high[0] >= n or high[1] >= m:
            raise ValueError(
                f"{_OP}: pairs has rows {low[0]} to {high[0]} of student and {low[1]} to {high[1]} of teacher, which "
                f"have {n} and {m} rows"
            )


def _savable(value: Any) -> Any:
    """``value``, or a copy of a tensor made in torch.inference_mode, which autograd does not save."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    center: Tensor | None,
    *,
    student_temperature: float | Tensor,
    teacher_temperature: float | Tensor,
    pairs: Tensor | None = None,
    teacher_prototypes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """DINO's loss over K prototypes (Caron et al., arXiv 2104.14294), without storing the N×K logits.

    With unit rows s and t, and prototypes w used as stored, the student's log-probabilities are
    log_softmax(s·w / student_temperature), and the teacher's probabilities are
    softmax((t·v - center) / teacher_temperature), where v are ``teacher_prototypes``. The loss is the mean of their
    cross-entropy over the rows, or over the pairs. Gradient flows to ``student`` and ``prototypes``. A zero row has
    logits 0 and a zero gradient.

    Args:
        student: [N, D] outputs of the student's bottleneck; normalised inside.
        teacher: [M, D] outputs of the teacher's bottleneck; normalised inside.
        prototypes: [K, D], the weight of the student's last layer.
        center: [K], subtracted from the teacher's logits, or ``None``.
        student_temperature: number above 0 or 0-d tensor.
        teacher_temperature: number above 0 or 0-d tensor, for example one that a schedule updates.
        pairs: int64 [P, 2], each a row of ``student`` and a row of ``teacher``, in any order; a row may be in several
            pairs. ``None`` pairs row i with row i. Rows without a pair count in ``teacher_mean`` only. On a GPU the
            values are not checked.
        teacher_prototypes: [K, D], the weight of the teacher's last layer; ``None`` for ``prototypes``, which then get
            no gradient through the teacher's logits.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        A pair (loss, teacher_mean), float32 (float64 where an input is float64). ``loss`` is the mean over the pairs,
        0-d, and 0 if there are none. ``teacher_mean`` [K] is the mean of the teacher's logits t·v over all its rows,
        before the centre is subtracted. It has no graph. The caller applies the centre's momentum and averages over
        processes.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, an argument without a gradient requires grad, pairs
            contain invalid rows, or the backend is not available.
    """
    check_rows(_OP, "student", student)
    dim, device = student.shape[1], student.device
    check_rows(_OP, "teacher", teacher, dim=dim, device=device)
    check_no_grad(_OP, "teacher", teacher)
    check_rows(_OP, "prototypes", prototypes, dim=dim, device=device)
    if teacher_prototypes is not None:
        check_rows(_OP, "teacher_prototypes", teacher_prototypes, dim=dim, device=device)
        check_no_grad(_OP, "teacher_prototypes", teacher_prototypes)
        if teacher_prototypes.shape != prototypes.shape:
            raise ValueError(
                f"{_OP}: teacher_prototypes has shape {tuple(teacher_prototypes.shape)}; it must be "
                f"{tuple(prototypes.shape)} like prototypes"
            )
    if center is not None:
        _check_center(center, prototypes)
    _check_pairs(pairs, student, teacher)
    check_number(_OP, "student_temperature", student_temperature, device, low=0, open_low=True)
    check_number(_OP, "teacher_temperature", teacher_temperature, device, low=0, open_low=True)
    assignment = Assignment(
        student, teacher, prototypes, teacher_prototypes, center, pairs, student_temperature, teacher_temperature
    )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        assignment = Assignment(*map(_savable, assignment))
    derived = prototypes if has_tangent(prototypes) else student
    found: tuple[Tensor, Tensor] = choose_derivable(_OP, backend, _BACKENDS, derived)(assignment)
    return found
