"""The study and the race with small settings: interrupted trials continue, and results become tables and figures."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

from benchmarks import _study, learning, race, study, study_photos
from benchmarks._study import Setup, Trial
from benchmarks.study import QUESTIONS, Question, Scale
from examples.cifar10 import SmallResNet
from fastrm.files import read_json
from fastrm.probes.scores import Estimate

ROOT = Path(__file__).parent.parent
TINY = {
    "arch": "test_resnet", "stem": "imagenet", "image_size": 28, "batch_size": 8, "epochs": 2, "hidden_dim": 8,
    "output_dim": 8, "temperature": 0.2, "log_every": 5, "eval_every": 0, "log_to": (),
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of three trials and a short horizon, with tiny settings."""
    monkeypatch.setitem(study.SCALES, "cpu", Scale(32, TINY))
    monkeypatch.setitem(study._OF_METHOD, "mocov2", {"queue_size": 32})
    rows = {"plain": Trial(0), "warm": Trial(1, warmup=0.5), "other": Trial(1, form="cross-entropy")}
    horizon = Question("The teacher's horizon, short", {"a": Trial(0, momentum=0.9), "b": Trial(1, momentum=0.9)})
    monkeypatch.setattr(study, "QUESTIONS", (Question("first", rows), horizon))


def test_the_cross_entropy_form_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x / np.linalg.norm(x, axis=1, keepdims=True) / 0.1
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    expected = -(np.exp(log_softmax(t)) * log_softmax(s)).sum(axis=1).mean()
    student = torch.tensor(s, dtype=torch.float32, requires_grad=True)
    loss = _study.cross_entropy_form(student, torch.tensor(t, dtype=torch.float32))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.grad is not None


def test_trials_have_unique_names_and_a_plain_counterpart() -> None:
    trials = {trial for question in QUESTIONS for trial in question.rows.values()}
    assert len({trial.name for trial in trials}) == len(trials)
    assert all(trial.plain.weight == 0 and trial.plain.length == trial.length for trial in trials)


@pytest.mark.usefixtures("tiny")
@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["threads", "processes"])
def test_an_interrupted_study_continues(
    jobs: str, idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if jobs == "threads":  # starting a process takes longer than the study
        monkeypatch.setattr(_study, "ProcessPoolExecutor", lambda number, **_: ThreadPoolExecutor(number))
    setup = Setup("fashion-mnist", study.subset(idx_folder, 32, tmp_path), TINY, study._OF_METHOD)
    for seed in range(2):
        for question in study.QUESTIONS:
            for trial in question.rows.values():
                study.run(trial, seed, setup, tmp_path, threads=1)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/scores.json")}
    found = study.study(idx_folder, tmp_path, scale="cpu", seeds=2, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/scores.json")} == left

    plain, other = (found[trial.name] for trial in (Trial(0), Trial(1, form="cross-entropy")))
    assert plain[0] != plain[1]
    assert plain[0]["gap"] != other[0]["gap"]
    said = (tmp_path / "tables.md").read_text()
    gaps = [run["gap"] for run in plain]
    assert f"| plain | {statistics.fmean(gaps):.3f} ± {statistics.stdev(gaps):.3f} |" in said
    assert read_json(tmp_path / "study.json") == found
    assert all(math.isfinite(value) for runs in found.values() for run in runs for value in run.values())
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in ("gap.svg", "weight.svg"))


def test_a_study_of_photographs_continues_from_the_files_of_finished_runs(
    idx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_study, "ProcessPoolExecutor", lambda number, **_: ThreadPoolExecutor(number))
    scored = {"knn": 0.5, "linear": 0.25}  # the test above checks the scores
    monkeypatch.setattr(
        _study, "scored", lambda networks, *_: {f"{k}_{n}": v for k, v in scored.items() for n in networks}
    )
    data = study.subset(idx_folder, 32, tmp_path)
    setup = study_photos.setup_of("cpu", "fashion-mnist", data)
    small = {"batch_size": 8, "hidden_dim": 8, "output_dim": 8, "epochs": 1, "eval_every": 1, "log_every": 1}
    queue = {"mocov3": {}, "mocov2": {"queue_size": 32}}
    setup = setup._replace(settings={**setup.settings, **small}, of_method=queue, arch=lambda: SmallResNet((8, 8, 8)))
    files = tmp_path / "results"
    with monkeypatch.context() as cut_off:  # the second run never ends
        made = study_photos.record
        cut_off.setattr(
            study_photos, "record", lambda trial, *rest: made(trial, *rest) if trial.weight == 0 else [][trial.method]
        )
        with pytest.raises(TypeError):
            study_photos.study(setup, tmp_path / "one", files, rows=("weight 0", "weight 1"), seeds=1, jobs=1)
    (first,) = files.glob("mocov3*.json")
    left = json.loads(first.read_text())
    assert {"scores", "curves", "commit", "date", "torch", "threads"} <= left.keys()
    assert "Not run: weight 0.1; weight 0.5; weight 1; weight 1 at" in (files / "tables.md").read_text()

    left["scores"]["knn_student"] = 0.125  # for example, the result of another machine
    left["curves"] |= {"knn_student": [[1, 0.2], [2, 0.1]], "knn_teacher": [[1, 0.1], [2, 0.2]]}
    first.write_text(json.dumps(left))
    said = study_photos.study(setup, tmp_path / "two", files, rows=("weight 0", "weight 1"), seeds=1, jobs=1)
    assert not (tmp_path / "two" / first.stem.removesuffix("-0")).exists()
    assert {path.stem.rpartition("-w")[2] for path in files.glob("mocov2*.json")} == {"0-0", "1-0"}
    assert "| | weight 0 | weight 1 | weight 1 against plain |" in said
    other = 100 * json.loads(next(files.glob("mocov3*w1-0.json")).read_text())["scores"]["knn_student"]
    assert f"| kNN student | 12.5 | {other:.1f} | {other - 12.5:+.1f} |" in said
    assert "| teacher leads from epoch | 2 | " in said
    assert said.count("Not run: weight 0.1; weight 0.5; weight 1 at the projector; constant momentum") == 2


def test_a_run_becomes_a_learning_curve_over_hours(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "epoch": 0.5, "loss": 2.0, "cpu_hours": 0.1},
        {"step": 2, "epoch": 1.0, "knn_student": 0.25, "knn_teacher": 0.5},
        {"step": 2, "epoch": 1.0, "cpu_hours": 0.2},
        {"step": 4, "epoch": 2.0, "knn_student": 0.5, "knn_teacher": 0.75},
        {"step": 4, "epoch": 2.0, "cpu_hours": 0.4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 2}))
    (tmp_path / "summary.json").write_text(json.dumps({"knn_pixels": 0.4, "knn_untrained": 0.3}))
    learning.main([str(tmp_path), "--json", str(tmp_path / "a.json"), "--svg", str(tmp_path / "a.svg")])
    found = read_json(tmp_path / "a.json")
    assert [(p["epoch"], p["cpu_hours"], p["knn_teacher"]) for p in found["points"]] == [(1, 0.2, 0.5), (2, 0.4, 0.75)]
    assert (found["pixels"], found["untrained"]) == (0.4, 0.3)
    assert "the raw pixels" in (tmp_path / "a.svg").read_text()


def test_differences_have_the_interval_of_student_t() -> None:
    values = [1.0, 2.0, 4.0]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert study_photos.interval(values) == f"+2.3 ({expected.low:+.1f} to {expected.high:+.1f})"


def test_the_page_shows_the_results_of_the_study() -> None:
    found = read_json(ROOT / "docs" / "study.json")
    assert study.tables(found).strip() in (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert all(len(found[trial.name]) == 3 for question in QUESTIONS for trial in question.rows.values())


def test_a_race_is_timed_without_scoring_and_can_continue(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(race, "MARKS", (0.40, 0.45, 0.50))
    monkeypatch.setattr(race, "frozen_scores", lambda *_, **__: scored())
    now, scores, runs = [0.0], iter([0.31, 0.3, 0.5, 0.36, 0.44, 0.52]), list[str]()

    def scored() -> dict[str, dict[str, Estimate]]:
        now[0] += 1000
        return {"it": {"knn20": Estimate(next(scores), 0.0, 1.0)}}

    def contender(seconds: float) -> Callable[..., None]:
        def train(data: str, method: str, epochs: int, seed: int, watch: race.Watch, folder: Path) -> None:
            runs.append(folder.name)
            while not watch(torch.nn.Identity()):
                now[0] += seconds

        return train

    monkeypatch.setattr(race, "CONTENDERS", {"mocov3": {"fastrm": contender(10), "another loop": contender(20)}})
    given = ["--data", str(pictures), "--results", str(tmp_path), "--every", "2", "--seeds", "1"]
    race.main(given)
    own = read_json(tmp_path / "mocov3-fastrm-0.json")
    assert own["points"] == [[2, 10, 0.3], [4, 30, 0.5]]  # the first step ends at time 0
    # The first contender reaches 0.4 and 0.45 at 20 and 25 s. The other one has 0.36, 0.44 and 0.52 at 20, 60 and 100
    # s.
    table = (tmp_path / "tables.md").read_text()
    assert "| fastrm | 1 | 20 | 25 | 30 | 1.00 |" in table
    assert "| another loop | 1 | 40 | 65 | 90 | 2.60 |" in table
    scores = iter([0.31])
    race.main(given)
    assert runs == ["mocov3-fastrm-0", "mocov3-loop-0"]
    assert (tmp_path / "race.svg").read_text().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "contender"), [(m, c) for m, found in race.CONTENDERS.items() for c in found])
def test_a_contender_of_the_race_trains(method: str, contender: str, tmp_path: Path) -> None:
    if race.absent(contender):
        pytest.skip(f"{contender} is not installed")
    rng = np.random.default_rng(0)
    for number, pixels in enumerate(rng.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number:03}.png")
    before, steps = list[torch.Tensor](), 0

    def watch(backbone: torch.nn.Module) -> bool:
        nonlocal steps
        steps += 1
        before.append(torch.cat([p.detach().flatten() for p in backbone.parameters()]).clone())
        return steps == 2

    race.CONTENDERS[method][contender](str(tmp_path), method, 1, 0, watch, tmp_path / "run")
    assert steps == 2
    assert not torch.equal(*before)
