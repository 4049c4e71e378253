"""Does residual momentum help on photographs? CIFAR-10, as examples/cifar10.py trains on it.

    python -m benchmarks.study_photos --data FOLDER

Each finished run writes its figures to a small file in ``--results``, which is meant for the repository. Runs that have
a file are skipped, so an interrupted study can continue anywhere. An interrupted run continues from its checkpoint in
``--out``. ``tables.md`` in the same folder has the results, and the rows that were not run. Compared runs share their
seed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as students_t

from benchmarks._study import ROOT, SCORE_NAMES, SCORES, Setup, Trial, curve, in_turn, made, mean, run, untouched
from examples.cifar10 import OF_METHOD, SETTINGS, SmallResNet
from fastrm.files import cache_root, read_json, write_json, write_text
from fastrm.machine.device import available_cores
from fastrm.terminal import shell

RESULTS = ROOT / "docs" / "study" / "photos"
METHODS = {"mocov3": "MoCo-v3", "mocov2": "MoCo-v2"}
_CPU = {"batch_size": 128, "workers": 0, "eval_every": 1, "eval_images": 10_000}
_SMALL = {"batch_size": 256, "workers": 1}
_RESNET = {"arch": "resnet18", "stem": "small", "batch_size": 256, "workers": 1, "hidden_dim": 2048}
# The two methods take about the same time, since MoCo-v2 trains on one view per image.
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"mocov3": {**_CPU, "epochs": 2}, "mocov2": {**_CPU, "epochs": 4}},
    "gpu": {"mocov3": {**_SMALL, "epochs": 20, "eval_every": 5}, "mocov2": {**_SMALL, "epochs": 40, "eval_every": 10}},
    "gpu-40": {method: {**_RESNET, "epochs": 40, "eval_every": 5} for method in METHODS},
    "gpu-200": {method: {**_RESNET, "epochs": 200, "eval_every": 20} for method in METHODS},
}
"""Differences from the example. With ``timeout --signal INT 480`` before it, a command runs for 8 minutes."""


def _rows(method: str) -> dict[str, Trial]:
    rising = {f"weight {weight:g}": Trial(weight, method, 0.99) for weight in (0, 0.1, 0.5, 1)}
    projector = {"weight 1 at the projector": Trial(1, method, 0.99, at="projector")}
    constant = {f"constant momentum, weight {w:g}": Trial(w, method, 0.99, momentum_end=0.99) for w in (0, 1)}
    return rising | projector | constant


ROWS = {title: _rows(method) for method, title in METHODS.items()}
FIRST = ("weight 0", "weight 0.1", "weight 1")
"""Rows that are run first, and the only ones on a CPU."""

Record = dict[str, Any]
"""The results of a run: ``scores``, ``curves`` of points [epoch, value], and its source."""
Found = Mapping[str, Mapping[int, Record]]
"""Records by trial and seed."""


def setup_of(scale: str, data: str, data_root: Path | None) -> Setup:
    """The setup of the example at a scale."""
    settings = {**SETTINGS, "log_every": 100, "log_to": ()}
    del settings["teacher_momentum"]
    of_method = {**SCALES[scale], "mocov2": {**SCALES[scale]["mocov2"], **OF_METHOD["mocov2"]}}
    arch = SmallResNet if scale in ("cpu", "gpu") else None
    return Setup(data, data_root, settings, of_method, arch, SCALES[scale]["mocov3"]["workers"])


def record(trial: Trial, seed: int, setup: Setup, folder: Path, results: Path, threads: int) -> Record:
    """Run a trial, and write its results."""
    scores = run(trial, seed, setup, folder, threads)
    curves = {}
    for metric in ("gap", "knn_student", "knn_teacher"):
        epochs, values = curve(folder / trial.name / str(seed), metric, by="epoch")
        curves[metric] = [[round(epoch, 2), round(v, 4)] for epoch, v in zip(epochs, values, strict=True)]
    found = {"scores": scores, "curves": curves, **made(), "threads": threads}
    write_json(_file(trial, seed, results), found)
    return found


def _file(trial: Trial, seed: int, results: Path) -> Path:
    return results / f"{trial.name}-{seed}.json"


def interval(differences: Sequence[float]) -> str:
    """Mean of differences paired by seed, with the 95 % interval of Student's t."""
    middle, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return _signed(middle)
    half = float(students_t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    return f"{_signed(middle)} ({_signed(middle - half)} to {_signed(middle + half)})"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"  # the addition turns -0.0 into 0.0


def leads_from(record: Record) -> float:
    """The first epoch from which the teacher's kNN is above the student's in all evaluations; infinite if none."""
    first = math.inf
    pairs = zip(record["curves"]["knn_student"], record["curves"]["knn_teacher"], strict=True)
    for (epoch, student), (_, teacher) in reversed(list(pairs)):
        if teacher <= student:
            break
        first = epoch
    return first


def tables(found: Found, beside: Mapping[str, Mapping[str, float]]) -> str:
    """The results as Markdown: a column per trial, and one for its differences from the plain trial."""
    lines = ["| without training | kNN | linear |", "|---|--:|--:|"]
    for name, scores in beside.items():
        lines.append(f"| {name} | {100 * scores[f'knn_{name}']:.1f} | {100 * scores[f'linear_{name}']:.1f} |")
    for title, rows in ROWS.items():
        lines += ["", f"**{title}**"]
        ran = {row: trial for row, trial in rows.items() if found.get(trial.name)}
        columns = {row: _results(found[trial.name]) for row, trial in ran.items()}
        for row, trial in ran.items():
            paired = found.get(trial.plain.name, {}).keys() & found[trial.name].keys()
            if trial != trial.plain and paired:
                columns[f"{row} against plain"] = _differences(found[trial.name], found[trial.plain.name], paired)
        if columns:
            lines += ["", f"| | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
            names = ("seeds", "gap", *SCORE_NAMES, "teacher leads from epoch")
            lines += [f"| {' | '.join(cells)} |" for cells in zip(names, *columns.values(), strict=True)]
        missing = [row for row in rows if row not in ran]
        if missing:
            lines += ["", f"Not run: {'; '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _results(runs: Mapping[int, Record]) -> list[str]:
    scores = [record["scores"] for record in runs.values()]
    leads = ["never" if math.isinf(epoch := leads_from(record)) else f"{epoch:g}" for record in runs.values()]
    accuracies = [mean([100 * s[name] for s in scores], ".1f") for name in SCORES]
    return [str(len(runs)), mean([s["gap"] for s in scores], ".3f"), *accuracies, ", ".join(dict.fromkeys(leads))]


def _differences(runs: Mapping[int, Record], plain: Mapping[int, Record], seeds: Iterable[int]) -> list[str]:
    pairs = [(runs[seed]["scores"], plain[seed]["scores"]) for seed in seeds]
    accuracies = [interval([100 * (own[name] - other[name]) for own, other in pairs]) for name in SCORES]
    return [
        str(len(pairs)),
        f"{statistics.fmean(own['gap'] - other['gap'] for own, other in pairs):+.3f}",
        *accuracies,
        "",
    ]


def study(setup: Setup, folder: Path, results: Path, *, rows: Sequence[str], seeds: int, jobs: int) -> str:
    """Run the trials without a file; write and return the tables of all trials with a file."""
    results.mkdir(parents=True, exist_ok=True)
    beside = results / "untouched.json"
    trials = [trial for of_method in ROWS.values() for row, trial in of_method.items() if row in rows]
    wanted = [(trial, seed) for seed in range(seeds) for trial in trials]
    missing = [task for task in wanted if not _file(*task, results).exists()]
    for trial, seed, _ in in_turn(record, missing, setup, folder, results, jobs=jobs) if missing else ():
        if not beside.exists():
            write_json(beside, untouched(folder / trial.name / str(seed), setup))
        write_text(results / "tables.md", told(results))
    return told(results)


def told(results: Path) -> str:
    """The tables of all finished runs."""
    every = [trial for of_method in ROWS.values() for trial in of_method.values()]
    files = {trial.name: sorted(results.glob(f"{trial.name}-[0-9]*.json")) for trial in every}
    found = {
        name: {int(path.stem.removeprefix(f"{name}-")): read_json(path) for path in paths}
        for name, paths in files.items()
    }
    return tables(found, read_json(results / "untouched.json"))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study_photos", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder with train/CLASS/… and val/CLASS/…")
    parser.add_argument(
        "--data-root", type=Path, default=cache_root(), help="folder of cifar10, or where to download it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study-photos"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures of finished runs")
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="size of the study")
    parser.add_argument("--rows", choices=("first", "all"), default="first", help="weights 0, 0.1 and 1, or all trials")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per trial")
    gpu = torch.cuda.is_available()
    parser.add_argument("--jobs", type=int, default=1 if gpu else available_cores(), help="runs at a time")
    options = parser.parse_args(argv)
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    rows = FIRST if options.rows == "first" else tuple(next(iter(ROWS.values())))
    setup = setup_of(options.scale, options.data, options.data_root)
    folder, results = options.out / options.scale, options.results / options.scale
    print(study(setup, folder, results, rows=rows, seeds=options.seeds, jobs=options.jobs))


if __name__ == "__main__":
    shell.run(main)
