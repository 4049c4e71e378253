"""The page of a report."""

from __future__ import annotations

import html
import io
import re
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastrm import own
from fastrm.files import write_text, write_whole, writing
from fastrm.reports.plots import COLOURS, PLOTS, Plot, draw
from fastrm.reports.runs import Run, differing
from fastrm.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"


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


def write(runs: Sequence[Run], out: Path) -> Path:
    """Write the page and its pictures into a folder, and return the page's path.

    Raises:
        UsageError: the folder cannot be written, or holds files of these names that are not fastrm's.
    """
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
