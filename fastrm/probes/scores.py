"""Numbers with the interval that a finite test set leaves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrm.machine.meeting import total

Classifier = Callable[[Tensor], Mapping[str, Tensor]]
"""Features [B, C] to predicted classes, int64 [B], by the name of the score."""

EVALUATION = "evaluation.json"
"""What holds a run's scores, beside its checkpoint."""

_Z = 1.959964  # of 95 %, two-sided


class Estimate(NamedTuple):
    """A number and its 95 % interval over the choice of test images."""

    value: float
    low: float
    high: float

    @classmethod
    def of_share(cls, count: float, total: int) -> Estimate:
        """A share from 0 to 1, with Wilson's score interval (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927)."""
        share, z2 = count / total, _Z**2
        middle = (share + z2 / (2 * total)) / (1 + z2 / total)
        half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
        return cls(share, max(0.0, middle - half), min(1.0, middle + half))

    @classmethod
    def of_mean(cls, total: float, squares: float, count: int) -> Estimate:
        """A mean, from the sum and the sum of squares, with the interval of the normal distribution."""
        mean = total / count
        variance = max(0.0, squares / count - mean**2) * count / max(1, count - 1)
        half = _Z * math.sqrt(variance / count)
        return cls(mean, mean - half, mean + half)

    def json(self) -> dict[str, Any]:
        """As it is written down."""
        return {"value": self.value, "interval": [self.low, self.high]}

    def __str__(self) -> str:
        """In percent, with half of the interval's width."""
        return f"{100 * self.value:.2f} ±{50 * (self.high - self.low):.2f}"


@torch.no_grad()
def accuracies(batches: Iterable[tuple[Tensor, Tensor]], classifiers: Sequence[Classifier]) -> dict[str, Estimate]:
    """Accuracy of several classifiers in one pass over the features; memory is constant in the number of images.

    Args:
        batches: features [B, C] and labels int64 [B], on the same device.
        classifiers: what is tried; their scores' names must differ.
    """
    tally = Tally(classifiers)
    for batch, truth in batches:
        tally.add(batch, truth)
    return tally.estimates()


class Tally:
    """How often several classifiers were right.

    Args:
        classifiers: what is tried; their scores' names must differ.
    """

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        self._classifiers, self._count = classifiers, 0
        self._right: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, features: Tensor, truth: Tensor) -> None:
        """Try them on features [B, C] of labels int64 [B], on the same device."""
        self._count += len(truth)
        for classifier in self._classifiers:
            for name, predicted in classifier(features).items():
                self._right[name] = self._right.get(name, 0) + (predicted == truth).sum()

    def estimates(self, *, shared: bool = False) -> dict[str, Estimate]:
        """Accuracy by score; with ``shared`` of what all processes tried, each of them as often."""
        if not self._right:
            return {}
        counts = torch.stack([*self._right.values(), torch.full_like(next(iter(self._right.values())), self._count)])
        *right, count = (total(counts) if shared else counts).tolist()
        return {name: Estimate.of_share(found, count) for name, found in zip(self._right, right, strict=True)}
