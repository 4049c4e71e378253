"""The report: what is plotted is what was recorded, and a real browser shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrm import report
from fastrm.reports.plots import PLOTS, draw
from fastrm.reports.runs import read_run
from fastrm.settings.config import build
from tests.test_cli import fails


def record(folder: Path, *, complete: bool = True, cut: str = "", **settings: Any) -> Path:
    """A run folder with known numbers."""
    folder.mkdir(parents=True)
    config = build(data="digits", arch="test_resnet", image_size=32, epochs=4, **settings)
    (folder / "config.json").write_text(json.dumps(config.flat()))
    weight = config.method.residual_weight
    lines = []
    for step in range(1, 13):
        lines.append(
            {
                "step": step, "epoch": step / 3, "loss": 3 - step / 10 + weight, "contrastive": 3 - step / 10,
                "residual": weight, "gap": 0.5 - 0.3 * weight, "lr": 0.1 * step, "teacher_momentum": 0.99,
                "feature_std": 0.4, "images_per_second": 100.0 + step,
                "effective_rank": None if step == 2 else 20.0 + step,
            }
        )  # fmt: skip
        if step % 3 == 0:
            lines.append({"step": step, "epoch": step / 3, "knn_student": step / 20, "knn_teacher": step / 25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)
    if complete:
        (folder / "summary.json").write_text("{}")
    return folder


def test_what_is_drawn_is_what_was_recorded(tmp_path: Path) -> None:
    runs = [read_run(record(tmp_path / f"w{w}", residual_weight=float(w))) for w in (0, 1)]
    plots = {plot.name: plot for plot in PLOTS}
    figure = draw(plots["gap"], runs)
    assert figure is not None
    curves = figure.axes[0].get_lines()
    assert [curve.get_label() for curve in curves] == ["w0, residual_weight 0.0", "w1, residual_weight 1.0"]
    for curve, gap in zip(curves, (0.5, 0.2), strict=True):
        np.testing.assert_allclose(curve.get_xdata(), np.arange(1, 13) / 3)
        np.testing.assert_allclose(curve.get_ydata(), gap)
    assert curves[0].get_color() != curves[1].get_color()

    figure = draw(plots["knn"], runs)
    assert figure is not None
    (axes,) = figure.axes  # k = 200 was not recorded
    student, teacher = axes.get_lines()[:2]
    np.testing.assert_allclose(student.get_ydata(), np.array([3, 6, 9, 12]) / 20)
    np.testing.assert_allclose(teacher.get_ydata(), np.array([3, 6, 9, 12]) / 25)
    assert (student.get_linestyle(), teacher.get_linestyle()) == ("-", "--")
    assert student.get_color() == teacher.get_color()

    figure = draw(plots["collapse"], runs)
    assert figure is not None
    assert len(figure.axes[1].get_lines()[0].get_ydata()) == 11  # one was not finite
    assert draw(plots["online"], runs) is None


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = read_run(record(tmp_path / "run", complete=False, cut='{"step": 13, "epo'))
    assert run.records[-1]["step"] == 12
    shown = report.report(report.ReportConfig(runs=(tmp_path / "run",)))
    assert shown == tmp_path / "run" / "report" / "index.html"
    assert "not complete" in shown.read_text()
    (tmp_path / "run" / "summary.json").write_text('{"step": 6}')  # it was complete, and then went on
    assert not read_run(tmp_path / "run").complete
    (tmp_path / "run" / "summary.json").write_text('{"step": 12}')
    assert read_run(tmp_path / "run").complete
    again = report.report(report.ReportConfig(runs=(tmp_path / "run",)))
    assert again == shown


def test_wrong_use_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record(Path("good"))
    Path("empty").mkdir()
    Path("file").write_text("in the way")
    for name, content in (("foreign", "[1, 2]\n[3]\n"), ("nothing", ""), ("broken", "{\n{}\n")):
        record(Path(name))
        Path(name, "metrics.jsonl").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    for arguments, says in (
        ([], "name a run folder"),
        (["nowhere"], "nowhere is no run folder"),
        (["--checkpoint", "nowhere"], "nowhere is no run folder"),
        (["good", "--checkpoint", "good"], "say twice what to take"),
        (["empty"], "empty is no run folder: it has no metrics.jsonl"),
        (["foreign"], "holds other lines"),
        (["nothing"], "recorded nothing yet"),
        (["broken"], "cannot be read as a run"),
        (["good", "nowhere"], "nowhere is no run folder"),
        (["good", "--out", "file"], "--out file cannot be written"),
        (["good", "--colour", "red"], "--colour"),
    ):
        assert says in fails(report.main, arguments, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_browser_shows_every_plot(tmp_path: Path, browser: Any) -> None:
    runs = tuple(record(tmp_path / name, residual_weight=w) for name, w in (("<b>w0 & é", 0.0), ("w1", 1.0)))
    shown = report.report(report.ReportConfig(runs=runs, out=tmp_path / "page"))
    browser.set_window_size(1200, 900)
    browser.get(shown.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "<b>w0 & é, w1"
    boxes = browser.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('figure')].map("
        "f => [f.id, (r => [r.width, r.height])(f.querySelector('svg').getBoundingClientRect())]))"
    )
    assert set(boxes) == {"loss", "gap", "knn", "schedule", "collapse", "throughput"}
    assert all(width > 300 and height > 150 for width, height in boxes.values())
    curves = browser.execute_script("return document.querySelectorAll('figure svg [id*=line2d] path').length")
    assert curves > 50
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    cells = [cell.text for cell in browser.find_elements("css selector", "tbody tr:first-child td")]
    assert cells[:5] == ["0.0", "12", "0.500", "0.600", "0.480"]
    for name in boxes:
        with Image.open(tmp_path / "page" / f"{name}.png") as picture:
            assert picture.width > 600
            assert len(set(picture.convert("L").resize((64, 32)).tobytes())) > 10
