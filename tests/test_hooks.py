"""Hooks: when a run calls them, what they may change, and the loggers of other packages."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import struct
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import fastrm
from fastrm import evaluate, train
from fastrm.errors import Stopped, UsageError
from fastrm.hooks import Hook
from fastrm.run import checkpoint
from fastrm.settings.config import Config
from tests.test_train import records

Small = Callable[..., Config]
TINY = {
    "data": "digits", "arch": "test_resnet", "stem": "imagenet", "image_size": 16, "batch_size": 16, "epochs": 1,
    "hidden_dim": 8, "output_dim": 8, "predictor_hidden_dim": 8, "workers": 0, "eval_every": 0, "log_every": 1,
    "warmup_epochs": 0.0,
}  # fmt: skip


def pretrained(out: Path, *hooks: Any, **settings: Any) -> fastrm.run.trainer.Result:
    """A small run with these hooks and settings."""
    return fastrm.pretrain(**{**TINY, "max_steps": 3, "out": out, **settings}, hooks=hooks)


class Told:
    """A hook that records its calls; it is not a subclass of Hook, because the methods are enough."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def on_start(self, run: Any) -> None:
        self.said.append(("start", run.step, run.total_steps, run.rank, run.out.name))

    def on_step(self, run: Any, step: int, outputs: Any) -> None:
        (output,) = outputs
        assert output.features.shape == (16, run.student.dim)
        assert len(output.indices) == 16
        assert [view.shape for view in output.views] == [(16, 3, 16, 16)] * 2
        self.said.append(("step", step, run.step, run.logging))

    def on_log(self, run: Any, step: int, values: Any) -> None:
        self.said.append(("log", step, "loss" in values))

    def on_evaluate(self, run: Any, step: int, scores: Any) -> None:
        self.said.append(("evaluate", step, sorted(scores)))

    def on_checkpoint(self, run: Any, path: Path) -> None:
        self.said.append(("checkpoint", run.step, path.name))

    def on_end(self, run: Any, summary: Any) -> None:
        self.said.append(("end", summary["step"]))

    def close(self) -> None:
        self.said.append(("close",))


def test_a_hook_is_called_in_order(tmp_path: Path) -> None:
    told = Told()
    pretrained(tmp_path / "run", told, checkpoint_every=2, log_every=2, eval_every=1)
    scores = ["knn200_student", "knn200_teacher", "knn_pixels", "knn_student", "knn_teacher", "knn_untrained"]
    assert told.said == [
        ("start", 0, 3, 0, "run"),
        ("step", 1, 1, True),
        ("log", 1, True),
        ("step", 2, 2, True),
        ("log", 2, True),
        ("checkpoint", 2, "checkpoint.pt"),
        ("step", 3, 3, True),
        ("log", 3, True),
        ("checkpoint", 3, "checkpoint.pt"),
        ("evaluate", 3, scores),
        ("end", 3),
        ("close",),
    ]


class Norms(Hook):
    """A hook that logs the norm of the features and a count of steps, which it keeps over a resume."""

    def __init__(self) -> None:
        self.steps = torch.zeros((), dtype=torch.int64)

    def on_step(self, run: Any, step: int, outputs: Any) -> None:
        self.steps += 1
        run.log({"feature_norm": outputs[0].features.norm(dim=1).mean(), "steps": self.steps})

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps.copy_(state["steps"])


def test_a_hook_logs_values_and_keeps_its_state_over_a_resume(tmp_path: Path) -> None:
    pretrained(tmp_path / "run", Norms(), max_steps=2, log_every=10)
    pretrained(tmp_path / "run", Norms(), max_steps=4, log_every=10)
    found = records(tmp_path / "run")
    assert [record["steps"] for record in found] == [1, 2, 3, 4]
    assert all(record["feature_norm"] > 0 for record in found)
    assert ["loss" in record for record in found] == [True, True, False, True]
    plain = pretrained(tmp_path / "plain", max_steps=4, log_every=10)
    ours, theirs = (checkpoint.load(tmp_path / name)["method"] for name in ("run", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert plain.scores["loss"] == found[-1]["loss"]


class Failing:
    def on_step(self, run: Any, step: int, outputs: Any) -> None:
        if step == 2:
            raise ZeroDivisionError("mine")


def test_an_exception_in_a_hook_ends_the_run_after_a_save(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="mine"):
        pretrained(tmp_path / "run", Failing())
    assert checkpoint.load(tmp_path / "run")["step"] == 2
    assert not (tmp_path / "run" / "summary.json").exists()
    assert pretrained(tmp_path / "run").scores["step"] == 3


class Stopping:
    def on_log(self, run: Any, step: int, values: Any) -> None:
        run.stop()


def test_a_hook_stops_a_run_and_the_same_command_continues(tmp_path: Path) -> None:
    result = pretrained(tmp_path / "run", Stopping())
    assert result.scores["step"] == 1
    assert (result.folder / "backbone.safetensors").is_file()
    assert pretrained(tmp_path / "run").scores["step"] == 3


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (Told, "Told is a class; give an object of it: Told\\(\\)"),
        (object(), "has none of a hook's methods: on_start, on_step"),
        (type("Mine", (), {"on_stp": print})(), "Mine has a method on_stp, which no run calls; did you mean on_step?"),
        ([Norms(), Norms()], "two of the class tests.test_hooks.Norms keep a state"),
    ],
)
def test_objects_that_are_not_hooks_are_refused(hook: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        fastrm.pretrain(**TINY, max_steps=1, out=tmp_path / "run", hooks=hook if isinstance(hook, list) else [hook])
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


class Odd(Hook):
    def __init__(self, state: Any = None, values: Any = None) -> None:
        self.state, self.values = state, values

    def on_step(self, run: Any, step: int, outputs: Any) -> None:
        if self.values is not None:
            run.log(self.values)

    def state_dict(self) -> Any:
        return {"kept": self.state}

    def load_state_dict(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (Odd(values={"step": 1}), "the name step is taken"),
        (Odd(values={"loss": 1}), "the name loss is taken"),
        (Odd(values={"mine": "text"}), "mine is a str; it must be a real number"),
        (Odd(values={"mine": torch.ones(2)}), "mine is a Tensor; it must be a real number"),
        (Odd(values={"mine": np.complex64(1j)}), "mine is a complex64; it must be a real number"),
        (Odd(values={3: 1}), "the name 3 is a int; it must be text"),
        (Odd(state={"deep": [Path()]}), "the state of the hook tests.test_hooks.Odd has a .*Path in it"),
    ],
)
def test_values_and_states_that_cannot_be_stored_are_reported(hook: Odd, words: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        pretrained(tmp_path / "run", hook)


def test_a_run_restores_random_state_signal_handlers_and_threads(tmp_path: Path) -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    state = [signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.backends.cudnn.benchmark]
    pretrained(tmp_path / "run", max_steps=1)
    assert torch.equal(torch.rand(2), want)
    assert [signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.backends.cudnn.benchmark] == state


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", [*MODES, "dtype"])
def test_modes_that_a_script_has_set_do_not_reach_the_run(mode: str, tmp_path: Path) -> None:
    want = pretrained(tmp_path / "plain", max_steps=2).student.state_dict()
    before = torch.get_default_dtype()
    try:
        if mode == "dtype":
            torch.set_default_dtype(torch.float64)
        with MODES.get(mode, contextlib.nullcontext)():
            got = pretrained(tmp_path / "run", max_steps=2).student.state_dict()
            state = torch.get_default_dtype(), torch.get_default_device().type, torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert state == (
        torch.float64 if mode == "dtype" else torch.float32,
        "meta" if mode == "device" else "cpu",
        mode not in ("no_grad", "inference_mode"),
    )


def test_modes_that_a_script_has_set_do_not_reach_an_evaluation(tmp_path: Path) -> None:
    pretrained(tmp_path / "run", max_steps=1)
    with torch.no_grad():
        found = evaluate.evaluate(
            evaluate.EvaluateConfig(checkpoint=tmp_path / "run", linear=True, linear_epochs=1, device="cpu", workers=0)
        )
    assert "linear" in str(found)


def test_numbers_of_numpy_are_logged(tmp_path: Path) -> None:
    class Numbers:
        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            run.log({"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)})

    pretrained(tmp_path / "run", Numbers(), max_steps=1)
    assert [records(tmp_path / "run")[0][name] for name in "abc"] == [0.5, 3, True]


def test_a_network_that_a_hook_leaves_in_evaluation_mode_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evaluates:
        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            run.student.eval()
            run.teacher.eval().train()

    pretrained(tmp_path / "run", Evaluates())
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("a hook left run.student in evaluation mode") == 1
    assert "left run.teacher" not in said


def test_the_best_checkpoint_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.7, 0.6])

    class Told:
        """A hook that reports scores instead of an evaluation."""

        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            run.save(wait=True)
            run.evaluated({"knn_student": next(scores)})

    pretrained(tmp_path / "run", Told(), keep_best=True, checkpoint_every=1)
    best = checkpoint.load(tmp_path / "run" / "checkpoint-best.pt")
    assert best["step"] == 2
    assert json.loads((tmp_path / "run" / "best.json").read_text())["value"] == 0.7
    assert checkpoint.load(tmp_path / "run")["step"] == 3


def test_a_finished_run_can_be_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    few = {"batch_size": 720, "max_steps": None}
    pretrained(out, epochs=1, **few)
    assert "complete after" not in capsys.readouterr().out
    assert pretrained(out, epochs=3, **few).scores["epoch"] == 3
    said = capsys.readouterr().out
    assert "the run is extended: its schedules now span 3 epochs, and continue at epoch 1" in said
    with pytest.raises(UsageError, match=r"--epochs was 3, is 2"):
        pretrained(out, epochs=2, **few)
    cut = tmp_path / "cut"
    pretrained(cut, epochs=2, **{**few, "max_steps": 1})
    with pytest.raises(UsageError, match=r"was 2, is 5 \(it can be extended once its own epochs are over\)"):
        pretrained(cut, epochs=5, **few)


def test_a_stopped_run_reports_the_command_that_continues(tmp_path: Path) -> None:
    class Signal:
        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="after step 1 and saved; the same command continues from there"):
        pretrained(tmp_path / "run", Signal())
    with pytest.raises(Stopped, match="the same command without --resume never continues"):
        pretrained(tmp_path / "run", Signal(), resume="never")


def test_a_stopped_run_is_freed_while_its_error_is_kept(tmp_path: Path) -> None:
    """As in a notebook, which keeps the last error and its frames."""
    networks: list[Any] = []

    class Signal:
        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            networks.append(weakref.ref(run.student))
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped) as kept:
        pretrained(tmp_path / "run", Signal(), workers=1, loader="torch")
    gc.collect()
    assert networks[0]() is None
    assert multiprocessing.active_children() == []
    assert kept.value.__context__ is None


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def logged(file: Path) -> Iterator[bytes]:
    """The records of a W&B file, which is 7 bytes and then LevelDB's log format."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no record begins in the last 7 bytes of a block
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def of_file(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """The id of the run in a file of W&B's, and its records."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(100):  # W&B's own process may still be writing
        found = list(map(Record.FromString, logged(file)))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            break
        time.sleep(0.1)
    ids, kept = set(), []
    for record in found:
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        if record.WhichOneof("record_type") == "history":
            kept.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    (id,) = ids
    return id, kept


@needs("wandb")
def test_wandb_has_one_run_over_a_resume(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package runs offline, and its files are read back."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (1, 2):
        train.train(small(max_steps=steps, log_to=("wandb",)))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    ids = {of_file(file)[0] for file in files}
    losses = [one["loss"] for file in files for one in of_file(file)[1]]
    assert len(files) == 2
    assert len(ids) == 1
    assert losses == [record["loss"] for record in records(tmp_path / "run")]


@needs("wandb")
def test_an_active_run_of_weights_and_biases_is_used_and_stays_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="mine", dir=tmp_path)
    try:
        run.log({"before": 1})
        pretrained(tmp_path / "run", log_to=("wandb",))
        assert wandb.run is run
        run.log({"after": 1})
        assert run.config["arch"] == "test_resnet"
    finally:
        wandb.finish()
    (file,) = tmp_path.glob("**/run-*.wandb")
    (id, kept) = of_file(file)
    assert id == run.id
    assert [one["step"] for one in kept if "loss" in one] == [1, 2, 3]
    assert [name in one for one, name in ((kept[0], "before"), (kept[-1], "after"))] == [True, True]


@needs("wandb")
def test_the_run_of_a_sweep_is_used(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RUN_ID", "ofthesweep")  # as wandb's agent does for the command of a sweep
    train.train(small(max_steps=1, log_to=("wandb",)))
    (file,) = tmp_path.glob("**/run-*.wandb")
    assert of_file(file)[0] == "ofthesweep"


@pytest.mark.slow
@needs("mlflow")
def test_mlflow_has_one_run_over_a_resume(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package runs with an SQLite database."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for steps in (1, 2):
        train.train(small(max_steps=steps, log_to=("mlflow",)))
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    losses = [metric.value for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == [record["loss"] for record in records(tmp_path / "run")]
    assert run.data.params["arch"] == "test_resnet"
    assert run.info.status == "FINISHED"


class FakeMlflow:
    """The part of MLflow that fastrm uses, with MLflow's own refusals."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.runs: dict[str, SimpleNamespace] = {}
        self.active: list[str] = []
        self.failing = failing

    def active_run(self) -> SimpleNamespace | None:
        """The active run as it was when it started."""
        if not self.active:
            return None
        return SimpleNamespace(info=self.runs[self.active[-1]].info, data=SimpleNamespace(params={}))

    def get_run(self, run_id: str) -> SimpleNamespace:
        return self.runs[run_id]

    def start_run(self, run_id: str | None = None, run_name: str | None = None) -> SimpleNamespace:
        if self.active:
            raise Exception(f"Run with UUID {self.active[-1]} is already active.")
        run_id = run_id or f"run{len(self.runs)}"
        new = SimpleNamespace(
            info=SimpleNamespace(run_id=run_id), data=SimpleNamespace(params={}), values=[], status="RUNNING"
        )
        self.runs.setdefault(run_id, new).status = "RUNNING"
        self.active.append(run_id)
        return self.runs[run_id]

    def log_params(self, params: dict[str, str]) -> None:
        held = self.runs[self.active[-1]].data.params
        assert all(held.get(name, value) == value for name, value in params.items()), "MLflow changes no parameter"
        held.update(params)

    def log_metrics(self, metrics: dict[str, float], step: int, run_id: str) -> None:
        assert all(re.fullmatch(r"[/\w.\- ]*", name) for name in metrics), "Invalid metric name"
        if step in self.failing:
            raise TimeoutError("the server does not answer")
        self.runs[run_id].values.append((step, metrics))

    def end_run(self, status: str = "FINISHED") -> None:
        self.runs[self.active.pop()].status = status


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def test_an_active_run_of_mlflow_is_used_and_stays_active(
    mlflow: FakeMlflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow.start_run()
    mlflow.log_params({"arch": "mine", "seed": "0"})
    pretrained(tmp_path / "run", log_to=("mlflow",))
    (run,) = mlflow.runs.values()
    assert mlflow.active == ["run0"]
    assert run.status == "RUNNING"
    assert [step for step, values in run.values if "loss" in values] == [1, 2, 3]
    assert run.data.params["arch"] == "mine"
    assert run.data.params["batch_size"] == "16"
    assert "the active run keeps its own arch" in capsys.readouterr().out


def test_a_service_that_fails_does_not_end_the_training(
    mlflow: FakeMlflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow.failing = (2,)
    pretrained(tmp_path / "run", log_to=("mlflow",), max_steps=4)
    said = capsys.readouterr().out
    (run,) = mlflow.runs.values()
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    assert [step for step, _ in run.values] == [1, 3, 4]
    assert said.count("--log-to mlflow: the server does not answer; training continues") == 1
    assert "--log-to mlflow: 1 records are missing there" in said


def test_a_slow_failing_service_rests(mlflow: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("fastrm.hooks.logger.time.monotonic", lambda: next(clock))
    mlflow.failing = (1,)
    pretrained(tmp_path / "run", log_to=("mlflow",), max_steps=4)
    (run,) = mlflow.runs.values()
    assert run.values == []  # the call took 1 s, so the next one comes 10 s later at the earliest


def test_a_refusal_at_the_start_is_one_whole_line(
    mlflow: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow, "start_run", mock.Mock(side_effect=ValueError("1 error\n  uri: no such scheme")))
    with pytest.raises(UsageError, match="--log-to mlflow: 1 error uri: no such scheme"):
        pretrained(tmp_path / "run", log_to=("mlflow",))


def test_names_that_mlflow_refuses_are_changed(mlflow: FakeMlflow, tmp_path: Path) -> None:
    class Named:
        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            run.log({"acc@1 [%]": 0.5})

    pretrained(tmp_path / "run", Named(), log_to=("mlflow",), max_steps=1)
    (run,) = mlflow.runs.values()
    assert run.values[0][1]["acc_1 ___"] == 0.5


def test_a_failed_run_is_marked_as_failed(mlflow: FakeMlflow, tmp_path: Path) -> None:
    class Broken:
        def on_step(self, run: Any, step: int, outputs: Any) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        pretrained(tmp_path / "run", Broken(), log_to=("mlflow",))
    assert [run.status for run in mlflow.runs.values()] == ["FAILED"]
    pretrained(tmp_path / "run", log_to=("mlflow",))
    assert [run.status for run in mlflow.runs.values()] == ["FINISHED"]


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(
    package: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UsageError, match=f"--log-to {package} needs the package {package}"):
        train.train(small(log_to=(package,)))
    assert not any((tmp_path / "run").glob("*.json*"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "each image has only the 15 others of its batch as negatives"),
        ({}, "the teacher averages over 100 steps (--teacher-momentum 0.99), more than a tenth of the 89 steps"),
        ({"method": "mocov2"}, "the queue holds 65,536 keys, more than the 1,437 images"),
        ({"stem": "small"}, "test_resnet gets a small stem (3x3 at stride 1, no max-pool)"),
    ],
)
def test_risky_settings_are_reported_at_the_start(
    settings: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained(tmp_path / "run", **{"max_steps": 1, **settings})
    assert words in capsys.readouterr().out
    pretrained(tmp_path / "run", **{"max_steps": 2, **settings})
    assert "contrasted" not in capsys.readouterr().out
