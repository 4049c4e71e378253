"""Plots a healthy run and three failed ones, on the patches of `make demo`.

    python -m benchmarks.health

Takes about two minutes of one core per run. Runs that are complete in ``--out`` are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import fastrm
from benchmarks._study import ROOT, curve, made, save
from fastrm.files import write_json
from fastrm.reports.plots import COLOURS
from fastrm.settings.config_file import read_settings
from fastrm.terminal import shell

SETTINGS: dict[str, Any] = {
    **read_settings(ROOT / "examples" / "demo.toml"), "eval_every": 1, "log_every": 5, "log_to": (), "workers": 0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "healthy: MoCo-v3, learning rate 0.004, teacher momentum 0.9": {},
    "learning rate 0.2": {"lr": 0.2},
    "teacher momentum 0.999": {"teacher_momentum": 0.999},
    "BYOL, learning rate 0.05": {"method": "byol", "lr": 0.05},
}
PANELS = {
    "loss": "loss",
    "gap": "gap",
    "effective_rank": "effective rank",
    "knn_student": "kNN accuracy of the student",
}


def figure(runs: Mapping[str, Path], untrained: float) -> Figure:
    """A panel per metric with a curve per run."""
    drawn = Figure(figsize=(8.0, 5.6), layout="constrained")
    for place, (metric, title) in enumerate(PANELS.items(), start=1):
        axes = drawn.add_subplot(2, 2, place)
        for (name, folder), colour in zip(runs.items(), COLOURS, strict=False):
            axes.plot(*curve(folder, metric), ".-", color=colour, label=name)
        if metric == "knn_student":
            axes.axhline(untrained, color="black", linestyle=":", label="untrained")
        axes.set(xlabel="step", title=title)
    handles, labels = drawn.axes[-1].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/health"), help="folder for the runs")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "study" / "health.json", help="for the figures")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "images" / "health.svg", help="for the picture")
    options = parser.parse_args(argv)
    runs = {name: options.out / str(number) for number, name in enumerate(CASES)}
    scores = {name: fastrm.pretrain(out=out, **{**SETTINGS, **CASES[name]}).scores for name, out in runs.items()}
    names = ("loss", "gap", "effective_rank", "feature_std", "knn_student", "knn_teacher")
    last = {name: {metric: round(found[metric], 4) for metric in names} for name, found in scores.items()}
    untrained, pixels = (next(iter(scores.values()))[f"knn_{name}"] for name in ("untrained", "pixels"))
    write_json(options.json, {"runs": last, "untrained": untrained, "pixels": pixels, **made()})
    save(figure(runs, untrained), options.svg)


if __name__ == "__main__":
    shell.run(main)
