"""Scores against scikit-learn and SciPy, the gap, the collapse warning and the online classifier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks._timing import extra_memory
from fastrm import train
from fastrm.data import open_source
from fastrm.data.sources import ArrayImages
from fastrm.methods import LinearProtocol, build_method, find
from fastrm.models import Backbone, build_backbone
from fastrm.probes import (
    KNN,
    Estimate,
    LinearHeads,
    OnlineLinear,
    Pixels,
    accuracies,
    collapsed,
    effective_rank,
    feature_std,
    features,
    fine_tuned,
    fitted_heads,
    frozen_scores,
    gap,
    knn_accuracy,
    published_linear,
)
from fastrm.probes.features import Setting
from fastrm.probes.finetune import fraction_of
from fastrm.probes.gap import stages_of
from fastrm.probes.linear import rate_factor
from fastrm.settings.config import Config, build
from tests.conftest import FASHION_MNIST

Small = Callable[..., Config]
CPU = torch.device("cpu")
HERE = Setting(32, CPU, 0)


class Tiny(nn.Module):
    """A backbone of one layer on 8x8 pixels: [B, 3, H, W] to [B, 32]."""

    dim = 32

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 8 * 8, self.dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(Pixels(8)(images)).relu()


@pytest.fixture(scope="module")
def fashion() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Fashion-MNIST as 49 features, the means of 4x4 pixels: training features and labels, test features and labels."""
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"needs Fashion-MNIST in {FASHION_MNIST}")
    source = open_source("fashion-mnist", FASHION_MNIST)
    parts = []
    for images in (source.train, source.test):
        assert isinstance(images, ArrayImages)
        assert images.labels is not None
        blocks = images.arrays.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49) / 255
        parts += [blocks.astype(np.float32), images.labels]
    return tuple(parts)  # type: ignore[return-value]


def test_knn_equals_scikit_learn_on_fashion_mnist(fashion: tuple[NDArray[np.float32], ...]) -> None:
    bank, labels, test, truth = fashion
    bank, labels, test, truth = bank[:15_000], labels[:15_000], test[:1500], truth[:1500]
    scores = knn_accuracy(*(torch.from_numpy(part) for part in (bank, labels, test, truth)))
    assert list(scores) == [10, 20, 100, 200]
    for k, score in scores.items():
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute")
        want = theirs.fit(bank.astype(np.float64), labels).score(test.astype(np.float64), truth)
        assert 0.6 < want < 0.95
        assert abs(score - want) <= 0.002


def test_knn_equals_scikit_learn_exactly_in_float64() -> None:
    source = open_source("digits")
    assert isinstance(source.train, ArrayImages)
    assert isinstance(source.test, ArrayImages)
    # Noise makes the classification imperfect.
    rng = np.random.default_rng(0)
    bank, test = (
        images.arrays.reshape(len(images), -1) / 255 + rng.normal(0, 0.45, (len(images), 64))
        for images in (source.train, source.test)
    )
    labels, truth = torch.tensor(source.train.labels), torch.tensor(source.test.labels)
    for k, score in knn_accuracy(torch.tensor(bank), labels, torch.tensor(test), truth, neighbours=(1, 20)).items():
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute")
        want = theirs.fit(bank, source.train.labels).score(test, source.test.labels)
        assert 0.3 < want < 0.99
        np.testing.assert_allclose(score, want, atol=1e-9)


def test_knn_in_parts_with_a_small_bank_and_in_constant_memory() -> None:
    torch.manual_seed(0)
    bank, labels = torch.randn(30, 5), torch.arange(30) % 3
    test, truth = torch.randn(500, 5), torch.randint(3, (500,))
    whole = knn_accuracy(bank, labels, test, truth)
    parts = accuracies(zip(test.split(7), truth.split(7), strict=True), [KNN(bank, labels)])
    assert {k: parts[f"knn{k}"].value for k in whole} == whole

    large = KNN(torch.randn(2**15, 16), torch.randint(10, (2**15,)), neighbours=(20,))
    truth = torch.zeros(256, dtype=torch.int64)
    few, many = (
        extra_memory(lambda n=n: accuracies(((torch.ones(256, 16), truth) for _ in range(n)), [large])) for n in (3, 12)
    )
    # MiB: the similarities of one part of 256 queries, and temporary memory of topk and of a batch of queries
    assert many < few + 1 < 180


@pytest.mark.parametrize("images", [15_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_linear_equals_scikit_learn_on_fashion_mnist(images: int, fashion: tuple[NDArray[np.float32], ...]) -> None:
    """Both minimise the mean cross-entropy + 5e-5 |weights|^2 on standardised features."""
    bank, labels, test, truth = fashion
    bank, labels = bank[:images], labels[:images]
    fitted = fitted_heads(torch.from_numpy(bank), torch.from_numpy(labels))
    ours = accuracies([(torch.from_numpy(test), torch.from_numpy(truth))], [fitted])["linear_quick"]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (1e-4 * len(bank)), max_iter=1000))
    want = theirs.fit(bank, labels).score(test, truth)
    assert 0.7 < want < 0.9
    assert abs(ours.value - want) <= 0.002


def test_each_head_follows_sgd_at_its_own_learning_rate() -> None:
    """Each head equals the recursion in NumPy: v <- 0.9 v + gradient + decay, w <- w - learning rate * v."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    seen = np.ones((2, 40), dtype=bool)
    seen[0, ::4] = False
    heads = LinearHeads(5, 3, (0.1, 0.5), weight_decay=0.01, device=CPU)
    w, b = np.zeros((2, 3, 5)), np.zeros((2, 3))
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    for factor in (1.0, 0.5, 0.25):
        inputs = torch.tensor(x, dtype=torch.float32)
        logits = heads.step(inputs, torch.tensor(y), factor, seen=torch.tensor(seen))
        for h, rate in enumerate((0.1, 0.5)):
            scores = x @ w[h].T + b[h]
            np.testing.assert_allclose(logits[h], scores, atol=1e-5)
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p = (p / p.sum(axis=1, keepdims=True) - np.eye(3)[y])[seen[h]] / seen[h].sum()
            vw[h] = 0.9 * vw[h] + p.T @ x[seen[h]] + 0.01 * w[h]
            vb[h] = 0.9 * vb[h] + p.sum(axis=0)
            w[h] -= rate * factor * vw[h]
            b[h] -= rate * factor * vb[h]
    np.testing.assert_allclose(heads.logits(inputs).detach()[1], x @ w[1].T + b[1], atol=1e-5)


def test_protocols_have_the_published_schedules() -> None:
    v2, v3 = find("mocov2").linear_protocol, find("mocov3").linear_protocol
    assert (v2.lr, v2.batch_size, v2.epochs, v3.lr, v3.batch_size, v3.epochs) == (30, 256, 100, 0.1, 1024, 90)
    assert (find("densecl").linear_protocol, find("byol").linear_protocol) == (v2, v3)
    assert [rate_factor(v2, epoch / 100) for epoch in (0, 59, 60, 79, 80)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [rate_factor(v3, share) for share in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_classifiers_learn_and_do_not_change_the_network() -> None:
    source = open_source("digits")
    torch.manual_seed(0)
    network = build_backbone("test_resnet", image_size=32, stem="imagenet")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    scores = frozen_scores({"it": network}, source, HERE, knn=True, linear=True)["it"]
    assert scores["linear_quick"].value > 0.7
    networks = {"it": network, "pixels": Pixels(8)}
    classifiers = published_linear(networks, source, HERE, LinearProtocol(lr=0.1, batch_size=128, epochs=5))
    assert source.test is not None
    found = accuracies(features(networks["pixels"], source.test, HERE), [classifiers["pixels"]])
    assert found["linear"].value > 0.6  # chance is 0.1; 0.75 was measured
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_pixels_are_those_of_the_image() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8)
    flat = Pixels(32)(images)
    np.testing.assert_array_equal(flat, images.reshape(2, -1))
    halved = Pixels(4)(images)
    np.testing.assert_allclose(halved, images.numpy().reshape(2, 3, 4, 2, 4, 2).mean(axis=(3, 5)).reshape(2, -1))


def test_a_fraction_has_every_class_and_fine_tuning_learns_from_it() -> None:
    source = open_source("digits")
    assert source.bank is not None
    assert source.test is not None
    few = fraction_of(source.bank, 0.1)
    assert few.labels is not None
    counts = np.bincount(few.labels)
    assert len(few) == pytest.approx(0.1 * len(source.bank), abs=5)
    assert counts.min() >= 0.8 * counts.max()
    np.testing.assert_array_equal(np.bincount(fraction_of(source.bank, 1e-6).labels), np.ones(10))
    network = Tiny()
    before = network.layer.weight.clone()
    tuned, classifier = fine_tuned(network, source, HERE, 0.5, epochs=20)  # type: ignore[arg-type]
    found = accuracies(features(tuned, source.test, HERE), [classifier])
    assert found["semi"].value > 0.6  # chance is 0.1
    assert torch.equal(network.layer.weight, before)
    assert not torch.equal(tuned.get_parameter("layer.weight"), before)


@pytest.mark.parametrize(("right", "total"), [(7, 10), (93, 100), (1_800, 2_000), (50, 50), (0, 5)])
def test_intervals_equal_the_bootstrap_of_scipy(right: int, total: int) -> None:
    """The intervals are for a proportion, and for the difference of two proportions that are paired by image."""
    rng = np.random.default_rng(1)
    ours = rng.permutation(total) < right
    theirs = np.where(rng.random(total) < 0.8, ours, rng.random(total) < 0.5)  # mostly equal, which the pairing uses
    found, difference = Estimate.of(ours), Estimate.of(ours).above(Estimate.of(theirs))
    assert difference is not None
    assert found.value == pytest.approx(right / total)
    assert difference.value == pytest.approx(ours.mean() - theirs.mean())
    for values, estimate in ((ours * 1.0, found), (ours * 1.0 - theirs, difference)):
        if np.ptp(values) == 0:  # SciPy gives no interval here
            assert estimate.low == estimate.high == values[0]
            continue
        options = {"method": "percentile", "n_resamples": 10_000, "rng": 2}
        want = bootstrap((values,), np.mean, **options).confidence_interval
        # random errors of both, and the step size of a proportion
        noise = 3 * np.std(values) / np.sqrt(total) * 0.03 + 0.6 / total
        np.testing.assert_allclose((estimate.low, estimate.high), (want.low, want.high), atol=noise)
    assert found.json() == {"value": found.value, "interval": [found.low, found.high]}
    assert Estimate(0.5, 0.4, 0.6).above(found) is None


def test_the_gap_per_layer_and_of_a_copy() -> None:
    config = build(data="digits", arch="test_resnet", image_size=32, method="mocov2", queue_size=8)
    method = build_method(config)
    images = open_source("digits").train
    assert isinstance(images, ArrayImages)
    few = images.subset(np.arange(8))
    same = gap(method, few, HERE)
    assert list(same) == ["act1", "layer1", "layer2", "layer3", "layer4", "backbone", "projector", "output"]
    assert all(abs(found.value) < 1e-6 for found in same.values())
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    apart = gap(method, few, HERE)
    assert all(0.001 < found.low < found.value < found.high < 2 for found in apart.values())
    assert method.training
    assert method.student.training


def test_spread_and_rank_detect_a_collapse() -> None:
    torch.manual_seed(0)
    healthy = torch.randn(200, 64)
    np.testing.assert_allclose(feature_std(healthy), 1, atol=0.05)
    one = torch.randn(64) + 1e-4 * torch.randn(200, 64)
    assert feature_std(one) < 0.001
    line = torch.randn(200, 1) * torch.randn(64)
    np.testing.assert_allclose(effective_rank(line), 1, atol=1e-3)
    few = nn.functional.normalize(torch.randn(200, 5) @ torch.linalg.qr(torch.randn(64, 5))[0].T, dim=1).double()
    singular = np.linalg.svd(few.numpy() - few.numpy().mean(axis=0), compute_uv=False)
    share = singular[singular > 1e-9] / singular.sum()
    np.testing.assert_allclose(effective_rank(few.float()), np.exp(-(share * np.log(share)).sum()), rtol=1e-3)
    assert collapsed(0.001, 30, 64) is not None
    assert collapsed(0.4, 1.1, 64) is not None
    assert collapsed(0.4, 30, 64) is None
    assert collapsed(0.4, 1.0, 2) is None  # two images always span one direction
    assert effective_rank(torch.full((9, 4), torch.nan)) == 1
    assert collapsed(float("nan"), 1.0, 64) is None


def test_a_run_warns_when_it_collapses(
    small: Small, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(small(max_steps=2))
    assert "collapsed" not in capsys.readouterr().out

    def dead(*args: object, **options: object) -> nn.Module:
        method = build_method(*args, **options)  # type: ignore[arg-type]
        method.student.backbone.register_forward_hook(lambda _, __, given: 1 + 1e-4 * given)
        return method

    monkeypatch.setattr("fastrm.run.assemble.build_method", dead)
    train.train(small(max_steps=2, resume="never"))
    assert "collapsed" in capsys.readouterr().out


def test_the_online_classifier_learns_and_skips_non_finite_features() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    inputs = torch.tensor(np.eye(3)[labels] + rng.normal(0, 0.1, (300, 3)), dtype=torch.float32)
    online = OnlineLinear(3, labels, batch_size=256, device=CPU)
    for step in range(60):
        indices = rng.integers(0, 300, 32).tolist()
        batch = inputs[indices]
        batch[0, 0] = torch.nan
        online.step(batch, indices, step / 60)
    assert online.accuracy() > 0.8
    assert online.accuracy() == 0
    assert (online(inputs)["online"] == torch.tensor(labels)).float().mean() > 0.95


@pytest.mark.usefixtures("few_digits")
def test_an_online_classifier_does_not_change_the_run(small: Small, tmp_path: Path) -> None:
    plain = train.train(small(out=tmp_path / "a", eval_every=1, epochs=1, batch_size=40))
    along = train.train(small(out=tmp_path / "b", eval_every=1, epochs=1, batch_size=40, online_linear=True))
    assert {name: along[name] for name in ("loss", "gap", "knn_student")} == {
        name: plain[name] for name in ("loss", "gap", "knn_student")
    }
    assert 0 <= along["online_accuracy"] <= 1
    assert 0 <= along["linear_student"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert all("online_accuracy" in line for line in lines if "loss" in line)


def test_stages_without_a_single_output_tensor_are_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.windows = nn.Identity(), nn.Identity(), nn.Identity()
            self.two.forward = lambda x: (x, x)  # type: ignore[method-assign]
            self.windows.forward = lambda x: x.repeat(4, 1, 1, 1)  # type: ignore[method-assign]
            self.feature_info = [{"module": name} for name in ("one", "two", "windows", "gone", "")] + [{"index": 0}]

        def forward_features(self, x: Tensor) -> Tensor:
            self.windows(x)
            return self.two(self.one(x))[0]

        def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
            return x.mean(dim=(2, 3))

    backbone = Backbone(Odd(), 3, 3)
    with stages_of(backbone) as caught:
        backbone(torch.zeros(2, 3, 4, 4))
    assert list(caught) == ["one"]
