"""Draw the pictures of these pages that show no measurement: `python docs/figures.py`.

The bytes are counted, not measured: what an operation has to read and write, if nothing stays in a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

OUT = Path(__file__).parent / "images"
BLUE, RED, GREY = "#0072b2", "#d55e00", "#888888"  # Okabe and Ito's

Parts = Sequence[tuple[str, float]]

# Rows of packages, from those that know all to the one that knows none, and those that all rows but the last use.
ROWS: Sequence[Sequence[tuple[str, str]]] = (
    (("train, evaluate, embed, export, report, data, doctor", "the commands; from Python pretrain, Trainer and load"),),
    (("reports", "pages"), ("pretrained", "runs and files, read")),
    (("run", "the loop, its step and graph; folder, checkpoints, resume, faults"),),
    (("hooks", "metrics, loggers, checkpoints, evaluation, warnings; yours"),),
    (("probes", "kNN, linear, fine-tuning, neighbours, gap, collapse"), ("exports", "files for others")),
    (("methods", "heads, loss, published settings, views; yours"),),
    (("data", "images, views"), ("models", "backbones, weights"), ("optim", "optimizers, schedules")),
    (("kernels", "fused operations on three backends; know nothing of fastrm"),),
)
BESIDE: Sequence[tuple[str, str]] = (
    ("settings", "every setting,\nits range, flags"),
    ("machine", "devices, memory,\nprocesses, signals"),
    ("terminal", "progress, errors\nin one line"),
    ("files, own, evaluated", "whole files, whose\nthey are, scores"),
    ("packages", "those that only\nsome uses need"),
)

# Bytes a parameter, by what is read and written.
TEACHER: Mapping[str, Parts] = {
    "k = k·m + q·(1-m)": (("k·m", 8), ("q·(1-m)", 8), ("+", 12)),
    "k.mul_(m).add_(q, …)": (("mul_", 8), ("add_", 12)),
    "one pass": (("read both, write k", 12),),
    "bf16 student, converted, then lerp_": (("convert", 6), ("lerp_", 12)),
    "bf16 student, one pass": (("", 10),),
    "SGD, then one pass": (("SGD", 20), ("average", 12)),
    "SGD and teacher in one pass": (("all", 28),),
}
# MB for 256 queries, a queue of 65,536 rows and width 128, in float32.
_BANK, _LOGITS = 65536 * 128 * 4 / 1e6, 256 * 65536 * 4 / 1e6
CONTRASTIVE: Mapping[str, Parts] = {
    "einsum, cat, cross-entropy": (
        ("einsum", _BANK + _LOGITS),
        ("cat", 2 * _LOGITS),
        ("/ τ", 2 * _LOGITS),
        ("log-softmax", 2 * _LOGITS),
        ("its gradient", 2 * _LOGITS),
        ("/ τ", 2 * _LOGITS),
        ("einsum", _LOGITS + _BANK),
    ),
    "one sweep, 4 blocks of 64 queries": (("", 4 * _BANK),),
    "one sweep, all queries at once": (("", _BANK),),
}


def bars(title: str, unit: str, rows: Mapping[str, Parts], ours: Sequence[str], path: Path) -> None:
    """Stacked horizontal bars, one a way of doing it."""
    figure = Figure(figsize=(8.4, 0.5 + 0.48 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for y, (name, parts) in enumerate(rows.items()):
        left = 0.0
        for label, size in parts:
            axes.barh(y, size, left=left, color=BLUE if name in ours else RED, edgecolor="white", height=0.7)
            axes.text(left + size / 2, y, label, ha="center", va="center", color="white", fontsize=8)
            left += size
        axes.text(left, y, f" {left:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set(title=title, xlabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def step(path: Path) -> None:
    """What happens in a step, as boxes and arrows."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    boxes = {
        "loader": (0.0, 1.0, "loader\ntwo views"),
        "student": (2.2, 1.8, "student\nand predictor"),
        "teacher": (2.2, 0.2, "teacher\nno gradient"),
        "sweep": (4.6, 1.0, "one sweep\nloss, gradient,\nresidual term"),
        "optimizer": (7.0, 1.8, "optimizer\nstudent and teacher\nin one pass"),
        "queue": (7.0, 0.2, "queue\nof past keys"),
    }
    for x, y, text in boxes.values():
        style = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": BLUE, "linewidth": 1.5}
        axes.text(x, y, text, ha="center", va="center", bbox=style, fontsize=10)
    arrow(axes, boxes, "loader", "student", "")
    arrow(axes, boxes, "loader", "teacher", "")
    arrow(axes, boxes, "student", "sweep", "queries")
    arrow(axes, boxes, "teacher", "sweep", "keys")
    arrow(axes, boxes, "sweep", "optimizer", "gradient")
    arrow(axes, boxes, "sweep", "queue", "keys, after the step")
    axes.set(xlim=(-0.9, 8.2), ylim=(-0.4, 2.5))
    axes.axis("off")
    save(figure, path)


def layout(path: Path) -> None:
    """The package: whatever is in a row may use the rows below it, and none above."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.add_subplot()
    width, gap = 7.0, 0.15
    for y, row in enumerate(ROWS):
        side = (width - gap * (len(row) - 1)) / len(row)
        for x, (name, text) in enumerate(row):
            box(axes, x * (side + gap), y, side, 0.66, name, text, BLUE if y < len(ROWS) - 1 else RED)
        if y:
            axes.annotate("", (width / 2, y), (width / 2, y - 0.34), arrowprops={"arrowstyle": "-|>", "color": GREY})
    height = (len(ROWS) - 1.34) / len(BESIDE)
    for i, (name, text) in enumerate(BESIDE):
        box(axes, width + 0.4, i * height, 1.9, height - 0.2, name, text, GREY)
    axes.set(xlim=(-0.1, width + 2.4), ylim=(len(ROWS) - 0.2, -0.1))
    axes.axis("off")
    save(figure, path)


def box(axes: Axes, x: float, y: float, width: float, height: float, name: str, text: str, colour: str) -> None:
    """A frame with a name and what it is."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor=colour, linewidth=1.5))
    low = text.count("\n")
    axes.text(x + width / 2, y + height / 2 - 0.13 - 0.12 * low, name, ha="center", va="center", fontweight="bold")
    axes.text(x + width / 2, y + height / 2 + 0.15, text, ha="center", va="center", fontsize=8.5)


def arrow(axes: Axes, boxes: Mapping[str, tuple[float, float, str]], start: str, end: str, text: str) -> None:
    """An arrow between two boxes, with a word on it."""
    (x0, y0, _), (x1, y1, _) = boxes[start], boxes[end]
    style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 42, "shrinkB": 46, "linewidth": 1.3}
    axes.annotate("", (x1, y1), (x0, y0), arrowprops=style)
    side = "right" if y1 > y0 else "left"
    axes.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.1, text, ha=side, fontsize=8, color=GREY)


def save(figure: Figure, path: Path) -> None:
    """The same drawing gives the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "fastrm", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    """Draw all."""
    OUT.mkdir(exist_ok=True)
    ours = [name for name in TEACHER if "one pass" in name and "then" not in name]
    bars("Teacher's update: memory traffic", "bytes per parameter", TEACHER, ours, OUT / "teacher.svg")
    sweep = [name for name in CONTRASTIVE if "sweep" in name]
    bars("Contrastive loss and gradient: memory traffic", "MB", CONTRASTIVE, sweep, OUT / "contrastive.svg")
    step(OUT / "step.svg")
    layout(OUT / "layout.svg")


if __name__ == "__main__":
    main()
