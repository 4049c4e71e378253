"""Measures the time to reach a kNN accuracy: fastrm against lightly, stable-pretraining, the official MoCo-v3's style.

    python -m benchmarks.race --data FOLDER

Each trains the network of examples/cifar10.py from the same first weights, with the same heads, recipe and views, on
the same cores: MoCo-v3 against the official style, MoCo-v2 against lightly, both against stable-pretraining. The clock
is stopped while a network is scored, in the same way for all. Each finished run writes its figures to a file in
``--results``, and is then skipped. Contenders that are not installed are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks._loops import (
    Loop,
    Transformed,
    in_workers,
    lightly_loop,
    lightly_transform,
    mocov3_loop,
    stable_pretraining_loop,
    stepped,
    transform,
)
from benchmarks._study import ROOT, made, save
from benchmarks._timing import DEVICE, synchronise
from examples.cifar10 import OF_METHOD, SETTINGS, VIEW, SmallResNet
from fastrm.data import open_source
from fastrm.data.scan import scan
from fastrm.data.settling import settled
from fastrm.files import read_json, write_json, write_text
from fastrm.machine.device import available_cores
from fastrm.methods import build_method
from fastrm.optim.schedules import Schedule
from fastrm.pretraining import pretrain
from fastrm.probes import Pixels, frozen_scores
from fastrm.probes.features import Setting
from fastrm.reports.plots import COLOURS
from fastrm.settings.config import Config, build
from fastrm.terminal import shell

RESULTS = ROOT / "docs" / "study" / "race"
MARKS = (0.36, 0.39, 0.42)
"""kNN accuracies. Raw pixels reach about the first, and two cores the last in two minutes."""
SCORED = 5000
"""Images in the kNN bank, and test images."""
RECIPE: dict[str, Any] = {
    **SETTINGS, "batch_size": 128, "workers": 0, "residual_weight": 0.0, "eval_every": 0, "log_every": 100,
}  # fmt: skip
METHODS = {"mocov3": "MoCo-v3", "mocov2": "MoCo-v2"}
Record = dict[str, Any]
"""Seed, points and source of a run."""
Watch = Callable[[nn.Module], bool]
"""Called with the backbone after each step; returns whether to end the run."""


def settings_of(method: str, epochs: int, seed: int) -> dict[str, Any]:
    """The settings of a run, for all contenders."""
    return {**RECIPE, **OF_METHOD[method], "method": method, "epochs": epochs, "seed": seed}


def ours(data: str, method: str, epochs: int, seed: int, watch: Watch, folder: Path) -> None:
    """Train with fastrm."""

    class Watching:
        def on_step(self, run: Any, *_: object) -> None:
            if watch(run.student):
                run.stop()

    settings = settings_of(method, epochs, seed)
    torch.manual_seed(seed)
    pretrain(data, arch=SmallResNet(), hooks=[Watching()], out=folder, resume="never", log_to=(), **settings)


def rival(
    make_loop: Callable[..., Loop],
    transforms: Sequence[Any],
    data: str,
    method: str,
    epochs: int,
    seed: int,
    watch: Watch,
    folder: Path,
) -> None:
    """Train with the loop of another project, with the same networks, recipe and views; ``folder`` is not used."""
    settings = settings_of(method, epochs, seed)
    del settings["augmentation"]  # an object, which build does not take
    config: Config = build(**settings, data=data)
    torch.manual_seed(seed)
    built = build_method(config.replace(channels_last=False), device=DEVICE, arch=SmallResNet()).train()
    optim, batch = config.optim, 128
    optimizer = torch.optim.AdamW((p for p in built.parameters() if p.requires_grad), weight_decay=optim.weight_decay)
    source = settled(open_source(data))
    views = [transform(VIEW, VIEW.side(32)) for transform in transforms]
    loader = in_workers(Transformed(source, *views), batch, available_cores())
    schedule = Schedule(optim, config.method, batch, len(loader))
    done = 0
    options: dict[str, Any] = {
        "temperature": config.method.temperature,
        "momentum": lambda: schedule.teacher_momentum(done),
    }
    if method == "mocov2":
        options |= {"queue": config.method.queue_size, "dim": config.method.output_dim}
    step = make_loop(built, stepped(optimizer), **options)
    for first, second, *_ in (batch for _ in range(epochs) for batch in loader):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr(done)
        step(first.to(DEVICE), second.to(DEVICE))
        done += 1
        if watch(built.student.backbone):
            break


_STABLE = partial(rival, stable_pretraining_loop, (transform, transform))
CONTENDERS: dict[str, dict[str, Callable[[str, str, int, int, Watch, Path], None]]] = {
    "mocov3": {
        "fastrm": ours,
        "the official style": partial(rival, mocov3_loop, (transform, transform)),
        "stable-pretraining": _STABLE,
    },
    "mocov2": {
        "fastrm": ours,
        "lightly": partial(rival, lightly_loop, (lightly_transform,)),
        "stable-pretraining": _STABLE,
    },
}
NEEDS = {"lightly": "lightly", "stable-pretraining": "stable_pretraining"}
"""Modules that contenders need."""


def absent(contender: str) -> bool:
    """Whether a module that the contender needs is not installed."""
    return contender in NEEDS and find_spec(NEEDS[contender]) is None


class Clock:
    """Measures the seconds of training, and scores the network every ``every`` steps while the clock is stopped.

    Args:
        score: function that scores a backbone.
        every: steps between two scores.
        until: score at which the run ends.
        limit: seconds after which the run ends.
    """

    def __init__(self, score: Callable[[nn.Module], float], *, every: int, until: float, limit: float) -> None:
        self._score, self._every, self._until, self._limit = score, every, until, limit
        self._steps, self._taken, self._begin = 0, 0.0, time.perf_counter()
        self.points: list[tuple[int, float, float]] = []
        """Steps, seconds, score."""

    def __call__(self, backbone: nn.Module) -> bool:
        """Return whether to end the run."""
        self._steps += 1
        if self._steps % self._every:
            return False
        synchronise()
        self._taken += time.perf_counter() - self._begin
        score = self._score(backbone)
        self.points.append((self._steps, round(self._taken, 1), round(score, 4)))
        self._begin = time.perf_counter()
        return score >= self._until or self._taken >= self._limit


def reached(points: Iterable[tuple[int, float, float]], mark: float) -> float | None:
    """Seconds until a score, linearly interpolated; None if it was not reached."""
    seconds = score = 0.0
    for _, then, found in points:
        if found >= mark:
            return then if not score else seconds + (then - seconds) * (mark - score) / (found - score)
        seconds, score = then, found
    return None


def table(found: Mapping[str, Mapping[str, Sequence[Record]]], pixels: float) -> str:
    """Medians of the seconds to each mark, and of the ratios to fastrm, paired by seed."""
    lines = [f"kNN (k = 20) of the raw pixels: {100 * pixels:.1f} %"]
    for method, contenders in found.items():
        names = [f"{100 * mark:g} %, s" for mark in MARKS]
        lines += ["", f"| {METHODS[method]} | seeds | {' | '.join(names)} | times fastrm's |", "|---|" + "--:|" * 5]
        mine = {record["seed"]: record for record in contenders.get("fastrm", ())}
        for name, records in contenders.items():
            cells = [median([reached(record["points"], mark) for record in records]) for mark in MARKS]
            pairs = [
                (reached(record["points"], mark), reached(mine[record["seed"]]["points"], mark))
                for record in records
                if record["seed"] in mine
                for mark in MARKS
            ]
            ratios = [theirs / own for theirs, own in pairs if theirs is not None and own is not None]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
            lines.append(f"| {name} | {len(records)} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines) + "\n"


def median(seconds: Sequence[float | None]) -> str:
    """Median over all seeds, as text; empty if one of them did not reach the mark."""
    reached = [value for value in seconds if value is not None]
    return f"{statistics.median(reached):.0f}" if reached and len(reached) == len(seconds) else ""


def figure(found: Mapping[str, Mapping[str, Sequence[Record]]], pixels: float) -> Figure:
    """Accuracy over the minutes of training, with a line per seed."""
    drawn = Figure(figsize=(8.4, 3.4), layout="constrained")
    for axes, (method, contenders) in zip(drawn.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for (name, records), colour in zip(contenders.items(), COLOURS, strict=False):
            for number, record in enumerate(records):
                _, seconds, scores = zip(*record["points"], strict=True)
                label = name if number == 0 else None
                axes.plot([s / 60 for s in seconds], [100 * s for s in scores], ".-", color=colour, label=label)
        axes.axhline(100 * pixels, color="black", linestyle="--", label="the raw pixels")
        axes.set(xlabel="minutes of training", ylabel="kNN, k = 20, % right", title=METHODS[method])
        axes.legend(frameon=False)
    return drawn


def records(results: Path) -> dict[str, dict[str, list[Record]]]:
    """All finished runs, by method and contender."""
    found: dict[str, dict[str, list[Record]]] = {}
    for method, contenders in CONTENDERS.items():
        for name in contenders:
            files = sorted(results.glob(f"{method}-{name.split()[-1]}-[0-9]*.json"))
            if files:
                found.setdefault(method, {})[name] = [read_json(file) for file in files]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="a folder with train/CLASS/… and val/CLASS/…")
    parser.add_argument("--out", type=Path, default=Path("runs/race"), help="folder for fastrm's runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures of finished runs")
    parser.add_argument("--epochs", type=int, default=3, help="epochs that the schedules span")
    parser.add_argument("--every", type=int, default=50, help="steps between two scores")
    parser.add_argument("--minutes", type=float, default=15, help="minutes of training after which a run ends")
    parser.add_argument("--methods", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    options.results.mkdir(parents=True, exist_ok=True)
    for name in NEEDS:
        if absent(name):
            print(f"{name} is not installed, and is left out")
    source, _ = scan(settled(open_source(options.data)), workers=available_cores())  # so that the results are cached
    source = source.limited(SCORED)
    setting = Setting(32, DEVICE, workers=0)

    def score(backbone: nn.Module) -> float:
        return frozen_scores({"it": backbone}, source, setting, knn=True)["it"]["knn20"].value

    pixels = score(Pixels())
    for seed in range(options.seeds):
        for method in options.methods:
            for name, train in CONTENDERS[method].items():
                file = options.results / f"{method}-{name.split()[-1]}-{seed}.json"
                if not file.exists() and not absent(name):
                    clock = Clock(score, every=options.every, until=MARKS[-1], limit=60 * options.minutes)
                    train(options.data, method, options.epochs, seed, clock, options.out / file.stem)
                    about = {"epochs": options.epochs, "cores": available_cores(), **made()}
                    write_json(file, {"seed": seed, "points": clock.points, **about})
                    print(f"{file.stem}: {clock.points[-1]}", flush=True)
    found = records(options.results)
    write_text(options.results / "tables.md", table(found, pixels))
    save(figure(found, pixels), options.results / "race.svg")
    print(table(found, pixels))


if __name__ == "__main__":
    shell.run(main)
