"""Weighted nearest-neighbour classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrm.probes.scores import accuracies

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_SIMILARITIES = 2**26  # held at a time: 256 MiB


class KNN:
    """The nearest by cosine vote with exp(cosine / temperature) (Wu et al., arXiv 1805.01978).

    Args:
        bank: float32 [N, C] features that neighbours are looked up in. They are not copied: 1.28 million of width
            2,048 take 10.5 GB, and what a call takes besides is about half a GiB, whatever the number of queries.
        labels: int64 [N].
        neighbours: the k to score; a bank of fewer rows votes with all of them.
        temperature: of the votes.
    """

    def __init__(
        self, bank: Tensor, labels: Tensor, *, neighbours: Sequence[int] = NEIGHBOURS, temperature: float = TEMPERATURE
    ) -> None:
        self.bank, self.labels, self.neighbours, self.temperature = bank, labels, tuple(neighbours), temperature
        self.norms = bank.norm(dim=1).clamp_min(1e-12)
        self.classes = int(labels.max()) + 1

    def __call__(self, features: Tensor) -> dict[str, Tensor]:
        """Predicted classes int64 [M] of features [M, C], by ``knn10``, ``knn20``, …"""
        rows = max(1, _SIMILARITIES // len(self.bank))
        parts = [self._part(part) for part in features.split(rows)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _part(self, features: Tensor) -> dict[str, Tensor]:
        similarity = (nn.functional.normalize(features, dim=1) @ self.bank.T).div_(self.norms)
        nearest, index = similarity.topk(min(max(self.neighbours), len(self.bank)), dim=1)
        votes, voted = (nearest / self.temperature).exp(), self.labels[index]
        predicted = {}
        for k in self.neighbours:
            tally = votes.new_zeros(len(features), self.classes).scatter_add_(1, voted[:, :k], votes[:, :k])
            predicted[f"knn{k}"] = tally.argmax(dim=1)
        return predicted


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Accuracy from 0 to 1 by k of features [M, C] and labels [M], the arguments otherwise as in :class:`KNN`."""
    classifier = KNN(bank, bank_labels, neighbours=neighbours, temperature=temperature)
    found = accuracies(zip(test.split(1024), test_labels.split(1024), strict=True), [classifier])
    return {k: found[f"knn{k}"].value for k in neighbours}
