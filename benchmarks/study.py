"""Does residual momentum help, where, and at which weight?

    python -m benchmarks.study --data-root /usr/share/datasets/fashion-mnist --out runs/study

Trains the trials in :data:`QUESTIONS` with several seeds on Fashion-MNIST, scores student and teacher, and writes
``study.json``, ``tables.md`` and two figures to the folder. The same command continues an interrupted study. Compared
runs share their seed, and so initial weights, order of the images and augmentation.
"""

from __future__ import annotations

import argparse
import itertools
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks._study import SCORE_NAMES, SCORES, Curve, Setup, Trial, curve, in_turn, mean, run, save, untouched
from fastrm.data import open_source
from fastrm.data.sources import ArrayImages
from fastrm.files import cache_root, write_json, write_text, write_whole
from fastrm.machine.device import available_cores
from fastrm.reports.plots import COLOURS
from fastrm.terminal import shell

Results = dict[str, list[dict[str, float]]]
"""Scores by trial, one entry per seed."""


class Scale(NamedTuple):
    """The size of the study."""

    images: int | None
    """Number of training images; None means all 60,000."""
    settings: dict[str, Any]


_SETTINGS = {"image_size": 28, "crop_min": 0.5, "output_dim": 128, "temperature": 0.2, "eval_every": 0, "log_every": 5}
_CPU = {"arch": "test_resnet", "stem": "imagenet", "batch_size": 128, "epochs": 10, "hidden_dim": 512}
_GPU = {"arch": "resnet18", "stem": "small", "batch_size": 256, "epochs": 100, "hidden_dim": 2048}
SCALES = {"cpu": Scale(4000, _SETTINGS | _CPU), "gpu": Scale(None, _SETTINGS | _GPU)}
# MoCo-v3's learning rate and the crops above are the best of a few that were tried with the plain method.
_OF_METHOD: dict[str, dict[str, Any]] = {
    "mocov3": {"lr": 3.0},
    "mocov2": {"lr": 0.3, "queue_size": 1024},
    "byol": {"lr": 3.0},
}


class Question(NamedTuple):
    """The trials of one table, by the name of their row."""

    title: str
    rows: dict[str, Trial]


def _by_weight(weights: Sequence[float], **settings: Any) -> dict[str, Trial]:
    return {f"weight {weight:g}": Trial(weight, **settings) for weight in weights}


def _by_horizon(weights: Sequence[float], length: int) -> dict[str, Trial]:
    settings = itertools.product((0.9, 0.97, 0.99), weights)
    return {f"momentum {m:g}, weight {w:g}": Trial(w, momentum=m, length=length) for m, w in settings}


QUESTIONS = (
    Question("The weight, MoCo-v3", _by_weight((0, 0.1, 0.3, 1))),
    Question("The weight, MoCo-v2", _by_weight((0, 0.1, 1), method="mocov2")),
    Question("The weight, BYOL", _by_weight((0, 0.1, 1), method="byol")),
    Question(
        "The place of the term, MoCo-v3",
        {"plain": Trial(0)}
        | {f"weight 1 at the {at}": Trial(1, at=at) for at in ("output", "projector", "backbone")},
    ),
    Question("The teacher's horizon, MoCo-v3, the same length", _by_horizon((0, 0.1, 1), length=1)),
    Question("The teacher's horizon, MoCo-v3, twice the length", _by_horizon((0, 1), length=2)),
    Question(
        "A warm-up of the weight, MoCo-v3",
        {"plain": Trial(0), "weight 1 at once": Trial(1)}
        | {f"weight 1, over {share:.0%} of the run": Trial(1, warmup=share) for share in (0.25, 1)},
    ),
    Question(
        "The cross-entropy form, MoCo-v3",
        {"plain": Trial(0)} | {f"{form}, weight {weight:g}": Trial(weight, form=form)
                               for form in ("cosine", "cross-entropy") for weight in (0.1, 1)},
    ),
)  # fmt: skip


def subset(data_root: Path, images: int | None, folder: Path) -> Path:
    """Write IDX files with ``images`` random training images, and all test images.

    The linear classifier and kNN use only these labels too.
    """
    if images is None:
        return data_root
    source, out = open_source("fashion-mnist", data_root), folder / f"fashion-mnist-{images}"
    out.mkdir(parents=True, exist_ok=True)
    chosen = np.random.default_rng(0).permutation(len(source.train))[:images]
    for prefix, part, which in (("train", source.train, chosen), ("t10k", source.test, slice(None))):
        assert isinstance(part, ArrayImages)
        assert part.labels is not None
        for name, array in (("images-idx3", part.arrays), ("labels-idx1", part.labels.astype(np.uint8))):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array[which].shape)
            content = head + array[which].tobytes()
            write_whole(out / f"{prefix}-{name}-ubyte", lambda path, content=content: path.write_bytes(content))
    return out


def tables(results: Results) -> str:
    """All questions as Markdown: means and standard deviations over the seeds."""
    names = ("gap", *SCORE_NAMES, "kNN student against plain")
    lines = ["| without training | kNN | linear |", "|---|--:|--:|"]
    for name in ("pixels", "untrained"):
        (found,) = results[name]
        lines.append(f"| {name} | {100 * found[f'knn_{name}']:.1f} | {100 * found[f'linear_{name}']:.1f} |")
    for question in QUESTIONS:
        lines += ["", f"**{question.title}**", ""]
        lines += [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        for row, trial in question.rows.items():
            found, plain = results[trial.name], results[trial.plain.name]
            cells = [mean([r["gap"] for r in found], ".3f")]
            cells += [mean([100 * r[score] for r in found], ".1f") for score in SCORES]
            less = [100 * (r["knn_student"] - p["knn_student"]) for r, p in zip(found, plain, strict=True)]
            cells.append("" if trial == trial.plain else mean(less, "+.1f"))
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(results: Results, curves: Mapping[float, Sequence[Curve]], out: Path) -> None:
    """Draw ``gap.svg``, the gap during training by weight, and ``weight.svg``, kNN by weight and momentum."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for (weight, runs), colour in zip(curves.items(), COLOURS, strict=False):
        gaps = np.array([gaps for _, gaps in runs])
        axes.plot(runs[0][0], gaps.mean(axis=0), color=colour, label="plain" if weight == 0 else f"weight {weight:g}")
        axes.fill_between(runs[0][0], gaps.min(axis=0), gaps.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="1 - cosine", yscale="log", title="Gap of student and teacher, MoCo-v3")
    save(figure, out / "gap.svg")

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    panels = [question for question in QUESTIONS if question.title.startswith("The teacher's horizon")]
    shared = None
    for place, question in enumerate(panels, start=1):
        shared = axes = figure.add_subplot(1, len(panels), place, sharey=shared)
        momenta = dict.fromkeys(trial.momentum for trial in question.rows.values())
        for momentum, colour in zip(momenta, COLOURS, strict=False):
            trials = [trial for trial in question.rows.values() if trial.momentum == momentum]
            found = np.array([[r["knn_student"] for r in results[trial.name]] for trial in trials]) * 100
            middle, spread = found.mean(axis=1), found.std(axis=1, ddof=min(1, found.shape[1] - 1))
            label = f"start momentum {momentum:g}"
            axes.errorbar(range(len(trials)), middle, spread, color=colour, capsize=3, label=label)
        axes.set_xticks(range(len(trials)), [f"{trial.weight:g}" for trial in trials])
        axes.set(xlabel="residual weight", ylabel="kNN of the student, %", title=question.title.rpartition(", ")[2])
    save(figure, out / "weight.svg")


def study(data_root: Path, folder: Path, *, scale: str, seeds: int, jobs: int) -> Results:
    """Run the missing trials, and write the results."""
    size = SCALES[scale]
    setup = Setup("fashion-mnist", subset(data_root, size.images, folder), size.settings, _OF_METHOD)
    trials = {trial.name: trial for question in QUESTIONS for t in question.rows.values() for trial in (t.plain, t)}
    tasks = [(trial, seed) for seed in range(seeds) for trial in trials.values()]
    results = {(trial.name, seed): scores for trial, seed, scores in in_turn(run, tasks, setup, folder, jobs=jobs)}
    found = {name: [results[name, seed] for seed in range(seeds)] for name in trials}
    first = QUESTIONS[0].rows.values()
    found |= {name: [scores] for name, scores in untouched(folder / next(iter(first)).name / "0", setup).items()}
    curves = {t.weight: [curve(folder / t.name / str(seed), "gap") for seed in range(seeds)] for t in first}
    write_json(folder / "study.json", found)
    write_text(folder / "tables.md", tables(found))
    figures(found, curves, folder)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split("\n")[0])
    where = "folder of Fashion-MNIST, to which it is downloaded if missing"
    parser.add_argument("--data-root", type=Path, default=cache_root(), help=where)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for the runs and the results")
    gpu = torch.cuda.is_available()
    parser.add_argument("--scale", choices=tuple(SCALES), default="gpu" if gpu else "cpu", help="size of the study")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per trial")
    parser.add_argument("--jobs", type=int, default=1 if gpu else available_cores(), help="runs at a time")
    options = parser.parse_args(argv)
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    found = study(options.data_root, options.out, scale=options.scale, seeds=options.seeds, jobs=options.jobs)
    print(tables(found))


if __name__ == "__main__":
    shell.run(main)
