"""The loss over prototypes and its gradients on a GPU: one sweep of ``_sweep_kernel`` per side, and one sweep back.

With a unit row s of the student, t of the teacher, prototypes w of the student, and what the teacher expects of them,
e(t) = Σ_k softmax((t·v - c) / τ')_k w_k,

    P loss = Σ_i count_i log Σ_k exp(s_i·w_k / τ) - Σ_j (Σ_i of j s_i)·e(t_j) / τ
    P dloss/ds_i = (count_i Σ_k softmax(s_i·w / τ)_k w_k - Σ_j of i e(t_j)) / τ

The sweep finds both averages of w by probability together with the logarithms of the sums, so that the loss and the
gradient to the student's rows come out of the forward pass, and pairs cost nothing but sums of [N, D] rows. In the
backward pass a program holds some prototypes, and the rows of both sides pass by. All sums have a fixed order, so the
bits are the same each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _prototypes_blocked as blocked
from . import _sweep
from ._prototypes_blocked import Found
from ._push import block_d
from ._scoring import Assignment
from ._wide import multiplied
from .dispatch import INTERPRETED, compute_dtype, no_autocast, triton
from .multi_tensor import guard
from .reference import unit

if triton is not None:
    from ._finish import gather_kernel
    from ._prototypes_kernel import push_prototypes_kernel
    from ._sweep_kernel import sweep_kernel

WIDEST = 512
LOG2E = 1.4426950408889634
CONVERTED = 1 << 23  # elements of the prototypes that are converted at a time


class Tiles(NamedTuple):
    """How the sweep back is cut."""

    block_k: int
    """Prototypes of a program."""
    block_n: int
    """Rows that pass by at a time."""
    warps: int
    stages: int


# By kind of product and BLOCK_D. All fit the shared memory of any GPU from sm_80 on, and all but the last one of
# "tf32x3" its registers (benchmarks/kernel_report.py).
TILES = {
    "half": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 16, 8, 2)},
    "tf32": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 16, 8, 2), 512: Tiles(16, 16, 16, 1)},
    "tf32x3": {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 16, 8, 2), 256: Tiles(16, 16, 8, 2)},
}


def _taken(assignment: Assignment) -> bool:
    """Whether the kernels do it; for the rest the blocks of ``_prototypes_blocked`` serve."""
    dim, size = assignment.student.shape[1], len(assignment.prototypes)
    if compute_dtype(*assignment.tensors) == torch.float64 or not (0 < dim <= WIDEST and size > 0):
        return False
    return max(64, block_d(dim)) in TILES[_sweep.product_kind(_product_dtype(assignment))]


def _product_dtype(assignment: Assignment) -> torch.dtype:
    """The dtype in which rows and prototypes are multiplied: that of the prototypes, or float32 where they differ."""
    kinds = {multiplied(x.dtype) for x in (assignment.prototypes, assignment.teacher_prototypes) if x is not None}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def gathering(dim: int, parts: int) -> dict[str, int]:
    """How the launch that puts the parts together is cut, its compile-time arguments."""
    cut = _sweep.finishing(dim, parts)
    return cut | {"CHUNK": min(cut["CHUNK"], 4), "num_warps": 8}


class _Prepared(NamedTuple):
    """What both passes read."""

    own: Tensor
    its: Tensor | None
    dtype: torch.dtype
    kind: str
    temperatures: tuple[float | Tensor, float | Tensor]
    """Each a number, or a tensor on the device."""
    shift: Tensor | None
    student: Tensor
    """[N, D] unit rows in float32."""
    of_student: blocked.Bags | None
    of_teacher: blocked.Bags | None
    values: Tensor
    """[M, D], for each row of the teacher the sum of the student's unit rows that it serves."""


def _prepare(assignment: Assignment) -> _Prepared:
    device, dtype = assignment.student.device, _product_dtype(assignment)
    own = assignment.prototypes.to(dtype).contiguous()
    its = assignment.teacher_prototypes
    first, second = (
        _sweep.launched(number, "temperature", device)
        for number in (assignment.student_temperature, assignment.teacher_temperature)
    )
    shift = None if assignment.center is None else assignment.center.float() * (LOG2E / second)
    student = unit(assignment.student.float())
    of_student, of_teacher = blocked.bags(assignment)
    return _Prepared(
        own,
        None if its is None else its.to(dtype).contiguous(),
        dtype,
        _sweep.product_kind(dtype),
        (first, second),
        shift,
        student,
        of_student,
        of_teacher,
        student if of_teacher is None else of_teacher.sums(student),
    )


def _swept(rows: Tensor, found: _Prepared, teacher: bool, averaged: bool) -> tuple[Tensor, Tensor]:
    """Of each row: log of the sum of exp(logit), and the student's prototypes averaged by probability, [rows, D]."""
    (n, dim), size, device = rows.shape, len(found.own), rows.device
    two = teacher and found.its is not None
    slots, major = _sweep.capacity(device)
    work = _sweep.plan(n, size, dim, found.kind, slots, major, two and averaged)
    assert work is not None
    gather = gathering(dim, work.bank_splits)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    averages = empty(work.bank_splits, n, dim) if averaged else None
    logsums, logsum = empty(work.bank_splits, n), empty(n)
    average = empty(n, dim) if averaged else empty(0)
    with guard(device):
        sweep_kernel[(work.query_blocks * work.bank_splits,)](
            query_ptr=_sweep.readable(rows).contiguous(),
            bank_ptr=found.its if two else found.own,
            values_ptr=found.own if two and averaged else None,
            shift_ptr=found.shift if teacher else None,
            averages_ptr=averages,
            logsums_ptr=logsums,
            tickets_ptr=None,
            pointer_ptr=None,
            temperature=found.temperatures[teacher],
            n=n,
            size=size,
            key_offset=0,
            tiles_per_split=work.tiles_per_split,
            D=dim,
            BLOCK_D=block_d(dim),
            BLOCK_N=work.block_n,
            BLOCK_K=work.block_k,
            IN_BATCH=False,
            GRADIENT=averaged,
            PRECISION="tf32" if found.kind == "half" else found.kind,
            UPCAST=INTERPRETED and found.dtype == torch.bfloat16,
            num_warps=work.warps,
            num_stages=work.stages,
        )
        gather_kernel[(triton.cdiv(n, gather["BLOCK_R"]),)](
            averages, logsums, average if averaged else None, logsum, n, work.bank_splits, dim, block_d(dim), **gather
        )
    return logsum / LOG2E, average


@torch.no_grad()
def swept_loss(assignment: Assignment, to_student: bool) -> Found:
    """The loss, and the gradient to the student's rows if it is asked for."""
    if not _taken(assignment):
        blocks = blocked.blocked_loss(assignment, to_student)
        exact = assignment._replace(student=assignment.student.to(blocks.loss.dtype))
        pull, _ = blocked.blocked_gradients(exact, blocks, torch.ones_like(blocks.loss), to_student, False)
        return blocks._replace(pull=pull)
    with no_autocast(assignment.student.device):
        found = _prepare(assignment)
        student, count = found.student, blocked.count_pairs(assignment)
        its = found.own if found.its is None else found.its
        teacher, rows = unit(assignment.teacher.float()), max(CONVERTED // its.shape[1], 1)
        mean = torch.cat([blocked.mean_logits(teacher, part.float()) for part in its.split(rows)])
        if count == 0:
            sizes = (), len(student), len(teacher), student.shape if to_student else (0,)
            loss, mine, of_its, pull = (student.new_zeros(size) for size in sizes)
            return Found(loss, mean, mine, of_its, pull)
        logsum, average = _swept(assignment.student, found, False, to_student)
        its_logsum, expected = _swept(assignment.teacher, found, True, True)
        of_student, temperature = found.of_student, found.temperatures[0]
        scored = logsum if of_student is None else logsum * of_student.counts.squeeze(1)
        loss = (scored.sum() - (found.values * expected).sum() / temperature) / count
        if not to_student:
            return Found(loss, mean, logsum, its_logsum, student.new_empty(0))
        if of_student is None:
            pull = average - expected
        else:
            pull = average * of_student.counts - of_student.sums(expected)
        pull = blocked.through_unit(assignment.student.float(), pull / temperature / count)
        return Found(loss, mean, logsum, its_logsum, pull)


@torch.no_grad()
def swept_gradients(
    assignment: Assignment, found: Found, upstream: Tensor, to_student: bool, to_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to the student's rows and to the prototypes, in their dtypes, each empty if it is not asked for."""
    student, prototypes, count = assignment.student, assignment.prototypes, blocked.count_pairs(assignment)
    pull = (found.pull * upstream).to(student.dtype) if to_student else student.new_empty(0)
    if not (_taken(assignment) and to_prototypes and count):
        return pull, blocked.blocked_gradients(assignment, found, upstream, False, to_prototypes)[1]
    with no_autocast(student.device):
        its = _prepare(assignment)
        (size, dim), tiles = prototypes.shape, TILES[its.kind][max(64, block_d(prototypes.shape[1]))]
        own, other = (LOG2E / temperature for temperature in its.temperatures)
        counts, values, factor = None, its.values, upstream.float() / its.temperatures[0] / count
        if its.of_student is not None:  # no share is above 1, and none of what float16 holds is lost
            counts = its.of_student.counts.squeeze(1).float()
            most = counts.max()
            counts, values, factor = counts / most, values / most, factor * most
        boost = 10 if its.dtype == torch.float16 else 0
        push = torch.empty(size, dim, dtype=_sweep.readable(prototypes[:0]).dtype, device=student.device)
        with guard(student.device):
            push_prototypes_kernel[(triton.cdiv(size, tiles.block_k),)](
                (its.student * own).to(its.dtype),
                counts,
                found.student_logsums * LOG2E,
                (unit(assignment.teacher.float()) * other).to(its.dtype),
                values.to(its.dtype),
                found.teacher_logsums * LOG2E,
                its.own,
                its.its,
                its.shift,
                push,
                factor * 2.0**-boost,
                its.temperatures[0],
                len(student),
                len(assignment.teacher),
                size,
                dim,
                block_d(dim),
                tiles.block_k,
                tiles.block_n,
                boost,
                "tf32" if its.kind == "half" else its.kind,
                INTERPRETED and its.dtype == torch.bfloat16,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return pull, push.to(prototypes.dtype)
