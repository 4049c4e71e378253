"""Every operation of fastrm.kernels in plain PyTorch: the definition, the oracle of the tests, and a backend.

Inputs were checked by the public functions. Everything is computed in float32, or in float64 where an input is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._scoring import Assignment, Scoring
from .dispatch import compute_dtype, no_autocast


def unit(x: Tensor) -> Tensor:
    """Rows of ``x`` [N, D] at length 1. A zero row stays zero and has a zero gradient."""
    squared = x.square().sum(dim=1, keepdim=True)
    nonzero = squared > 0
    # The inner `where` keeps sqrt(0), whose gradient is not finite, out of the graph. The derivative of rsqrt, the
    # length to the power of -3, would leave the range of float32 for lengths that are well within it.
    return x / torch.where(nonzero, torch.where(nonzero, squared, 1).sqrt(), torch.inf)


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """Per-row losses [N] as they are, summed, or averaged; the mean of no rows is 0."""
    if reduction == "none":
        return rows
    total = rows.sum()
    return total if reduction == "sum" else total / max(rows.shape[0], 1)


@torch.no_grad()
def ema_(
    teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float | Tensor, shadow: Sequence[Tensor] | None
) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student; integer tensors are copied."""
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        if t.is_floating_point():
            dtype = compute_dtype(t, s)
            # The coefficient never takes the tensors' dtype: 0.999 in bfloat16 is 1.
            m = momentum.to(t.device, dtype) if isinstance(momentum, Tensor) else float(momentum)
            new = m * t.to(dtype) + (1 - m) * s.to(dtype)
        else:
            new = s
        t.copy_(new)
        if shadow is not None:
            shadow[i].copy_(new)


def info_nce(scoring: Scoring) -> Tensor:
    """Cross-entropy of each query's positive key among its candidates (van den Oord et al., arXiv 1807.03748)."""
    query, key, queue = scoring.query, scoring.key, scoring.queue
    assert key is not None
    with no_autocast(query.device):
        dtype = compute_dtype(query, key, queue)
        q, k = unit(query.to(dtype)), unit(key.to(dtype))
        if queue is None:
            logits = q @ k.T
            target = torch.arange(len(q), device=q.device) + scoring.key_offset
        else:
            positive = (q * k).sum(dim=1, keepdim=True)
            logits = torch.cat([positive, q @ queue.to(dtype).T], dim=1)
            target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        rows = F.cross_entropy(logits / scoring.temperature, target, reduction="none")
        return reduce(rows, scoring.reduction)


def residual_loss(scoring: Scoring) -> Tensor:
    """2 - 2 cos(query, same-view key), row by row."""
    query, same = scoring.query, scoring.same
    assert same is not None
    with no_autocast(query.device):
        dtype = compute_dtype(query, same)
        cosine = (unit(query.to(dtype)) * unit(same.to(dtype))).sum(dim=1)
        return reduce(2 - 2 * cosine, scoring.reduction)


def residual_info_nce(scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of both losses and the two parts, detached."""
    dtype = compute_dtype(scoring.query, scoring.key, scoring.same, scoring.queue)
    scoring = scoring._replace(query=scoring.query.to(dtype))  # both terms in the same precision
    contrastive, residual = info_nce(scoring), residual_loss(scoring)
    loss = scoring.contrastive_weight * contrastive + scoring.residual_weight * residual
    return loss, contrastive.detach(), residual.detach()


def prototype_cross_entropy(assignment: Assignment) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the student's assignment under the teacher's, and the teacher's mean logits [K]."""
    student, teacher, prototypes, teacher_prototypes, center, pairs = assignment[:6]
    with no_autocast(student.device):
        dtype = compute_dtype(*assignment.tensors)
        own = prototypes.to(dtype)
        its = own.detach() if teacher_prototypes is None else teacher_prototypes.to(dtype)
        logits = unit(teacher.to(dtype)) @ its.T
        centred = logits if center is None else logits - center.to(dtype)
        targets = F.softmax(centred / assignment.teacher_temperature, dim=1)
        logs = F.log_softmax(unit(student.to(dtype)) @ own.T / assignment.student_temperature, dim=1)
        if pairs is not None:
            logs, targets = logs.index_select(0, pairs[:, 0]), targets.index_select(0, pairs[:, 1])
        return reduce(-(targets * logs).sum(dim=1), "mean"), logits.sum(dim=0) / max(len(logits), 1)


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, skip: Tensor | None = None) -> None:
    """Write the unit keys into the ring's rows pointer, pointer + 1, … and advance the pointer, unless ``skip``."""
    size, count = queue.shape[0], keys.shape[0]
    kept = keys[max(count - size, 0) :]  # of more keys than rows, only the last are kept
    first = pointer + (count - kept.shape[0])
    rows = (first + torch.arange(kept.shape[0], device=queue.device)) % size
    new, end = unit(kept.to(compute_dtype(queue, kept))).to(queue.dtype), (pointer + count) % size
    if skip is not None:
        skipped = skip.reshape(()) != 0
        new, end = torch.where(skipped, queue[rows], new), torch.where(skipped, pointer, end)
    queue.index_copy_(0, rows, new)
    pointer.copy_(end)
