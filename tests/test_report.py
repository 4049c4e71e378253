"""The report: plots show the recorded values, and a real browser displays them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastrm import report
from fastrm.data import sheets
from fastrm.errors import UsageError
from fastrm.reports import maps
from fastrm.reports.maps import Map
from fastrm.reports.plots import PLOTS, draw, draw_map
from fastrm.reports.runs import read_run
from fastrm.settings.config import build
from tests.test_cli import fails


def record(folder: Path, *, complete: bool = True, cut: str = "", **settings: Any) -> Path:
    """Write a run folder with known metrics."""
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


def test_plots_show_the_recorded_values(tmp_path: Path) -> None:
    runs = [read_run(record(tmp_path / f"w{w}", residual_weight=float(w))) for w in (0, 1)]
    plots = {plot.name: plot for plot in PLOTS}
    (chart,) = draw(plots["gap"], runs)
    assert [curve.name for curve in chart.data] == ["w0, gap", "w1, gap"]
    for curve, gap in zip(chart.data, (0.5, 0.2), strict=True):
        np.testing.assert_allclose(curve.x, np.arange(1, 13) / 3)
        np.testing.assert_allclose(curve.y, gap)
    assert chart.data[0].line.color != chart.data[1].line.color

    (chart,) = draw(plots["knn"], runs)  # k = 200 was not recorded
    student, teacher = chart.data[:2]
    np.testing.assert_allclose(student.y, np.array([3, 6, 9, 12]) / 20)
    np.testing.assert_allclose(teacher.y, np.array([3, 6, 9, 12]) / 25)
    assert student.line.dash != teacher.line.dash
    assert student.marker.symbol != teacher.marker.symbol
    assert student.line.color == teacher.line.color

    _, rank = draw(plots["collapse"], runs)
    assert len(rank.data[0].y) == 11  # one value was not finite
    assert draw(plots["online"], runs) == []


def test_a_report_of_a_run_in_progress(tmp_path: Path) -> None:
    run = read_run(record(tmp_path / "run", complete=False, cut='{"step": 13, "epo'))
    assert run.records[-1]["step"] == 12
    shown = report.report(report.ReportConfig(runs=(tmp_path / "run",)))
    assert shown == tmp_path / "run" / "report" / "index.html"
    assert "not complete" in shown.read_text()
    (tmp_path / "run" / "summary.json").write_text('{"step": 6}')  # it was complete, and then continued
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
        (["nowhere"], "nowhere is not a run folder"),
        (["--checkpoint", "nowhere"], "nowhere is not a run folder"),
        (["good", "--checkpoint", "good"], "are both given"),
        (["empty"], "empty is not a run folder: it has no metrics.jsonl"),
        (["foreign"], "holds other lines"),
        (["nothing"], "recorded nothing yet"),
        (["broken"], "cannot be read as a run"),
        (["good", "nowhere"], "nowhere is not a run folder"),
        (["good", "--out", "file"], "--out file cannot be written"),
        (["good", "--colour", "red"], "--colour"),
    ):
        assert says in fails(report.main, arguments, capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_browser_shows_every_plot(tmp_path: Path, browser: Any) -> None:
    runs = tuple(record(tmp_path / name, residual_weight=w) for name, w in (("<b>w0 & é", 0.0), ("w1", 1.0)))
    sheets.save("--out", runs[1] / "views.png", Image.new("RGB", (40, 20), "red"))
    Image.new("RGB", (40, 20)).save(runs[1] / "photograph.png")  # not a contact sheet
    maps.save("--map", runs[0] / "by label.json", mapped(30, np.arange(30) % 12))
    maps.save("--map", runs[1] / "map.json", mapped(30, None))
    shown = report.report(report.ReportConfig(runs=runs, out=tmp_path / "page"))
    browser.set_window_size(1200, 900)
    browser.get(shown.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "<b>w0 & é, w1"
    drawn = {"loss": 3, "gap": 1, "knn": 1, "schedule": 2, "collapse": 2, "throughput": 1}
    drawn |= {"map-1": 1, "map-2": 1, "views": 0}
    assert browser.execute_script("return [...document.querySelectorAll('figure[id]')].map(f => f.id)") == [*drawn][:-1]
    for width in (1200, 390):
        browser.set_window_size(width, 900)
        browser.get(shown.as_uri())
        for name, count in drawn.items():
            boxes = browser.execute_script(
                f"return [...document.querySelectorAll('#{name} .main-svg:first-child')]"
                ".map(s => s.getBoundingClientRect()).map(r => [r.left, r.right, r.height])"
            )
            assert len(boxes) == count
            assert all(left >= 0 and right - left > 250 and height > 150 for left, right, height in boxes)
            assert all(right <= browser.execute_script("return window.innerWidth") for _, right, _ in boxes)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    values = browser.execute_script("return document.getElementById('gap-1').data.map(curve => [...curve.y])")
    np.testing.assert_allclose(values, [[0.5] * 12, [0.2] * 12])
    shown_on_hover = "Plotly.Fx.hover('gap-1', [{curveNumber: 1, pointNumber: 3}]); return document.querySelectorAll("
    assert browser.execute_script(shown_on_hover + "'#gap-1 .hoverlayer .legend, #gap-1 .hoverlayer text').length") > 0
    hover = "Plotly.Fx.hover('map-1-1', [{curveNumber: 1, pointNumber: 0}]);"
    said = browser.execute_script(hover + "return document.querySelector('#map-1-1 .hoverlayer').textContent")
    assert said.endswith("/longlabel 1")
    assert len(browser.find_elements("css selector", "#map-1-1 .legend .traces")) == 12
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    cells = [cell.text for cell in browser.find_elements("css selector", "tbody tr td:nth-child(2)")]
    assert cells[:7] == ["0.600", "0.480", "0.500", "12", "106", "complete", "0.0"]  # the median of 101 to 112
    pictures = browser.execute_script("return [...document.images].map(i => [i.alt, i.naturalWidth])")
    assert pictures == [["Views of w1", 40]]


def mapped(count: int, labels: Any) -> Map:
    """A map of ``count`` random points with labels or without."""
    rng = np.random.default_rng(0)
    names = [f"<b>{i}" + "/long" * 40 * (i == 1) for i in range(count)]
    return Map(f"{count} images", ("first", "second"), rng.normal(size=(count, 2)), names, labels)


def test_a_map_has_one_point_per_image_and_one_curve_per_label() -> None:
    labels = np.array([0, 40, 40, 19, 0, 19])
    shown = mapped(6, labels)
    chart = draw_map(shown)
    assert [curve.name for curve in chart.data] == ["0", "19", "40"]
    assert chart.layout.showlegend
    assert len({(curve.marker.symbol, curve.marker.color) for curve in chart.data}) == 3
    for curve in chart.data:
        own = labels == int(curve.name)
        np.testing.assert_array_equal(np.stack([curve.x, curve.y], axis=1), shown.points[own])
        assert curve.customdata.tolist() == labels[own].tolist()
    assert chart.data[0].text.tolist() == ["&lt;b&gt;0", "&lt;b&gt;4"]
    (curve,) = draw_map(mapped(6, None)).data
    assert len(curve.x) == 6
    assert "label" not in curve.hovertemplate
    many = draw_map(mapped(60, np.arange(60)))
    assert sum(len(curve.x) for curve in many.data) == 60
    assert len(many.data) < 30
    assert not many.layout.showlegend


def test_a_damaged_map_is_reported(tmp_path: Path) -> None:
    folder = record(tmp_path / "run")
    maps.save("--map", folder / "map.json", mapped(4, None))
    content = json.loads((folder / "map.json").read_text())
    content["map"]["x"].pop()
    (folder / "map.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"map\.json cannot be read as a map"):
        read_run(folder)


def test_without_labels_the_page_explains_the_missing_accuracy(tmp_path: Path) -> None:
    folder = record(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if "knn" not in line) + "\n")
    assert "the images have no labels" in report.report(report.ReportConfig(runs=(folder,))).read_text()
