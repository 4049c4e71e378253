"""Weighted nearest-neighbour classification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrm.machine.distributed import gather_rows, world
from fastrm.machine.meeting import everyone, swapped
from fastrm.probes.features import Share
from fastrm.probes.scores import accuracies

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_SIMILARITIES = 2**26  # similarities at a time: 256 MiB


class KNN:
    """A classifier in which the nearest rows by cosine vote with weights exp(cosine / temperature) (Wu et al., arXiv
    1805.01978).

    Args:
        bank: features of the labelled images, float32 [N, C]. They are not copied: 1.28 million rows of width 2,048
            take 10.5 GB. A call takes about half a GiB more, whatever the number of queries.
        labels: int64 [N].
        neighbours: values of k to score; a smaller bank votes with all of its rows.
        temperature: temperature of the votes.
    """

    def __init__(
        self, bank: Tensor, labels: Tensor, *, neighbours: Sequence[int] = NEIGHBOURS, temperature: float = TEMPERATURE
    ) -> None:
        self.bank, self.labels, self.neighbours, self.temperature = bank, labels, tuple(neighbours), temperature
        self.norms = bank.norm(dim=1).clamp_min(1e-12)
        self.shared, self.count = False, len(bank)
        self.classes = int(labels.max()) + 1 if len(labels) else 0

    @classmethod
    def of_share(cls, share: Share) -> KNN:
        """A classifier whose bank is divided among all processes.

        All processes must call it the same number of times, each with its own features, which may be empty.
        """
        made = cls(share.features, share.labels)
        made.shared, made.count, made.classes = world().size > 1, share.rows, share.classes
        return made

    def __call__(self, features: Tensor) -> dict[str, Tensor]:
        """Predicted classes int64 [M] of features [M, C], by ``knn10``, ``knn20``, …"""
        asked = len(features)
        if self.shared:  # all processes must pass the same number of rows
            features = nn.functional.pad(features, (0, 0, 0, max(everyone(asked)) - asked))
        rows = max(1, _SIMILARITIES // self.count)
        parts = [self._part(part) for part in features.split(rows)]
        return {name: torch.cat([part[name] for part in parts])[:asked] for name in parts[0]}

    def _nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities of the nearest rows of the bank, nearest first, and their labels; [M, at most the largest k]."""
        similarity = (nn.functional.normalize(features, dim=1) @ self.bank.T).div_(self.norms)
        nearest, index = similarity.topk(min(max(self.neighbours), len(self.bank)), dim=1)
        return nearest, self.labels[index]

    def _nearest_of_all(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Like ``_nearest``, in the bank of all processes: each process answers the queries of all from its share."""
        size, k = world().size, min(max(self.neighbours), self.count)
        nearest, voted = self._nearest(gather_rows(features)[0])
        short = (0, k - nearest.shape[1])
        found = [nn.functional.pad(nearest, short, value=-torch.inf), nn.functional.pad(voted, short)]
        nearest, voted = (
            swapped(rows.unflatten(0, (size, -1))).transpose(0, 1).flatten(1) for rows in found
        )  # [M, size * k]
        nearest, order = nearest.topk(k, dim=1)
        return nearest, voted.gather(1, order)

    def _part(self, features: Tensor) -> dict[str, Tensor]:
        nearest, voted = self._nearest_of_all(features) if self.shared else self._nearest(features)
        votes = (nearest / self.temperature).exp()
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
    """Accuracy from 0 to 1 per k, for features [M, C] and labels [M]; other arguments as in :class:`KNN`."""
    classifier = KNN(bank, bank_labels, neighbours=neighbours, temperature=temperature)
    found = accuracies(zip(test.split(1024), test_labels.split(1024), strict=True), [classifier])
    return {k: found[f"knn{k}"].value for k in neighbours}
