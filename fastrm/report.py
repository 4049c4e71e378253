"""Show runs on one page: what was trained, how it went, and how runs differ.

    python -m fastrm.report runs/weight0 runs/weight1 --out report

The page is one HTML file that needs no network; the same plots lie beside it as PNGs.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from tyro.conf import Positional, arg

from fastrm import own
from fastrm.errors import UsageError
from fastrm.files import read_json, write_text, write_whole, writing
from fastrm.own import METRICS
from fastrm.settings import command_line
from fastrm.settings.kinds import checked
from fastrm.settings.of_run import given
from fastrm.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
# Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_NOT_SHOWN = frozenset({"out", "resume", "recipe"})  # settings that say nothing of how runs differ


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a page about one run, or several over each other."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]", help_behavior_hint="")]] = ()
    """Run folders."""
    checkpoint: Path | None = None
    """The same as one RUN."""
    out: Path | None = None
    """Folder that the page is written to; unset: report, in the run's folder or, for several runs, here."""


class Run(NamedTuple):
    """What a run folder says of a run."""

    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    """Logged steps and evaluations, in order."""
    complete: bool

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """(epochs, values) of a metric, where it was recorded and finite."""
        found = [(r["epoch"], r[metric]) for r in self.records if isinstance(r.get(metric), int | float)]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def last(self, metric: str) -> float | None:
        """The last value of a metric."""
        values = self.series(metric)[1]
        return values[-1] if values else None


class Plot(NamedTuple):
    """One figure: curves of some metrics over the epochs."""

    name: str
    title: str
    caption: str
    panels: tuple[tuple[str, tuple[str, ...]], ...]
    """For each panel its axis and its metrics; a second metric is dashed, a third dotted."""


PLOTS = (
    Plot(
        "loss",
        "Loss",
        "The whole loss, the method's own part, and the residual term before its weight.",
        (("loss", ("loss",)), ("method's own", ("contrastive",)), ("residual", ("residual",))),
    ),
    Plot(
        "gap",
        "Gap between student and teacher",
        "1 - mean cosine between student and teacher on the same view.",
        (("gap", ("gap",)),),
    ),
    Plot(
        "knn",
        "kNN accuracy",
        "Student solid, teacher dashed; on images that are not trained on.",
        (
            ("accuracy, k = 20", ("knn_student", "knn_teacher")),
            ("accuracy, k = 200", ("knn200_student", "knn200_teacher")),
        ),
    ),
    Plot(
        "online",
        "Online linear classifier",
        "Trained along on the student's detached features: on the training views, and on the test images.",
        (("training accuracy", ("online_accuracy",)), ("test accuracy", ("linear_student",))),
    ),
    Plot(
        "schedule",
        "Learning rate and teacher momentum",
        "What the optimizer and the teacher were given at each logged step.",
        (("learning rate", ("lr",)), ("teacher momentum", ("teacher_momentum",))),
    ),
    Plot(
        "collapse",
        "Collapse watch",
        "Spread of the student's features (near 0 when all images look the same) and their effective rank.",
        (("feature spread", ("feature_std",)), ("effective rank", ("effective_rank",))),
    ),
    Plot(
        "throughput",
        "Throughput",
        "Images a second between logged steps, evaluations and checkpoints left out.",
        (("images a second", ("images_per_second",)),),
    ),
)


def read_run(folder: Path) -> Run:
    """Read a run folder; a last line that is cut off, of a run that still goes on, is passed over.

    Raises:
        UsageError: it is no run folder, or nothing was recorded yet.
    """
    if not (folder / METRICS).is_file():
        raise UsageError(f"{folder} is no run folder: it has no {METRICS}")
    try:
        settings = read_json(folder / "config.json")
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines[:-1]]
        if lines:
            with contextlib.suppress(ValueError):
                records.append(json.loads(lines[-1]))
        sound = all(isinstance(r, dict) and isinstance(r.get("epoch"), int | float) for r in records)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} cannot be read as a run: {error}") from None
    if not sound or not isinstance(settings, dict):
        raise UsageError(f"{folder / METRICS} holds other lines than a run records")
    if not any("loss" in record for record in records):
        raise UsageError(f"{folder} has recorded nothing yet")
    return Run(folder.resolve().name, settings, records, _complete(folder, records[-1].get("step", 0)))


def _complete(folder: Path, step: int) -> bool:
    """Whether the run's summary is of its last step: it may have gone on since."""
    path = folder / "summary.json"
    try:
        return path.is_file() and bool(read_json(path).get("step", step) >= step)
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{path} is no summary that fastrm wrote; move it away") from None


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _NOT_SHOWN)
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


def label(run: Run, names: Sequence[str]) -> str:
    """A run's name and what sets it apart, of which three settings at most."""
    return ", ".join([run.name, *(f"{name} {run.settings.get(name)}" for name in names[:3])])


def draw(plot: Plot, runs: Sequence[Run]) -> Figure | None:
    """The figure, with a panel for each axis that any run has recorded something for; None without any."""
    from matplotlib.figure import Figure

    panels = [(axis, metrics) for axis, metrics in plot.panels if any(r.series(m)[0] for r in runs for m in metrics)]
    if not panels:
        return None
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 3.4), layout="constrained")
    names = differing(runs)
    for place, (axis, metrics) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for run, colour in zip(runs, COLOURS * len(runs), strict=False):
            for metric, style in zip(metrics, ("-", "--", ":"), strict=False):
                epochs, values = run.series(metric)
                text = label(run, names) if metric == metrics[0] else None
                marker = "." if len(epochs) < 30 else None
                axes.plot(epochs, values, color=colour, linestyle=style, marker=marker, label=text)
        axes.set_xlabel("epoch")
        axes.set_ylabel(axis)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(runs) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 2), frameon=False)
    return figure


def _inline(figure: Figure, number: int) -> str:
    """The figure as SVG for a page on which its ids must not meet another's."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastrm", "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>plot{number}-", svg)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(runs: Sequence[Run]) -> str:
    names = differing(runs)
    head = ["run", *names, "steps", "last gap", "kNN student", "kNN teacher", "images a second", "state"]
    rows = []
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        rates = run.series("images_per_second")[1]
        cells = [
            *(str(run.settings.get(name)) for name in names),
            str(run.records[-1]["step"]),
            _number(run.last("gap")),
            _number(run.last("knn_student")),
            _number(run.last("knn_teacher")),
            _number(statistics.median(rates) if rates else None, 0),
            "complete" if run.complete else "not complete",
        ]
        key = f'<th scope="row"><span style="color:{colour}">■</span> {html.escape(run.name)}</th>'
        rows.append(f"<tr>{key}{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    header = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
figure { margin: 2.5rem 0; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: #444; max-width: 45rem; }
"""


def page(runs: Sequence[Run], figures: Sequence[tuple[Plot, Figure]]) -> str:
    """The HTML page."""
    drawn = [
        f"<figure id='{plot.name}' role='group' aria-label='{html.escape(plot.title, quote=True)}'>"
        f"<h2>{html.escape(plot.title)}</h2>{_inline(figure, number)}"
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
        for number, (plot, figure) in enumerate(figures)
    ]
    settings = [
        f"<details><summary>Settings of {html.escape(run.name)}</summary><div class='wide'><table>"
        + "".join(
            f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in run.settings.items()
        )
        + "</table></div></details>"
        for run in runs
    ]
    title = html.escape(", ".join(run.name for run in runs))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta name='generator' content='{own.MARK} {__version__}'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<div class='wide'>{_table(runs)}</div>{''.join(drawn)}{''.join(settings)}</body></html>\n"
    )


def report(options: ReportConfig) -> Path:
    """Write the page and its pictures, and return the page's path.

    Raises:
        UsageError: there is no such run, or the folder cannot be written.
    """
    options = checked(options)
    folders = [path.parent if path.is_file() else path for path in given(options.runs, options.checkpoint)]
    runs = [read_run(folder) for folder in folders]
    out = options.out or (folders[0] / "report" if len(runs) == 1 else Path("report"))
    if own.run(out):
        raise UsageError(f"--out {out} is a run folder itself; give another")
    with writing(out):
        own.require("--out", out, own.page, holds=out / PAGE)
        for plot in PLOTS:
            own.require("--out", out, own.plot, holds=out / f"{plot.name}.png")
    figures = [(plot, figure) for plot in PLOTS if (figure := draw(plot, runs)) is not None]
    content = page(runs, figures)
    mark = {"Software": f"{own.MARK} {__version__}"}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for plot, figure in figures:
            write_whole(out / f"{plot.name}.png", partial(figure.savefig, format="png", dpi=150, metadata=mark))
        write_text(out / PAGE, content)
    return out / PAGE


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    print(report(command_line.parse(ReportConfig, argv, prog="python -m fastrm.report")))


if __name__ == "__main__":
    command_line.run(main)
