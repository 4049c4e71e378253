"""The loss over prototypes and its gradients on a GPU: one ``sweep_kernel`` per side, and one backward kernel.

With a unit row s of the student, a unit row t of the teacher, prototypes w of the student, and the mean of w under the
teacher's probabilities, e(t) = Σ_k softmax((t·v - c) / τ')_k w_k,

    P loss = Σ_i count_i log Σ_k exp(s_i·w_k / τ) - Σ_j (Σ_i of j s_i)·e(t_j) / τ
    P dloss/ds_i = (count_i Σ_k softmax(s_i·w / τ)_k w_k - Σ_j of i e(t_j)) / τ

The sweeps compute both averages of w by probability and the logarithms of the sums. So the forward pass yields the loss
and the gradient to the student's rows, and pairs only add sums of [N, D] rows. In the backward pass, each program keeps
some prototypes and loops over the rows of both sides. All sums have a fixed order, so the bits are the same each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _prototypes_blocked as blocked
from . import _sweep
from ._prototypes_blocked import ForwardResult
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
    """Tile sizes of the backward kernel."""

    block_k: int
    """Prototypes per program."""
    block_n: int
    """Rows per step of its loop."""
    warps: int
    stages: int


# By kind of product and BLOCK_D. All fit the shared memory of any GPU from sm_80 on, and all but the last one of
# "tf32x3" its registers (benchmarks/kernel_report.py).
TILES = {
    "half": {64: Tiles(64, 64, 4, 2), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 16, 8, 2)},
    "tf32": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(32, 16, 8, 2), 512: Tiles(16, 16, 16, 1)},
    "tf32x3": {64: Tiles(32, 32, 4, 2), 128: Tiles(32, 16, 8, 2), 256: Tiles(16, 16, 8, 2)},
}


def _supported(assignment: Assignment) -> bool:
    """Whether the kernels take these inputs; ``_prototypes_blocked`` takes the others."""
    dim, size = assignment.student.shape[1], len(assignment.prototypes)
    if compute_dtype(*assignment.tensors) == torch.float64 or not (0 < dim <= WIDEST and size > 0):
        return False
    return max(64, block_d(dim)) in TILES[_sweep.product_kind(_product_dtype(assignment))]


def _product_dtype(assignment: Assignment) -> torch.dtype:
    """The dtype in which rows and prototypes are multiplied: that of the prototypes, or float32 where they differ."""
    kinds = {multiplied(x.dtype) for x in (assignment.prototypes, assignment.teacher_prototypes) if x is not None}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def gathering(dim: int, parts: int) -> dict[str, int]:
    """Compile-time arguments of ``gather_kernel`` for rows of ``dim`` and this many splits."""
    cut = _sweep.finishing(dim, parts)
    return cut | {"CHUNK": min(cut["CHUNK"], 4), "num_warps": 8}


class _Prepared(NamedTuple):
    """Inputs of both passes, normalised and converted."""

    own: Tensor
    its: Tensor | None
    dtype: torch.dtype
    kind: str
    temperatures: tuple[float | Tensor, float | Tensor]
    """The student's and the teacher's, each a number or a tensor on the device."""
    shift: Tensor | None
    student: Tensor
    """[N, D] unit rows in float32."""
    of_student: blocked.Bags | None
    of_teacher: blocked.Bags | None
    values: Tensor
    """[M, D], for each row of the teacher the sum of the student's unit rows that it is paired with."""


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


def _swept(rows: Tensor, prepared: _Prepared, teacher: bool, averaged: bool) -> tuple[Tensor, Tensor]:
    """Per row the log of the sum of exp(logit), and the mean [rows, D] of the student's prototypes by probability."""
    (n, dim), size, device = rows.shape, len(prepared.own), rows.device
    two = teacher and prepared.its is not None
    slots, major = _sweep.capacity(device)
    work = _sweep.plan(n, size, dim, prepared.kind, slots, major, two and averaged)
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
            bank_ptr=prepared.its if two else prepared.own,
            values_ptr=prepared.own if two and averaged else None,
            shift_ptr=prepared.shift if teacher else None,
            averages_ptr=averages,
            logsums_ptr=logsums,
            tickets_ptr=None,
            pointer_ptr=None,
            temperature=prepared.temperatures[teacher],
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
            PRECISION="tf32" if prepared.kind == "half" else prepared.kind,
            UPCAST=INTERPRETED and prepared.dtype == torch.bfloat16,
            num_warps=work.warps,
            num_stages=work.stages,
        )
        gather_kernel[(triton.cdiv(n, gather["BLOCK_R"]),)](
            averages, logsums, average if averaged else None, logsum, n, work.bank_splits, dim, block_d(dim), **gather
        )
    return logsum / LOG2E, average


@torch.no_grad()
def swept_loss(assignment: Assignment, to_student: bool) -> ForwardResult:
    """The loss, and the gradient to the student's rows if ``to_student``."""
    if not _supported(assignment):
        blocks = blocked.blocked_loss(assignment, to_student)
        exact = assignment._replace(student=assignment.student.to(blocks.loss.dtype))
        pull, _ = blocked.blocked_gradients(exact, blocks, torch.ones_like(blocks.loss), to_student, False)
        return blocks._replace(pull=pull)
    with no_autocast(assignment.student.device):
        prepared = _prepare(assignment)
        student, count = prepared.student, blocked.count_pairs(assignment)
        its = prepared.own if prepared.its is None else prepared.its
        teacher, rows = unit(assignment.teacher.float()), max(CONVERTED // its.shape[1], 1)
        mean = torch.cat([blocked.mean_logits(teacher, part.float()) for part in its.split(rows)])
        if count == 0:
            sizes = (), len(student), len(teacher), student.shape if to_student else (0,)
            loss, mine, of_its, pull = (student.new_zeros(size) for size in sizes)
            return ForwardResult(loss, mean, mine, of_its, pull)
        logsum, average = _swept(assignment.student, prepared, False, to_student)
        its_logsum, expected = _swept(assignment.teacher, prepared, True, True)
        of_student, temperature = prepared.of_student, prepared.temperatures[0]
        scored = logsum if of_student is None else logsum * of_student.counts.squeeze(1)
        loss = (scored.sum() - (prepared.values * expected).sum() / temperature) / count
        if not to_student:
            return ForwardResult(loss, mean, logsum, its_logsum, student.new_empty(0))
        if of_student is None:
            pull = average - expected
        else:
            pull = average * of_student.counts - of_student.sums(expected)
        pull = blocked.through_unit(assignment.student.float(), pull / temperature / count)
        return ForwardResult(loss, mean, logsum, its_logsum, pull)


@torch.no_grad()
def swept_gradients(
    assignment: Assignment, forward: ForwardResult, upstream: Tensor, to_student: bool, to_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to the student's rows and to the prototypes, in their dtypes; each is empty unless requested."""
    student, prototypes, count = assignment.student, assignment.prototypes, blocked.count_pairs(assignment)
    pull = (forward.pull * upstream).to(student.dtype) if to_student else student.new_empty(0)
    if not (_supported(assignment) and to_prototypes and count):
        return pull, blocked.blocked_gradients(assignment, forward, upstream, False, to_prototypes)[1]
    with no_autocast(student.device):
        prepared = _prepare(assignment)
        (size, dim), tiles = prototypes.shape, TILES[prepared.kind][max(64, block_d(prototypes.shape[1]))]
        own, other = (LOG2E / temperature for temperature in prepared.temperatures)
        counts, values, factor = None, prepared.values, upstream.float() / prepared.temperatures[0] / count
        if prepared.of_student is not None:  # scaled to at most 1, so that float16 does not overflow
            counts = prepared.of_student.counts.squeeze(1).float()
            most = counts.max()
            counts, values, factor = counts / most, values / most, factor * most
        boost = 10 if prepared.dtype == torch.float16 else 0
        push = torch.empty(size, dim, dtype=_sweep.readable(prototypes[:0]).dtype, device=student.device)
        with guard(student.device):
            push_prototypes_kernel[(triton.cdiv(size, tiles.block_k),)](
                (prepared.student * own).to(prepared.dtype),
                counts,
                forward.student_logsums * LOG2E,
                (unit(assignment.teacher.float()) * other).to(prepared.dtype),
                values.to(prepared.dtype),
                forward.teacher_logsums * LOG2E,
                prepared.own,
                prepared.its,
                prepared.shift,
                push,
                factor * 2.0**-boost,
                prepared.temperatures[0],
                len(student),
                len(assignment.teacher),
                size,
                dim,
                block_d(dim),
                tiles.block_k,
                tiles.block_n,
                boost,
                "tf32" if prepared.kind == "half" else prepared.kind,
                INTERPRETED and prepared.dtype == torch.bfloat16,
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return pull, push.to(prototypes.dtype)
