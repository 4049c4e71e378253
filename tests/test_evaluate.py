"""kNN against scikit-learn, and the gap."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastrm.config import build
from fastrm.data import open_source
from fastrm.data.sources import ArrayImages
from fastrm.evaluate import gap, knn_accuracy
from fastrm.methods import build_method


def test_knn_is_scikit_learns_on_the_same_features() -> None:
    source = open_source("digits")
    assert isinstance(source.train, ArrayImages)
    assert isinstance(source.test, ArrayImages)
    assert source.train.labels is not None
    assert source.test.labels is not None
    # Noise, so that the classifier has something to get wrong.
    rng = np.random.default_rng(0)
    bank, test = (
        images.pixels.reshape(len(images), -1) / 255 + rng.normal(0, 0.45, (len(images), 64))
        for images in (source.train, source.test)
    )
    scores = knn_accuracy(
        torch.tensor(bank), torch.tensor(source.train.labels), torch.tensor(test), torch.tensor(source.test.labels)
    )
    for k, score in scores.items():
        classifier = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute"
        )
        want = classifier.fit(bank, source.train.labels).score(test, source.test.labels)
        assert 0.3 < want < 0.99
        np.testing.assert_allclose(score, want, atol=1e-9)


def test_knn_in_chunks_and_with_a_small_bank() -> None:
    torch.manual_seed(0)
    bank, labels = torch.randn(30, 5), torch.arange(30) % 3
    test, wanted = torch.randn(200_000 // 40, 5), torch.randint(3, (200_000 // 40,))
    whole = knn_accuracy(bank, labels, test, wanted)
    parts = [knn_accuracy(bank, labels, t, w) for t, w in zip(test.split(7), wanted.split(7), strict=True)]
    sizes = [len(t) for t in test.split(7)]
    for k in whole:
        np.testing.assert_allclose(whole[k], np.average([p[k] for p in parts], weights=sizes))


def test_the_gap_of_a_copy_is_zero_where_there_is_no_predictor() -> None:
    config = build(data="digits", arch="test_resnet", image_size=32, method="mocov2", queue_size=8)
    method = build_method(config)
    images = open_source("digits").train
    assert isinstance(images, ArrayImages)
    few = images.subset(np.arange(8))
    same = gap(method, few, config, torch.device("cpu"), workers=0)
    assert all(abs(value) < 1e-6 for value in same.values())
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    apart = gap(method, few, config, torch.device("cpu"), workers=0)
    assert all(0.001 < value < 2 for value in apart.values())
    assert method.training
