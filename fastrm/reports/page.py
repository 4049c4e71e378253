"""The page of a report."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastrm import own
from fastrm.evaluated import rows
from fastrm.files import write_text, writing
from fastrm.reports.plots import COLOURS, PLOTS, Plot, draw, draw_map
from fastrm.reports.runs import Run, differing, label
from fastrm.version import __version__

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAGE = "index.html"
_NO_SCORES = (
    "kNN accuracy was not measured: the images have no labels, or --eval-every is 0. "
    "<code>python -m fastrm.embed</code> makes nearest neighbours and a map without labels; this page shows those that "
    "lie in the run folder."
)


def _chart(figure: Figure, name: str, height: str = "320px") -> str:
    """A chart as HTML, of this height in CSS; the page has the library that draws it."""
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        default_width="100%",
        default_height=height,
        config={
            "responsive": True,
            "displaylogo": False,
            "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
            "toImageButtonOptions": {"filename": name, "scale": 2},
        },
    )
    return f"<div class='chart'>{text}</div>"


def _legend(runs: Sequence[Run]) -> str:
    names = differing(runs)
    keys = zip(runs, COLOURS * len(runs), strict=False)
    items = [f"<li><span style='color:{colour}'>■</span> {html.escape(label(run, names))}</li>" for run, colour in keys]
    return f"<ul class='legend'>{''.join(items)}</ul>" if len(runs) > 1 else ""


def _maps(runs: Sequence[Run]) -> Iterator[str]:
    """The maps of images in the folders of the runs."""
    maps = [(run, shown) for run in runs for shown in run.maps]
    for number, (run, shown) in enumerate(maps, start=1):
        title = html.escape(f"Map of {run.name}", quote=True)
        caption = f"{html.escape(shown.about)}. Images near each other are similar to the network."
        chart = _chart(draw_map(shown), f"map-{number}-1", "min(44rem, 120vw)")
        yield (
            f"<figure id='map-{number}' class='map' role='group' aria-label='{title}'><h2>{title}</h2>"
            f"{chart}<figcaption>{caption}</figcaption></figure>"
        )


def _sheets(run: Run) -> Iterator[str]:
    """The contact sheets in the run's folder: views, nearest neighbours."""
    for path in run.sheets:
        content = base64.b64encode(path.read_bytes()).decode()
        title = html.escape(f"{path.stem.replace('_', ' ').replace('-', ' ').capitalize()} of {run.name}")
        kind = "png" if path.suffix.lower() == ".png" else "jpeg"
        yield (
            f"<figure><h2>{title}</h2><div class='wide'><img alt='{title}' src='data:image/{kind};base64,{content}'>"
            "</div></figure>"
        )


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(runs: Sequence[Run]) -> str:
    """A column per run, since runs may differ in many settings."""
    rates = [run.series("images_per_second")[1] for run in runs]
    lines = {
        "kNN student": [_number(run.last("knn_student")) for run in runs],
        "kNN teacher": [_number(run.last("knn_teacher")) for run in runs],
        "last gap": [_number(run.last("gap")) for run in runs],
        "steps": [str(run.records[-1]["step"]) for run in runs],
        "images per second": [_number(statistics.median(rate) if rate else None, 0) for rate in rates],
        "state": ["complete" if run.complete else "not complete" for run in runs],
        **{name: [str(run.settings.get(name)) for run in runs] for name in differing(runs)},
    }
    head = "".join(
        f'<th scope="col"><span style="color:{colour}">■</span> {html.escape(run.name)}</th>'
        for run, colour in zip(runs, COLOURS * len(runs), strict=False)
    )
    body = "".join(f'<tr><th scope="row">{name}</th>{_cells("td", cells)}</tr>' for name, cells in lines.items())
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"


def _scores(runs: Sequence[Run]) -> str:
    """What was trained beside what was not, in a table per run and set of images."""
    found = []
    for run in runs:
        for images, scores in run.scores.items():
            head, *body = rows(scores, "% right")
            lines = "".join(f"<tr>{_cells('td', row)}</tr>" for row in body)
            found.append(
                f"<h3>{html.escape(run.name)}, {html.escape(images)}</h3><div class='wide'><table>"
                f"<thead><tr>{_cells('th', head)}</tr></thead><tbody>{lines}</tbody></table></div>"
            )
    note = "<p>With 95 % intervals by the bootstrap over test images, paired where two networks are compared.</p>"
    return f"<h2>Scores</h2>{note}{''.join(found)}" if found else ""


def _cells(kind: str, row: Sequence[str]) -> str:
    return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
.wide { overflow-x: auto; }
.charts { display: grid; gap: 1rem; }
@media (min-width: 48rem) { .charts { grid-template-columns: repeat(var(--columns), 1fr); } }
.chart { min-width: 0; }
.map { max-width: 48rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.5rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
@media (max-width: 48rem) {
  table { font-size: .8rem; }
  th, td { padding: .25rem .35rem; white-space: normal; overflow-wrap: anywhere; }
}
figure { margin: 2.5rem 0; }
figcaption { color: #444; max-width: 45rem; }
"""


def page(runs: Sequence[Run], figures: Sequence[tuple[Plot, Sequence[Figure]]]) -> str:
    """The HTML page."""
    from plotly.offline import get_plotlyjs

    legend = _legend(runs)
    drawn = [
        f"<figure id='{plot.name}' role='group' aria-label='{html.escape(plot.title, quote=True)}'>"
        f"<h2>{html.escape(plot.title)}</h2>{legend}<div class='charts' style='--columns: {len(charts)}'>"
        + "".join(_chart(chart, f"{plot.name}-{number}") for number, chart in enumerate(charts, start=1))
        + f"</div><figcaption>{html.escape(plot.caption)}</figcaption></figure>"
        for plot, charts in figures
    ]
    if not any(run.series("knn_student")[0] for run in runs):
        drawn.append(f"<p>{_NO_SCORES}</p>")
    drawn += _maps(runs)
    pictures = [sheet for run in runs for sheet in _sheets(run)]
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
        f"<script>{get_plotlyjs()}</script>"
        f"<div class='wide'>{_table(runs)}</div>{_scores(runs)}"
        f"{''.join([*drawn, *pictures, *settings])}</body></html>\n"
    )


def write(runs: Sequence[Run], out: Path) -> Path:
    """Write the page into a folder, and return its path.

    Raises:
        UsageError: the folder cannot be written, or holds a page that is not fastrm's.
    """
    with writing(out):
        own.require("--out", out, own.page, holds=out / PAGE)
    content = page(runs, [(plot, charts) for plot in PLOTS if (charts := draw(plot, runs))])
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / PAGE, content)
    return out / PAGE
