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


def frozen_scores(
    network: nn.Module,
    source: Source,
    setting: Setting,
    *,
    knn: bool = False,
    linear: bool = False,
    others: Sequence[Classifier] = (),
) -> dict[str, Estimate]:
    """Accuracy on ``source.test`` of classifiers that are made of the features of ``source.bank``.

    The bank's features are held, 4 bytes a value; those of the test images pass by.

    Args:
        network: images to (pooled features, map).
        source: with labels.
        setting: how images reach the network.
        knn, linear: which classifiers; the linear one is the quick one.
        others: more of them, ready made.
    """
    assert source.bank is not None
    assert source.test is not None
    classifiers = list(others)
    if knn or linear:
        bank, labels = map(torch.cat, zip(*features(network, source.bank, setting), strict=True))
        if knn:
            classifiers.append(KNN(bank, labels))
        if linear:
            classifiers.append(fitted_heads(bank, labels))
    if not classifiers:
        return {}
    return accuracies(features(network, source.test, setting), classifiers)
