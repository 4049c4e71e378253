"""The loss over prototypes and its gradients in plain PyTorch, block by block over the prototypes; the CPU backend.

It takes any device, dtype and width. With the logits a = s·w / τ of the student and b = (t·v - c) / τ' of the teacher,
for P pairs of rows i of the student and rows j of the teacher,

    P loss = Σ_i count_i log Σ_k exp(a_ik) - Σ_j Σ_k softmax(b)_jk (Σ_i of j a_ik)
    P dloss/da_ik = count_i softmax(a)_ik - Σ_j of i softmax(b)_jk

The forward pass computes the loss and the logarithms of the sums. With these, the backward pass gets the softmax of a
block without another pass. Both passes compute the logits, so there are six matrix products; keeping the logits would
need four. Terms shared by several rows are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._scoring import Assignment
from .dispatch import compute_dtype, no_autocast
from .reference import unit

# Elements of a block of logits, and its least number of columns: 1 MiB in float32 for up to 2,048 rows.
ELEMENTS, NARROWEST = 1 << 18, 128
DEVICE_ELEMENTS = 1 << 24  # the same on other devices, for inputs that their kernels do not take


class ForwardResult(NamedTuple):
    """The loss, the mean of the teacher's logits, and the values that the backward pass needs."""

    loss: Tensor
    teacher_mean: Tensor
    """[K]"""
    student_logsums: Tensor
    """[N], the logarithm of the sum of each row's exponentials, or [0] where it is not needed."""
    teacher_logsums: Tensor
    """[M] or [0], likewise."""
    pull: Tensor
    """[N, D] gradient to the student's rows, or [0] where the backward pass computes it."""


class Bags(NamedTuple):
    """For each row of one side, its partners on the other side, as arguments of ``embedding_bag``."""

    partners: Tensor
    """[P]"""
    offsets: Tensor
    counts: Tensor
    """[rows, 1]"""

    def sums(self, partners: Tensor) -> Tensor:
        """The sum of each row's partners; 0 for a row that has none."""
        return F.embedding_bag(self.partners, partners, self.offsets, mode="sum")


def bags(assignment: Assignment) -> tuple[Bags, Bags] | tuple[None, None]:
    """The bags of the student's rows and of the teacher's rows, or None where row i is paired with row i."""
    pairs = assignment.pairs
    if pairs is None:
        return None, None

    def of(side: int, rows: int) -> Bags:
        mine, order = pairs[:, side].sort(stable=True)
        ends = torch.searchsorted(mine, torch.arange(rows + 1, device=mine.device))
        return Bags(pairs[:, 1 - side][order], ends[:-1], ends.diff().unsqueeze(1))

    return of(0, len(assignment.student)), of(1, len(assignment.teacher))


def count_pairs(assignment: Assignment) -> int:
    """The number of terms that the loss averages; 0 if there are no prototypes."""
    count = len(assignment.student if assignment.pairs is None else assignment.pairs)
    return count if len(assignment.prototypes) else 0


def temperatures(assignment: Assignment, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
    """The temperatures of student and teacher; tensors in ``dtype``."""
    both = assignment.student_temperature, assignment.teacher_temperature
    of_student, of_teacher = (number.to(dtype) if isinstance(number, Tensor) else number for number in both)
    return of_student, of_teacher


class _Block(NamedTuple):
    """Some of the prototypes and their logits, which the caller may overwrite."""

    at: slice
    own: Tensor
    its: Tensor
    student: Tensor
    teacher: Tensor


def _blocks(assignment: Assignment, student: Tensor, teacher: Tensor) -> Iterator[_Block]:
    """Yield the logits of unit rows, block by block."""
    _, _, prototypes, teacher_prototypes, center, _ = assignment[:6]
    dtype, size, device = student.dtype, len(prototypes), student.device
    of_student, of_teacher = temperatures(assignment, dtype)
    student, teacher = student / of_student, teacher / of_teacher
    shift = None if center is None else center.to(dtype) / of_teacher
    columns = (ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS) // max(len(student), len(teacher), 1)
    columns = min(max(columns, NARROWEST), size)
    scratch = [x.new_empty(len(x) * columns) for x in (student, teacher)]
    for k in range(0, size, max(columns, 1)):
        at = slice(k, k + columns)
        own = prototypes[at].to(dtype)
        its = own if teacher_prototypes is None else teacher_prototypes[at].to(dtype)
        a, b = (s[: len(x) * len(own)].view(len(x), len(own)) for s, x in zip(scratch, (student, teacher), strict=True))
        torch.mm(student, own.T, out=a)
        if shift is None:
            torch.mm(teacher, its.T, out=b)
        else:
            torch.addmm(shift[at], teacher, its.T, beta=-1, out=b)
        yield _Block(at, own, its, a, b)


def mean_logits(teacher: Tensor, its: Tensor) -> Tensor:
    """The mean logits [K] of the teacher's unit rows [M, D] for its prototypes ``its`` [K, D]."""
    return its @ (teacher.sum(dim=0) / max(len(teacher), 1))


@torch.no_grad()
def blocked_loss(assignment: Assignment, to_student: bool) -> ForwardResult:
    """Compute the loss. ``to_student`` is not used; other backends compute the student's gradient here."""
    with no_autocast(assignment.student.device):
        dtype = compute_dtype(*assignment.tensors)
        student, teacher = unit(assignment.student.to(dtype)), unit(assignment.teacher.to(dtype))
        of_student, of_teacher = bags(assignment)
        mean = student.new_empty(len(assignment.prototypes))
        tops = [x.new_full((len(x), 1), torch.finfo(dtype).min) for x in (student, teacher)]
        totals = [torch.zeros_like(top) for top in tops]
        common = torch.zeros_like(tops[1])  # sum of exp(teacher's logit - top) * logits of its students
        for block in _blocks(assignment, student, teacher):
            mean[block.at] = mean_logits(teacher, block.its)
            logits = block.student if of_teacher is None else of_teacher.sums(block.student)
            shrink = _add(block.teacher, tops[1], totals[1])
            common.mul_(shrink).add_((block.teacher * logits).sum(dim=1, keepdim=True))
            _add(block.student, tops[0], totals[0])
        mine, its = ((top + total.log()).squeeze(1) for top, total in zip(tops, totals, strict=True))
        loss, count = student.new_zeros(()), count_pairs(assignment)
        if count:
            scored = mine if of_student is None else mine * of_student.counts.squeeze(1)
            loss = (scored.sum() - (common / totals[1]).sum()) / count
        return ForwardResult(loss, mean, mine, its, student.new_empty(0))


def _add(logits: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """Replace logits by exp(logit - top), and update ``top`` and ``total``; return the factor that rescales older
    sums."""
    above = torch.maximum(top, logits.amax(dim=1, keepdim=True))
    shrink = (top - above).exp_()
    logits.sub_(above).exp_()
    top.copy_(above)
    total.mul_(shrink).add_(logits.sum(dim=1, keepdim=True))
    return shrink


@torch.no_grad()
def blocked_gradients(
    assignment: Assignment, forward: ForwardResult, upstream: Tensor, to_student: bool, to_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to the student's rows and to the prototypes, in their dtypes; each is empty unless requested."""
    with no_autocast(assignment.student.device):
        dtype = compute_dtype(*assignment.tensors)
        rows, prototypes = assignment.student.to(dtype), assignment.prototypes
        student, teacher = unit(rows), unit(assignment.teacher.to(dtype))
        pull = student.new_zeros(student.shape if to_student else 0)
        push = prototypes.new_empty(prototypes.shape if to_prototypes else 0)
        count = count_pairs(assignment)
        if count == 0 or not (to_student or to_prototypes):
            return pull.to(assignment.student.dtype), push.zero_()
        scale = upstream.to(dtype) / count / temperatures(assignment, dtype)[0]
        weighted = student * scale
        of_student, _ = bags(assignment)
        of_logsums = forward.student_logsums.unsqueeze(1), forward.teacher_logsums.unsqueeze(1)
        for at, own, _, mine, its in _blocks(assignment, student, teacher):
            mine.sub_(of_logsums[0]).exp_()
            its.sub_(of_logsums[1]).exp_()
            if of_student is None:
                mine.sub_(its)
            else:
                mine.mul_(of_student.counts).sub_(of_student.sums(its))
            if to_student:
                pull.addmm_(mine, own)
            if to_prototypes:
                push[at] = mine.T @ weighted
        if to_student:
            pull = through_unit(rows, pull * scale)
        return pull.to(assignment.student.dtype), push


def through_unit(rows: Tensor, pull: Tensor) -> Tensor:
    """Convert ``pull``, the gradient to the unit rows, to the gradient to ``rows``; 0 for a zero row."""
    squared = rows.square().sum(dim=1, keepdim=True)
    inverse = torch.where(squared > 0, squared.rsqrt(), 0)
    u = rows * inverse
    return (pull - u * (pull * u).sum(dim=1, keepdim=True)) * inverse
