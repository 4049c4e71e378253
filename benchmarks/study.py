"""Does residual momentum help, where, and at which weight?

    python -m benchmarks.study --data-root /usr/share/datasets/fashion-mnist --out runs/study

Trains with several seeds on Fashion-MNIST what :data:`QUESTIONS` lists, scores student and teacher, and writes
``study.json``, ``tables.md`` and two figures to the folder. The same command again goes on where it was cut off.
What is compared shares its seed: first weights, order of the images and augmentation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import signal
import statistics
import struct
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastrm.data import open_source
from fastrm.data.sources import ArrayImages
from fastrm.errors import Stopped
from fastrm.files import cache_root, read_json, write_json, write_text, write_whole
from fastrm.kernels import info_nce
from fastrm.machine.device import available_cores, choose_device
from fastrm.methods import contrastive
from fastrm.pretrained import open_pretrained
from fastrm.probes import Pixels, frozen_scores
from fastrm.probes.features import Setting
from fastrm.reports.plots import COLOURS
from fastrm.settings.config import ResidualPlace, build
from fastrm.terminal import shell
from fastrm.train import train

Results = dict[str, list[dict[str, float]]]
"""Scores by trial, one a seed."""
Curve = tuple[list[int], list[float]]
"""(steps, gap)."""
SCORES = ("knn_student", "knn_teacher", "linear_student", "linear_teacher")


class Scale(NamedTuple):
    """How large the study is."""

    images: int | None
    """Pictures that are trained on; None: all 60,000."""
    settings: dict[str, Any]


_SETTINGS = {"image_size": 28, "crop_min": 0.5, "output_dim": 128, "temperature": 0.2}
_CPU = {"arch": "test_resnet", "stem": "imagenet", "batch_size": 128, "epochs": 10, "hidden_dim": 512}
_GPU = {"arch": "resnet18", "stem": "small", "batch_size": 256, "epochs": 100, "hidden_dim": 2048}
SCALES = {"cpu": Scale(4000, _SETTINGS | _CPU), "gpu": Scale(None, _SETTINGS | _GPU)}
# MoCo-v3's rate, and the crops above: the best of a few for the plain method at the scale of the CPU.
_OF_METHOD: dict[str, dict[str, Any]] = {
    "mocov3": {"lr": 3.0},
    "mocov2": {"lr": 0.3, "queue_size": 1024},
    "byol": {"lr": 3.0},
}


@dataclass(frozen=True)
class Trial:
    """One setting, to be run with every seed."""

    weight: float
    method: str = "mocov3"
    momentum: float = 0.97
    """Of the teacher at the start; a cosine leads to 1."""
    length: int = 1
    """Factor of the number of epochs."""
    at: ResidualPlace = "output"
    warmup: float = 0.0
    """Share of the run in which the weight grows from 0."""
    form: Literal["cosine", "cross-entropy"] = "cosine"

    @property
    def name(self) -> str:
        """Its folder, and its name in ``study.json``."""
        parts = [self.method, f"m{self.momentum:g}", f"w{self.weight:g}"]
        parts += [f"x{self.length}"] * (self.length != 1) + [self.at] * (self.at != "output")
        parts += [f"warmup{self.warmup:g}"] * (self.warmup != 0) + [self.form] * (self.form != "cosine")
        return "-".join(parts)

    @property
    def plain(self) -> Trial:
        """The same without the residual term."""
        return Trial(0.0, self.method, self.momentum, self.length)


class Question(NamedTuple):
    """Trials that belong into one table, each with what its row is called."""

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


def cross_entropy_form(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Distillation in its usual form, as a control: H(softmax(t / T), softmax(s / T)) over the D components of the
    normalised outputs [N, D], averaged over the rows.

    The publication's abstract says that a cross-entropy form did not help; its details are not public, so this one is
    ours.
    """
    s, t = (torch.nn.functional.normalize(x.float(), dim=1) / temperature for x in (student, teacher))
    return torch.nn.functional.cross_entropy(s, t.detach().softmax(dim=1))


def _with_cross_entropy(
    query: Tensor, key: Tensor, same: Tensor, queue: Tensor | None = None, *, residual_weight: Any,
    contrastive_weight: float, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Stand in for ``residual_info_nce``, with the other form of its second term."""
    own, term = info_nce(query, key, queue, **options), cross_entropy_form(query, same)
    return contrastive_weight * own + residual_weight * term, own.detach(), term.detach()


def run(trial: Trial, seed: int, scale: Scale, data_root: Path, folder: Path, threads: int) -> dict[str, float]:
    """Train and score one trial with one seed, or read what an earlier call left."""
    torch.set_num_threads(threads)
    out = folder / trial.name / str(seed)
    out.mkdir(parents=True, exist_ok=True)
    settings = scale.settings | _OF_METHOD[trial.method]
    epochs = settings["epochs"] * trial.length
    config = build(
        **settings | {"epochs": epochs},
        data="fashion-mnist",
        data_root=data_root,
        method=trial.method,
        residual_weight=trial.weight,
        residual_at=trial.at,
        residual_warmup_epochs=trial.warmup * epochs,
        teacher_momentum=trial.momentum,
        teacher_momentum_end=1.0,
        **{} if trial.method == "mocov2" else {"predictor_hidden_dim": settings["hidden_dim"]},
        seed=seed,
        eval_every=0,
        log_every=5,
        keep=1,
        out=out,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(out / "log.txt", "a"))))
        if trial.form == "cross-entropy":
            stack.enter_context(mock.patch.object(contrastive, "residual_info_nce", _with_cross_entropy))
        train(config)
    scores = out / "scores.json"
    if not scores.exists():
        steps, gaps = gap_curve(out)
        late = [gap for step, gap in zip(steps, gaps, strict=True) if step > steps[-1] / 2]
        networks = open_pretrained(out, choose_device("auto")).networks
        write_json(scores, {"gap": statistics.fmean(late), **_scores(networks, data_root, config.input.image_size)})
    return read_json(scores)


def _scores(networks: Mapping[str, nn.Module], data_root: Path, image_size: int) -> dict[str, float]:
    source, setting = open_source("fashion-mnist", data_root), Setting(image_size, choose_device("auto"), workers=0)
    found = frozen_scores(networks, source, setting, knn=True, linear=True)
    kinds = {"knn": "knn20", "linear": "linear_quick"}
    return {f"{kind}_{name}": found[name][score].value for kind, score in kinds.items() for name in networks}


def gap_curve(out: Path) -> Curve:
    """The gap as a run logged it."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r["step"] for r in records if "gap" in r], [r["gap"] for r in records if "gap" in r]


def subset(data_root: Path, images: int | None, folder: Path) -> Path:
    """Leave the IDX files of so many training pictures, in a random order, and of all test pictures.

    A linear classifier and the kNN see no other labels either.
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


def _mean(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def tables(results: Results) -> str:
    """All questions as Markdown: means and standard deviations over the seeds."""
    names = ("gap", "kNN student", "kNN teacher", "linear student", "linear teacher", "kNN student against plain")
    lines = ["| without training | kNN | linear |", "|---|--:|--:|"]
    for name in ("pixels", "untrained"):
        (found,) = results[name]
        lines.append(f"| {name} | {100 * found[f'knn_{name}']:.1f} | {100 * found[f'linear_{name}']:.1f} |")
    for question in QUESTIONS:
        lines += ["", f"**{question.title}**", ""]
        lines += [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
        for row, trial in question.rows.items():
            found, plain = results[trial.name], results[trial.plain.name]
            cells = [_mean([r["gap"] for r in found], ".3f")]
            cells += [_mean([100 * r[score] for r in found], ".1f") for score in SCORES]
            less = [100 * (r["knn_student"] - p["knn_student"]) for r, p in zip(found, plain, strict=True)]
            cells.append("" if trial == trial.plain else _mean(less, "+.1f"))
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figures(results: Results, curves: Mapping[float, Sequence[Curve]], out: Path) -> None:
    """``gap.svg``, the gap in the course of training by weight; ``weight.svg``, kNN by weight and momentum."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for (weight, runs), colour in zip(curves.items(), COLOURS, strict=False):
        gaps = np.array([gaps for _, gaps in runs])
        axes.plot(runs[0][0], gaps.mean(axis=0), color=colour, label="plain" if weight == 0 else f"weight {weight:g}")
        axes.fill_between(runs[0][0], gaps.min(axis=0), gaps.max(axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="1 - cosine", yscale="log", title="Gap of student and teacher, MoCo-v3")
    _save(figure, out / "gap.svg")

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
    _save(figure, out / "weight.svg")


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    with mock.patch.dict(rcParams, {"svg.hashsalt": "fastrm", "svg.fonttype": "none"}):
        write_whole(path, lambda to: figure.savefig(to, format="svg", metadata={"Date": None}))


def study(data_root: Path, folder: Path, *, scale: str, seeds: int, jobs: int) -> Results:
    """Run what is missing and write what was found."""
    size, begin = SCALES[scale], time.monotonic()
    data_root = subset(data_root, size.images, folder)
    trials = {trial.name: trial for question in QUESTIONS for t in question.rows.values() for trial in (t.plain, t)}
    tasks = [(trial, seed) for seed in range(seeds) for trial in trials.values()]
    results: dict[tuple[str, int], dict[str, float]] = {}
    # Ctrl-C reaches all processes of a terminal; this one decides what it means.
    deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), **deaf) as pool:
        threads = max(1, available_cores() // jobs)
        waiting = {pool.submit(run, *task, size, data_root, folder, threads): task for task in tasks}
        try:
            for done in as_completed(waiting):
                trial, seed = waiting[done]
                results[trial.name, seed] = done.result()
                minutes = (time.monotonic() - begin) / 60
                print(f"{len(results)}/{len(tasks)}  {minutes:.1f} min  {trial.name} {seed}", flush=True)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()  # a run goes on from its last checkpoint
            if isinstance(error, KeyboardInterrupt):
                raise Stopped("stopped; the same command goes on", 128 + signal.SIGINT) from None
            raise
    found = {name: [results[name, seed] for seed in range(seeds)] for name in trials}
    first = QUESTIONS[0].rows.values()
    trained = open_pretrained(folder / next(iter(first)).name / "0", torch.device("cpu"))
    torch.manual_seed(0)
    untouched = {"pixels": Pixels(), "untrained": trained.untrained().to(choose_device("auto"))}
    for name, network in untouched.items():
        found[name] = [_scores({name: network}, data_root, trained.image_size)]
    curves = {t.weight: [gap_curve(folder / t.name / str(seed)) for seed in range(seeds)] for t in first}
    write_json(folder / "study.json", found)
    write_text(folder / "tables.md", tables(found))
    figures(found, curves, folder)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split("\n")[0])
    where = "where Fashion-MNIST lies or is downloaded to"
    parser.add_argument("--data-root", type=Path, default=cache_root(), help=where)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder for the runs and the results")
    gpu = torch.cuda.is_available()
    parser.add_argument("--scale", choices=tuple(SCALES), default="gpu" if gpu else "cpu", help="size of the study")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a trial")
    parser.add_argument("--jobs", type=int, default=1 if gpu else available_cores(), help="runs at a time")
    options = parser.parse_args(argv)
    if min(options.seeds, options.jobs) < 1:
        parser.error("--seeds and --jobs must be at least 1")
    found = study(options.data_root, options.out, scale=options.scale, seeds=options.seeds, jobs=options.jobs)
    print(tables(found))


if __name__ == "__main__":
    shell.run(main)
