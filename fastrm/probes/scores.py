"""Accuracies and means with confidence intervals over the test images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrm.machine.meeting import everyone

Classifier = Callable[[Tensor], Mapping[str, Tensor]]
"""Features [B, C] to predicted classes, int64 [B], by the name of the score."""


_Z = 1.959964  # standard deviations of a two-sided interval of 95 %
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval over the choice of test images."""

    value: float
    low: float
    high: float
    right: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)
    """For an accuracy: whether each readable test image was predicted right, in order."""
    above_start: Estimate | None = field(default=None, compare=False, repr=False)
    """The difference to the weights that the run started from."""

    @classmethod
    def of(cls, right: NDArray[np.bool_]) -> Estimate:
        """An accuracy with the interval of the percentile bootstrap, from whether each test image was predicted right.

        Resampling the images with replacement makes the number of right ones binomial. If all or none are right, the
        interval has no width.
        """
        total = len(right)
        share = int(right.sum()) / total
        return cls(share, *_percentiles(_random().binomial(total, share, _RESAMPLES) / total), right)

    @classmethod
    def of_mean(cls, total: float, squares: float, count: int) -> Estimate:
        """A mean, from the sum and the sum of squares, with the interval of the normal distribution."""
        mean = total / count
        variance = max(0.0, squares / count - mean**2) * count / max(1, count - 1)
        half = _Z * math.sqrt(variance / count)
        return cls(mean, mean - half, mean + half)

    def above(self, other: Estimate) -> Estimate | None:
        """The difference of two accuracies on the same test images, with the interval of the paired bootstrap.

        Resampling the images makes three counts multinomial: right in the first only, in the second only, and in both
        or none. None if it is unknown which images were right.
        """
        if self.right is None or other.right is None or len(self.right) != len(other.right):
            return None
        total = len(self.right)
        more, less = (int((a & ~b).sum()) for a, b in ((self.right, other.right), (other.right, self.right)))
        drawn = _random().multinomial(total, np.array([more, less, total - more - less]) / total, _RESAMPLES)
        return Estimate((more - less) / total, *_percentiles((drawn[:, 0] - drawn[:, 1]) / total))

    def json(self) -> dict[str, Any]:
        """JSON-compatible values."""
        found: dict[str, Any] = {"value": self.value, "interval": [self.low, self.high]}
        return found | ({} if self.above_start is None else {"above_start": self.above_start.json()})

    def __str__(self) -> str:
        """The value in percent, with half of the interval's width."""
        return f"{100 * self.value:.2f} ±{50 * (self.high - self.low):.2f}"


def _random() -> np.random.Generator:
    """A new generator with a fixed seed, so that the same images give the same interval."""
    return np.random.default_rng(0)


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@torch.no_grad()
def accuracies(batches: Iterable[tuple[Tensor, Tensor]], classifiers: Sequence[Classifier]) -> dict[str, Estimate]:
    """Accuracy of several classifiers in one pass over the features, with one byte of memory per image and classifier.

    Args:
        batches: features [B, C] and labels int64 [B], on the same device.
        classifiers: classifiers with different names of scores.
    """
    tally = Tally(classifiers)
    for batch, truth in batches:
        tally.add(batch, truth)
    return tally.estimates()


class Tally:
    """Counts the right predictions of several classifiers.

    Args:
        classifiers: classifiers with different names of scores.
    """

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        self._classifiers = classifiers
        self._right: dict[str, list[Tensor]] = {}
        self._indices: list[int] = []
        self._count = 0

    @torch.no_grad()
    def add(self, features: Tensor, truth: Tensor, indices: Sequence[int] | None = None) -> None:
        """Add the predictions for features [B, C] with labels int64 [B], on the same device.

        Args:
            features, truth: of the images.
            indices: indices of the test images; None continues after the last ones.
        """
        self._indices += range(self._count, self._count + len(truth)) if indices is None else indices
        self._count += len(truth)
        for classifier in self._classifiers:
            for name, predicted in classifier(features).items():
                self._right.setdefault(name, []).append(predicted == truth)

    def estimates(self, *, shared: bool = False) -> dict[str, Estimate]:
        """Accuracy per score; with ``shared`` over all processes, each of which must call this."""
        if not self._right:
            return {}
        own = torch.stack([torch.cat(parts) for parts in self._right.values()]).cpu().numpy()
        found = everyone((self._indices, own)) if shared else [(self._indices, own)]
        order = np.argsort(np.concatenate([np.array(indices, dtype=np.int64) for indices, _ in found]))
        rows = np.concatenate([rows for _, rows in found], axis=1)[:, order]
        return {name: Estimate.of(right) for name, right in zip(self._right, rows, strict=True)}
