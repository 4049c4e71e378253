"""The arguments of a loss in the form that all backends take, checked by the public functions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scoring(NamedTuple):
    """Queries, keys, queue and weights of a contrastive loss.

    The loss is ``contrastive_weight`` times InfoNCE, if there is a ``key``, plus ``residual_weight`` times the residual
    term, if there is a ``same``-view key. Numbers may be 0-d tensors.
    """

    query: Tensor
    """[N, D]"""
    key: Tensor | None = None
    """[N, D] with a queue, else [M, D]."""
    same: Tensor | None = None
    """[N, D] teacher outputs on the view of the queries."""
    queue: Tensor | None = None
    """[K, D] negatives; None for in-batch negatives from ``key``."""
    pointer: Tensor | None = None
    """0-d int64, the row of the queue that is written next; None for no push."""
    push: Tensor | None = None
    """[B, D] keys that enter the queue after scoring."""
    temperature: float | Tensor = 1.0
    residual_weight: float | Tensor = 0.0
    contrastive_weight: float | Tensor = 1.0
    key_offset: int = 0
    """The row of ``key`` that is the positive of query 0."""
    reduction: str = "mean"


def numbers_of(scoring: Scoring) -> tuple[float | Tensor, ...]:
    """Temperature, residual and contrastive weight; no property, which torch.compile of torch 2.9 cannot trace."""
    return scoring.temperature, scoring.residual_weight, scoring.contrastive_weight


class Assignment(NamedTuple):
    """Rows of student and teacher, and the prototypes that both are assigned to. Numbers may be 0-d tensors."""

    student: Tensor
    """[N, D]"""
    teacher: Tensor
    """[M, D]"""
    prototypes: Tensor
    """[K, D], the student's."""
    teacher_prototypes: Tensor | None
    """[K, D]; None if the teacher uses the student's."""
    center: Tensor | None
    """[K], subtracted from the teacher's logits."""
    pairs: Tensor | None
    """[P, 2] int64, each a row of the student and a row of the teacher; None pairs row i with row i."""
    student_temperature: float | Tensor
    teacher_temperature: float | Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All floating tensors except the temperatures."""
        return self[:5]
