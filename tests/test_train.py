"""Training end to end: every method on every kind of data, resuming, the run folder, and the gap."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrm import train
from fastrm.data import Batch, make_loader
from fastrm.errors import TrainingError, UsageError
from fastrm.methods import build_method
from fastrm.run import checkpoint
from fastrm.settings.config import Config
from tests.conftest import FASHION_MNIST

Small = Callable[..., Config]
METHODS = ["mocov3", "mocov2", "byol", "densecl"]
OPTIMIZERS = ["lars", "sgd", "adamw"]
# Each method with one of the optimizers; the other pairs are slow.
PAIRS = [
    pytest.param(method, name, marks=() if i % 3 == j else pytest.mark.slow)
    for i, method in enumerate(METHODS)
    for j, name in enumerate(OPTIMIZERS)
]


def records(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(first: Any, second: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


KINDS = ["digits", "fashion-mnist", "split", "classes", "flat"]
# Each kind of data with one of the methods; the other pairs are slow.
OFTEN = {*zip(itertools.cycle(METHODS), KINDS, strict=False)}


@pytest.mark.parametrize(
    ("method", "data"),
    [
        pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow)
        for pair in itertools.product(METHODS, KINDS)
    ],
)
def test_every_method_trains_on_every_kind_of_data(
    method: str, data: str, small: Small, pictures: Path, tmp_path: Path
) -> None:
    if data == "fashion-mnist" and not FASHION_MNIST.is_dir():
        pytest.skip(f"needs Fashion-MNIST in {FASHION_MNIST} (Debian: apt-get install dataset-fashion-mnist)")
    folder = data in ("split", "classes", "flat")
    config = small(
        data=str(pictures / data) if folder else data, data_root=FASHION_MNIST, method=method, epochs=40,
        batch_size=24, max_steps=24, optimizer="sgd", lr=0.5, teacher_momentum=0.9, temperature=0.5, queue_size=72,
    )  # fmt: skip
    train.train(config)
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert np.isfinite(losses).all()
    # The first keys of a queue are random and easy. They have left it after 72 / 24 steps, so losses are compared from
    # that step on.
    begin = 3 if method in ("mocov2", "densecl") else 0
    assert np.mean(losses[-6:]) < np.mean(losses[begin : begin + 3])


def test_the_run_folder_has_all_files_and_metrics(small: Small, tmp_path: Path) -> None:
    summary = train.train(small(epochs=1, max_steps=None, batch_size=480, eval_every=1, log_every=2))
    out = tmp_path / "run"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "backbone.safetensors", "summary.json", "tensorboard",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["batch_size"] == 480
    steps, scores = records(out)[:-1], records(out)[-1]
    assert [record["step"] for record in steps] == [1, 2]
    assert set(steps[0]) == {
        "step", "epoch", "loss", "contrastive", "residual", "gap", "lr", "teacher_momentum", "skipped_steps",
        "images_per_second", "feature_std", "effective_rank",
    }  # fmt: skip
    for record in steps:
        np.testing.assert_allclose(record["loss"], record["contrastive"] + 0.1 * record["residual"], rtol=1e-6)
        np.testing.assert_allclose(record["gap"], record["residual"] / 2, rtol=1e-6)
    assert {"step", "epoch", "knn_student", "knn_teacher"} <= set(scores)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["knn_teacher"] == scores["knn_teacher"]
    weights = load_file(out / "backbone.safetensors")
    with safe_open(out / "backbone.safetensors", "pt") as file:
        assert file.metadata()["which"] == "student"
    state = checkpoint.load(out)["method"]
    assert all(torch.equal(value, state[f"student.backbone.net.{name}"]) for name, value in weights.items())
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2]
    assert {"gap", "residual", "knn_student"} <= set(board.Tags()["scalars"])


def test_the_backbone_loads_strictly_into_timm(small: Small, tmp_path: Path) -> None:
    train.train(small(arch="resnet10t", image_size=96, batch_size=8, max_steps=1))
    weights = load_file(tmp_path / "run" / "backbone.safetensors")
    timm.create_model("resnet10t", num_classes=0).load_state_dict(weights, strict=True)


def assert_as_uninterrupted(out: Path, whole: Path) -> None:
    """Assert that checkpoint and metrics of two runs are equal, apart from images per second."""
    states = [checkpoint.load(folder) for folder in (whole, out)]
    for name in ("method", "optimizer", "random", "step"):
        assert same(states[0][name], states[1][name]), name
    timeless = [[{k: v for k, v in r.items() if k != "images_per_second"} for r in records(o)] for o in (whole, out)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "method", ["mocov3", "mocov2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("byol", "densecl"))]
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    method: str, small: Small, pictures: Path, tmp_path: Path
) -> None:
    leaves = {"data": str(pictures / "flat"), "method": method, "accumulate": 2, "epochs": 2, "max_steps": 8}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.train(small(**leaves, out=whole))
    for steps in (1, 4, 8):  # 6 steps per epoch: the last part crosses into the second epoch
        train.train(small(**{**leaves, "max_steps": steps}, out=cut, workers=steps % 2))
    assert_as_uninterrupted(cut, whole)


def test_one_seed_gives_the_same_bits_and_another_does_not(small: Small, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train.train(small(seed=seed, out=tmp_path / name))
    states = [checkpoint.load(tmp_path / name)["method"] for name in "abc"]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_metrics_after_the_checkpoint_of_an_interrupted_run_are_dropped(small: Small, tmp_path: Path) -> None:
    train.train(small(max_steps=2))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "epoch": 1.0, "loss": 0}\n{"step": 4, "ep')
    train.train(small(max_steps=4))
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    assert all(record["loss"] != 0 for record in records(tmp_path / "run"))


def test_resume_choices(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = train.train(small(max_steps=2))
    assert train.train(small(max_steps=2)) == first  # complete: no step is made
    assert "complete after 2 steps" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--lr was 0.6, is 0.1"):
        train.train(small(max_steps=3, lr=0.1))
    moved = train.train(small(max_steps=3, out=tmp_path / "other", resume=str(tmp_path / "run")))
    assert moved["step"] == 3
    assert [record["step"] for record in records(tmp_path / "other")] == [3]
    with pytest.raises(UsageError, match="would overwrite the run in --out"):
        train.train(small(max_steps=4, resume=str(tmp_path / "other")))
    with pytest.raises(UsageError, match="nowhere does not exist"):
        train.train(small(resume=str(tmp_path / "nowhere")))
    train.train(small(max_steps=1, lr=0.1, resume="never"))
    assert [record["step"] for record in records(tmp_path / "run")] == [1]


@pytest.mark.parametrize("damage", ["cut", "foreign", "code"])
def test_a_damaged_checkpoint_gives_one_line_and_is_not_changed(damage: str, small: Small, tmp_path: Path) -> None:
    train.train(small(max_steps=1))
    path = tmp_path / "run" / "checkpoint.pt"
    trace = tmp_path / "trace"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(1)}, path)
    else:

        class Hostile:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (trace,)

        torch.save({"format": 1, "step": Hostile()}, path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="checkpoint") as caught:
        train.train(small(max_steps=2))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert not trace.exists()


def poisoned_views(monkeypatch: pytest.MonkeyPatch, poisoned: Callable[[int], bool]) -> None:
    """Multiply the first view of some batches of a run by NaN."""
    plain = make_loader

    class Poisoned:
        def __init__(self, loader: Any) -> None:
            self.loader, self.number, self.broken, self.notes = loader, 0, loader.broken, loader.notes
            self.sizes, self.channels = loader.sizes, loader.channels

        def __len__(self) -> int:
            return len(self.loader)

        def seek(self, batch: int) -> None:
            self.number = batch
            self.loader.seek(batch)

        def __iter__(self) -> Iterator[Batch]:
            for (first, second), indices in self.loader:
                yield Batch((first * (float("nan") if poisoned(self.number) else 1), second), indices)
                self.number += 1

    monkeypatch.setattr("fastrm.run.assemble.make_loader", lambda *args, **options: Poisoned(plain(*args, **options)))


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_a_step_without_a_finite_gradient_changes_nothing(
    method: str, optimizer: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = {"method": method, "optimizer": optimizer}
    train.train(small(**leaves, max_steps=2))
    before = checkpoint.load(tmp_path / "run")
    poisoned_views(monkeypatch, lambda batch: batch == 2)
    train.train(small(**leaves, max_steps=3))
    after = checkpoint.load(tmp_path / "run")
    assert after["step"] == 3
    for name, value in before["method"].items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, after["method"][name]), name
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert records(tmp_path / "run")[-1]["skipped_steps"] == 1
    assert records(tmp_path / "run")[-1]["loss"] is None  # JSON has no NaN


def test_ten_steps_in_a_row_without_a_finite_gradient_stop_the_run(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(small(max_steps=2))
    poisoned_views(monkeypatch, lambda batch: batch in (3, 4) or batch >= 6)
    with pytest.raises(TrainingError, match="10 steps in a row, up to step 16, had a gradient that is not finite"):
        train.train(small(max_steps=40, checkpoint_every=3, log_every=1000))
    assert checkpoint.load(tmp_path / "run")["step"] == 15
    monkeypatch.undo()
    train.train(small(max_steps=17))
    assert np.isfinite(records(tmp_path / "run")[-1]["loss"])


def test_clipping_limits_the_whole_gradient(small: Small, tmp_path: Path) -> None:
    """The first step of SGD is the learning rate times the clipped gradient, without weight decay and warm-up."""
    leaves = {"optimizer": "sgd", "weight_decay": 0.0, "lr": 1.0, "max_steps": 1, "residual_weight": 0.0}
    moved = {}
    for clip in (None, 1e-3):
        config = small(**leaves, clip_norm=clip, out=tmp_path / f"{clip}")
        torch.manual_seed(config.run.seed)
        start = dict(build_method(config).named_parameters())
        train.train(config)
        state = checkpoint.load(tmp_path / f"{clip}")["method"]
        steps = [state[n] - p.detach() for n, p in start.items() if p.requires_grad]
        moved[clip] = float(torch.stack([step.double().norm() for step in steps]).norm()) / (32 / 256)
    assert moved[None] > 1e-2
    assert moved[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_accumulation_updates_teacher_and_queue_once_per_step(small: Small, tmp_path: Path) -> None:
    leaves = {"method": "mocov2", "queue_size": 500, "teacher_momentum": 0.5, "epochs": 1}
    train.train(small(**leaves, batch_size=480, accumulate=4, max_steps=1))
    state = checkpoint.load(tmp_path / "run")["method"]
    assert state["queues.0.pointer"].item() == 480
    torch.manual_seed(0)
    start = build_method(small(**leaves)).state_dict()
    name = "student.projector.0.weight"
    # Two steps per epoch, so the update after the first is at half of the cosine from 0.5 to 0.999.
    momentum = (0.5 + 0.999) / 2
    want = momentum * start[name].double() + (1 - momentum) * state[name].double()
    np.testing.assert_allclose(state[name.replace("student", "teacher")], want, atol=1e-7)
    assert (state[name] - start[name]).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_fused_and_reference_operations_give_the_same_losses(
    method: str, steps: int, small: Small, tmp_path: Path
) -> None:
    losses = {}
    for kernels in ("auto", "reference"):
        out = tmp_path / kernels
        options = {"batch_size": 16, "max_steps": steps, "lr": 0.02, "stem": "small"}
        train.train(small(method=method, kernels=kernels, **options, out=out))
        losses[kernels] = [record["loss"] for record in records(out)]
    # Both are correct to float32's rounding, and training amplifies rounding errors. In 24 reference runs, six per
    # method, that start with the last bit of one weight matrix changed, the largest difference is 3e-6 in 5 steps and
    # 4e-3 in 50. At higher learning rates, a last bit decides a tie in a ReLU or an argmax earlier.
    np.testing.assert_allclose(losses["auto"][:5], losses["reference"][:5], rtol=1e-5)
    np.testing.assert_allclose(losses["auto"], losses["reference"], rtol=1e-2)
    assert len(losses["auto"]) == steps
    assert losses["auto"] != losses["reference"]  # two different paths


def test_an_unlabelled_folder_skips_knn_with_one_notice(
    small: Small, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(small(data=str(pictures / "flat"), eval_every=1, max_steps=2))
    assert capsys.readouterr().out.count("no labels") == 1
    assert all("knn_student" not in record for record in records(tmp_path / "run"))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_and_bf16_run(backend: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick case checks how torch.compile wraps the networks; the slow case compiles C++, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    train.train(small(compile="on", precision="bf16", arch="test_convnext", max_steps=1))
    assert np.isfinite(records(tmp_path / "run")[0]["loss"])
    names = checkpoint.load(tmp_path / "run")["method"]
    assert not any("_orig_mod" in name for name in names)


def closes_the_gap(small: Small, out: Path, **leaves: Any) -> None:
    """MoCo-v3 on digits: the final gap with weight 1 is below 0.6 of the gap with weight 0."""
    finals = {w: train.train(small(residual_weight=w, max_steps=None, out=out / f"{w}", **leaves)) for w in (0.0, 1.0)}
    for weight, final in finals.items():
        print(f"weight {weight}: " + " ".join(f"{k} {v:.4f}" for k, v in final.items() if k in ("gap", "knn_teacher")))
    assert finals[1.0]["gap"] < 0.6 * finals[0.0]["gap"]


def test_the_residual_term_closes_the_gap_in_22_steps(small: Small, tmp_path: Path) -> None:
    """Heads are narrow, and AdamW has a high learning rate. The measured ratio of the gaps is 0.47."""
    closes_the_gap(
        small, tmp_path, hidden_dim=256, predictor_hidden_dim=256, batch_size=64, epochs=1, warmup_epochs=0.1,
        optimizer="adamw", lr=8e-3, weight_decay=0.01,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_residual_term_closes_the_gap_on_digits(seed: int, small: Small, tmp_path: Path) -> None:
    """The gap closes in 12 epochs with the published settings."""
    closes_the_gap(
        small, tmp_path, seed=seed, batch_size=128, epochs=12, warmup_epochs=1.2, hidden_dim=4096, output_dim=256,
        predictor_hidden_dim=4096, log_every=11, eval_every=12, workers=None, stem="small",
    )  # fmt: skip
