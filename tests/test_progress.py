"""Progress: bars on a terminal, a few lines elsewhere, and never two displays at once."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastrm import train
from fastrm.evaluate import EvaluateConfig, evaluate
from fastrm.hooks import Progress
from fastrm.settings.config import Config
from fastrm.terminal import progress
from fastrm.terminal.progress import Display, bar, tracked
from tests.conftest import run_of_one_step

Small = Callable[..., Config]


def test_without_a_terminal_a_line_is_printed_at_the_start_and_every_30_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)
    for _ in tracked(range(10_000), "looking", 10_000):
        now += 0.02
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "looking begins"
    assert lines[1] == "looking: 15% done, about 2:50 min left"
    assert len(lines) == 7  # 200 s


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The output of a run to a terminal."""
    shown = io.StringIO()
    plain = Console

    def console(**options: object) -> Console:
        return plain(**{**options, "file": shown, "force_terminal": True, "width": 120})  # type: ignore[arg-type]

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("fastrm.terminal.progress.Console", console)
    return shown


def test_a_bar_is_shown_in_the_display_of_the_run(terminal: io.StringIO, tmp_path: Path) -> None:
    with progress.Display(progress.Console()) as display:
        training = Progress(display)
        training.on_start(SimpleNamespace(total_steps=10, step=2))
        training.on_step(SimpleNamespace(), 3, [])
        training.on_log(
            SimpleNamespace(say=partial(display.console.print, highlight=False), epoch=1.5),
            3,
            {"loss": 2.25, "gap": 0.5},
        )
        with bar("evaluation of the student", 7) as task:
            task.advance(1)
            display.console.print("a note in between")
        training.close()
    said = terminal.getvalue()
    assert "a note in between\n" in said
    assert "step      3  epoch   1.50  loss 2.25  gap 0.5\n" in said  # the line stays after the bar is removed
    assert "training" in said
    assert "evaluation of the student" in said
    assert "30%" in said
    assert "-:--:--" in said  # the remaining time
    assert Display.current is None
    with bar("alone"):
        assert Display.current is not None
    assert Display.current is None


def test_the_evaluations_of_a_run_show_their_progress(
    small: Small, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(small(data=str(pictures / "split"), eval_every=1, max_steps=1))
    said = capsys.readouterr().out
    assert said.count("evaluation (student, teacher, pixels, untrained), 96 images begins\n") == 1


@pytest.mark.slow
def test_every_score_shows_its_progress(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of_one_step("test_resnet", 16, tmp_path / "run")
    capsys.readouterr()
    evaluate(
        EvaluateConfig(
            checkpoint=run, data=str(pictures / "split"), knn=True, linear=True, linear_epochs=1, linear_quick=True,
            semi=0.1, transfer=str(pictures / "classes"), gap=True, device="cpu", workers=0,
        )
    )  # fmt: skip
    captured = capsys.readouterr()
    assert "begins" not in captured.out
    said = [line.removesuffix(" begins") for line in captured.err.splitlines() if line.endswith(" begins")]
    four = "(student, teacher, random, pixels), 96 images"
    assert {f"split {four}", f"classes {four}"} <= set(said)
    for network in ("student", "teacher", "random"):
        parts = (f"test of the linear classifier, {network}", f"fine-tuning of the {network}")
        assert {*parts, f"test after fine-tuning, {network}"} <= set(said)
    assert {"gap, 12 images", "linear classifiers, 1 epochs"} <= set(said)
