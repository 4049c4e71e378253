"""Definitions of the operations in float64 NumPy, written from the formulas and independent of the tested code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def unit(rows: ArrayLike) -> Array:
    """Rows [N, D] divided by their lengths; zero rows stay zero."""
    out = np.asarray(rows, dtype=np.float64).copy()
    for i, row in enumerate(out):
        length = float(np.sqrt(np.dot(row, row)))
        if length > 0:
            out[i] = row / length
    return out


def info_nce(query: ArrayLike, key: ArrayLike, queue: ArrayLike | None, temperature: float, offset: int = 0) -> Array:
    """InfoNCE loss per row [N]: the log of the sum of exponentials over all candidates, minus the logit of the
    positive.
    """
    q, k = unit(query), unit(key)
    losses = []
    for i, row in enumerate(q):
        if queue is None:
            logits = [float(row @ c) / temperature for c in k]
            positive = logits[offset + i]
        else:
            positive = float(row @ k[i]) / temperature
            logits = [positive] + [float(row @ c) / temperature for c in np.asarray(queue, dtype=np.float64)]
        top = max(logits)
        losses.append(top + np.log(sum(np.exp(z - top) for z in logits)) - positive)
    return np.array(losses)


def through_unit(rows: ArrayLike, pull: Array) -> Array:
    """Gradient with respect to the rows, given the gradient ``pull`` to the unit rows; zero for a zero row."""
    x, u = np.asarray(rows, dtype=np.float64), unit(rows)
    lengths = np.sqrt((x * x).sum(axis=1, keepdims=True))
    across = pull - (pull * u).sum(axis=1, keepdims=True) * u
    return np.where(lengths > 0, across / np.where(lengths > 0, lengths, 1), 0)


def info_nce_gradient(
    query: ArrayLike, key: ArrayLike, queue: ArrayLike | None, temperature: float, offset: int = 0
) -> Array:
    """Gradient [N, D] of the summed losses with respect to the queries.

    For a unit query it is (the mean of the candidates, weighted by their softmax, minus the positive) / temperature.
    """
    q, k = unit(query), unit(key)
    pull = np.zeros_like(q)
    for i, row in enumerate(q):
        positive = k[offset + i]
        rows = k if queue is None else np.concatenate([positive[None], np.asarray(queue, dtype=np.float64)])
        logits = rows @ row / temperature
        chances = np.exp(logits - logits.max())
        pull[i] = (chances / chances.sum() @ rows - positive) / temperature
    return through_unit(query, pull)


def residual(student: ArrayLike, teacher: ArrayLike) -> Array:
    """Residual loss per row [N]: 2 - 2 cos(student, teacher), which is 2 if either row is zero."""
    return np.array([2 - 2 * float(a @ b) for a, b in zip(unit(student), unit(teacher), strict=True)])


class Distilled(NamedTuple):
    """A loss over prototypes, its gradients [N, D] and [K, D], and the mean of the teacher's logits [K]."""

    loss: float
    to_student: Array
    to_prototypes: Array
    teacher_mean: Array


def prototype_cross_entropy(
    student: ArrayLike,
    teacher: ArrayLike,
    prototypes: ArrayLike,
    its_prototypes: ArrayLike,
    center: ArrayLike,
    pairs: Iterable[tuple[int, int]],
    temperatures: tuple[float, float],
) -> Distilled:
    """DINO's loss, pair by pair. The gradient of the cross-entropy to the student's logits is softmax minus targets."""
    s, t, w, v = (
        unit(student),
        unit(teacher),
        np.asarray(prototypes, np.float64),
        np.asarray(its_prototypes, np.float64),
    )
    of_student, of_teacher = temperatures
    pairs = list(pairs)
    loss, pull, push = 0.0, np.zeros_like(s), np.zeros_like(w)
    for i, j in pairs:
        mine, its = w @ s[i] / of_student, (v @ t[j] - np.asarray(center, np.float64)) / of_teacher
        targets = np.exp(its - its.max())
        targets /= targets.sum()
        logs = mine - mine.max() - np.log(np.exp(mine - mine.max()).sum())
        loss -= float(targets @ logs) / len(pairs)
        slope = (np.exp(logs) - targets) / (of_student * len(pairs))
        pull[i] += slope @ w
        push += np.outer(slope, s[i])
    mean = v @ t.mean(axis=0) if len(t) else np.zeros(len(v))
    return Distilled(loss, through_unit(student, pull), push, mean)


def ema(teacher: ArrayLike, student: ArrayLike, momentum: float) -> Array:
    """The moving average: momentum * teacher + (1 - momentum) * student."""
    return momentum * np.asarray(teacher, np.float64) + (1 - momentum) * np.asarray(student, np.float64)


def enqueue(queue: ArrayLike, pointer: int, keys: ArrayLike) -> tuple[Array, int]:
    """The ring queue and its pointer after the unit keys were written one by one."""
    ring = np.asarray(queue, dtype=np.float64).copy()
    for row in unit(keys):
        ring[pointer] = row
        pointer = (pointer + 1) % len(ring)
    return ring, pointer


def central_difference(loss: Callable[[Array], float], at: ArrayLike, step: float = 1e-6) -> Array:
    """Gradient of a scalar function by central differences, element by element."""
    point = np.asarray(at, dtype=np.float64).copy()
    gradient = np.zeros_like(point)
    for index in np.ndindex(*point.shape):
        values = []
        for sign in (1, -1):
            moved = point.copy()
            moved[index] += sign * step
            values.append(loss(moved))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient
