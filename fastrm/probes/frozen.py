"""Scores of a frozen backbone, in one pass over the images that it is built from and one over those it is tried on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastrm.data import Source
from fastrm.probes.features import Setting, features
from fastrm.probes.knn import KNN
from fastrm.probes.linear import fitted_heads
from fastrm.probes.scores import Classifier, Estimate, accuracies
from fastrm.terminal.progress import bar


def frozen_scores(
    network: nn.Module,
    source: Source,
    setting: Setting,
    *,
    knn: bool = False,
    linear: bool = False,
    others: Sequence[Classifier] = (),
    name: str = "features",
) -> dict[str, Estimate]:
    """Accuracy on ``source.test`` of classifiers that are made of the features of ``source.bank``.

    The bank's features are held, 4 bytes a value; those of the test images pass by.

    Args:
        network: images to features [B, D].
        source: with labels.
        setting: how images reach the network.
        knn, linear: which classifiers; the linear one is the quick one.
        others: more of them, ready made.
        name: of what is under way, for the person who waits.
    """
    assert source.bank is not None
    assert source.test is not None
    classifiers = list(others)
    if not (knn or linear or classifiers):
        return {}
    rows, tried = len(source.bank) if knn or linear else 0, len(source.test)
    fitting = rows if linear else 0  # as long as the bank's features take, for want of something better
    with bar(f"{name}, {rows + tried:,} images", rows + fitting + tried) as task:
        if knn or linear:
            found = features(network, source.bank, setting, task.advance)
            bank, labels = map(torch.cat, zip(*found, strict=True))
            if knn:
                classifiers.append(KNN(bank, labels))
            if linear:
                heads = fitted_heads(bank, labels, progress=lambda share: task.reach(rows + fitting * share))
                classifiers.append(heads)
        return accuracies(features(network, source.test, setting, task.advance), classifiers)
