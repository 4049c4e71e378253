"""The losses between a student's queries and a teacher's keys.

The fused backends provide the first derivative for ``backward()``. Under a transform of torch.func and under
forward-mode AD, ``backend=None`` means the reference, which has every derivative, and other backends raise an error. A
second derivative (``create_graph=True``) raises an error unless ``backend="reference"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _fused, reference
from ._scoring import Scoring
from .dispatch import check_no_grad, check_number, check_once, check_rows, choose_derivable
from .queue import ENQUEUE, as_scored, check_ring

_REDUCTIONS = ("mean", "sum", "none")


def _loss(backend: str, scoring: Scoring) -> Tensor:
    return _fused.differentiable(backend, scoring)[0]


def _loss_and_parts(backend: str, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
    loss, losses = _fused.differentiable(backend, scoring)
    return loss, losses[1], losses[2]


def _with_own_queue(scoring: Scoring) -> Scoring:
    """``scoring`` with a copy of the queue if the backward pass reads it, before which a push may overwrite rows."""
    gradient = scoring.query.requires_grad and torch.is_grad_enabled()
    if scoring.queue is None or not gradient or torch._C._are_functorch_transforms_active():
        return scoring
    return scoring._replace(queue=as_scored(scoring.queue))


def _plain_info_nce(scoring: Scoring) -> Tensor:
    return reference.info_nce(_with_own_queue(scoring))


def _plain_residual_info_nce(scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
    found = reference.residual_info_nce(_with_own_queue(scoring))
    if scoring.pointer is not None:
        ENQUEUE["reference"](scoring.queue, scoring.pointer, scoring.push, None)
    return found


def _backends(plain: Callable[..., Any], fused: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {"reference": plain} | {backend: partial(fused, backend) for backend in _fused.BACKENDS}


_INFO_NCE = _backends(_plain_info_nce, _loss)
_RESIDUAL = _backends(reference.residual_loss, _loss)
_RESIDUAL_INFO_NCE = _backends(_plain_residual_info_nce, _loss_and_parts)


def _check_reduction(op: str, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction={reduction!r} must be one of {', '.join(_REDUCTIONS)}")


def _check_teacher_rows(op: str, name: str, rows: Tensor, query: Tensor) -> None:
    check_rows(op, name, rows, dim=query.shape[1], device=query.device)
    check_no_grad(op, name, rows)


def _check_contrast(op: str, query: Tensor, key: Tensor, queue: Tensor | None, key_offset: int) -> None:
    check_rows(op, "query", query)
    _check_teacher_rows(op, "key", key, query)
    n, m = query.shape[0], key.shape[0]
    if isinstance(key_offset, bool) or not isinstance(key_offset, (int, torch.SymInt)):
        raise TypeError(f"{op}: key_offset is a {type(key_offset).__name__}; it must be an int")
    if queue is not None:
        _check_teacher_rows(op, "queue", queue, query)
        if m != n or key_offset != 0:
            raise ValueError(
                f"{op}: with a queue, row i of key is the positive of row i of query: key must have {n} rows and "
                f"key_offset must be 0; they are {m} and {key_offset}"
            )
    elif not 0 <= key_offset <= m - n:
        raise ValueError(
            f"{op}: key_offset={key_offset} with {n} queries and {m} keys; the positives are rows key_offset to "
            f"key_offset + {n} of key, so it must be from 0 to {m - n}" + ("" if m >= n else ": key has too few rows")
        )


def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    key_offset: int = 0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE: cross-entropy of the positive key among all candidates (van den Oord et al., arXiv 1807.03748).

    Queries and keys are normalised inside, in float32; logits are cosines over ``temperature``. There is no factor
    of 2·temperature; MoCo-v3's loss has one, so multiply by it. Gradient flows to ``query`` only. A zero row counts as
    cosine 0 with everything and has a zero gradient.

    Args:
        query: [N, D] student outputs.
        key: with a queue [N, D], row i being the positive of query i; without one [M, D], the positive of query i
            being row ``key_offset + i`` and all other rows its negatives (M = N × world size when gathered).
        queue: [K, D] negatives, used as stored, or ``None`` for in-batch negatives.
        temperature: number above 0 or 0-d tensor.
        key_offset: row of ``key`` that is the positive of query 0; 0 with a queue.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one loss per row, [N]).
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        The loss, float32 (float64 where an input is float64). The mean over no rows is 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, a key or queue requires grad, or the backend
            is not available.
    """
    _check_contrast("info_nce", query, key, queue, key_offset)
    check_number("info_nce", "temperature", temperature, query.device, low=0, open_low=True)
    _check_reduction("info_nce", reduction)
    scoring = Scoring(query, key, queue=queue, temperature=temperature, key_offset=key_offset, reduction=reduction)
    loss: Tensor = choose_derivable("info_nce", backend, _INFO_NCE, query)(scoring)
    return loss


def residual_loss(student: Tensor, teacher: Tensor, *, reduction: str = "mean", backend: str | None = None) -> Tensor:
    """The residual term between student and teacher on the same view: 2 - 2 cos(student, teacher).

    The same expression between two views is BYOL's loss (Grill et al., arXiv 2006.07733). Rows are normalised
    inside, in float32. Gradient flows to ``student`` only; a zero row has loss 2 and a zero gradient.

    Args:
        student: [N, D].
        teacher: [N, D].
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one loss per row, [N]).
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        The loss, float32 (float64 where an input is float64), from 0 to 4 per row.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, ``teacher`` requires grad, or the backend
            is not available.
    """
    check_rows("residual_loss", "student", student)
    _check_teacher_rows("residual_loss", "teacher", teacher, student)
    if student.shape != teacher.shape:
        raise ValueError(
            f"residual_loss: student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; "
            "they must be alike"
        )
    _check_reduction("residual_loss", reduction)
    scoring = Scoring(student, same=teacher, residual_weight=1.0, contrastive_weight=0.0, reduction=reduction)
    loss: Tensor = choose_derivable("residual_loss", backend, _RESIDUAL, student)(scoring)
    return loss


def residual_info_nce(
    query: Tensor,
    key: Tensor,
    same_view_key: Tensor,
    queue: Tensor | None = None,
    pointer: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    residual_weight: float | Tensor = 1.0,
    contrastive_weight: float | Tensor = 1.0,
    key_offset: int = 0,
    push: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE between two views, the residual term on the same view, and the queue update in one call.

    ``loss = contrastive_weight * info_nce(query, key, queue) + residual_weight * residual_loss(query, same_view_key)``,
    with means over the rows. With ``pointer``, the keys enter the queue after scoring.

    Args:
        query: [N, D] student outputs, which alone receive a gradient.
        key: as in :func:`info_nce`.
        same_view_key: [N, D] teacher outputs on the view that ``query`` saw.
        queue: [K, D] negatives or ``None``; changed in place when ``pointer`` is given.
        pointer: 0-d int64 tensor, the row of ``queue`` that is written next; ``None`` does not change the queue. Not
            allowed under activation checkpointing or torch.func, where the push may run more or less than once.
        temperature: number above 0 or 0-d tensor.
        residual_weight: number or 0-d tensor.
        contrastive_weight: number or 0-d tensor.
        key_offset: as in :func:`info_nce`.
        push: [B, D] keys to put into the queue instead of ``key``; only with ``pointer``.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Returns:
        (loss, contrastive, residual), 0-d; the two parts are unweighted and detached.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, a key or queue requires grad, or the backend
            is not available.
        RuntimeError: ``pointer`` is given under activation checkpointing or torch.func.
    """
    op = "residual_info_nce"
    _check_contrast(op, query, key, queue, key_offset)
    _check_teacher_rows(op, "same_view_key", same_view_key, query)
    if same_view_key.shape != query.shape:
        raise ValueError(
            f"{op}: same_view_key has shape {tuple(same_view_key.shape)}; it must be {tuple(query.shape)} like query"
        )
    check_number(op, "temperature", temperature, query.device, low=0, open_low=True)
    check_number(op, "residual_weight", residual_weight, query.device)
    check_number(op, "contrastive_weight", contrastive_weight, query.device)
    if pointer is not None:
        if queue is None:
            raise ValueError(f"{op}: pointer is given without a queue to push into")
        check_ring(op, queue, pointer)
        check_once(op)
    if push is not None:
        if pointer is None:
            raise ValueError(f"{op}: push is given without a pointer to the row to write")
        check_rows(op, "push", push, dim=query.shape[1], device=query.device)
    scoring = Scoring(
        query,
        key,
        same_view_key,
        queue,
        pointer,
        None if pointer is None else key if push is None else push,
        temperature,
        residual_weight,
        contrastive_weight,
        key_offset,
    )
    found: tuple[Tensor, Tensor, Tensor] = choose_derivable(op, backend, _RESIDUAL_INFO_NCE, query)(scoring)
    return found
