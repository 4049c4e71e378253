"""Shared code of the studies: trials, their training and scores, parallel runs, and tables."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastrm.data import open_source
from fastrm.errors import Stopped
from fastrm.files import read_json, write_json, write_whole
from fastrm.kernels import info_nce
from fastrm.machine.device import available_cores, choose_device
from fastrm.methods import contrastive
from fastrm.pretrained import open_pretrained
from fastrm.pretraining import pretrain
from fastrm.probes import Pixels, frozen_scores
from fastrm.probes.features import Setting
from fastrm.settings.config import ResidualPlace

ROOT = Path(__file__).parent.parent
Curve = tuple[list[float], list[float]]
"""(steps or epochs, values)."""
SCORES = ("knn_student", "knn_teacher", "linear_student", "linear_teacher")
SCORE_NAMES = tuple(score.replace("_", " ").replace("knn", "kNN") for score in SCORES)


class Setup(NamedTuple):
    """Data, network and settings that all trials share."""

    data: str
    data_root: Path | None
    settings: Mapping[str, Any]
    of_method: Mapping[str, Mapping[str, Any]]
    """Additional or different settings by method."""
    arch: Callable[[], nn.Module] | None = None
    """Builds the network; None if the settings name one."""
    workers: int = 0
    """Loader processes of an evaluation."""

    def network(self, seed: int) -> nn.Module | None:
        """The network with the initial weights of a seed."""
        torch.manual_seed(seed)
        return None if self.arch is None else self.arch()


@dataclass(frozen=True)
class Trial:
    """One row of a study, which is run with every seed."""

    weight: float
    method: str = "mocov3"
    momentum: float = 0.97
    """Teacher momentum at the start; a cosine schedule leads to ``momentum_end``."""
    length: int = 1
    """Factor of the number of epochs."""
    at: ResidualPlace = "output"
    warmup: float = 0.0
    """Fraction of the run in which the weight grows from 0."""
    momentum_end: float = 1.0
    form: Literal["cosine", "cross-entropy"] = "cosine"

    @property
    def name(self) -> str:
        """Name of its folder, and key in ``study.json``."""
        parts = [self.method, f"m{self.momentum:g}", f"w{self.weight:g}"]
        parts += [f"to{self.momentum_end:g}"] * (self.momentum_end != 1)
        parts += [f"x{self.length}"] * (self.length != 1) + [self.at] * (self.at != "output")
        parts += [f"warmup{self.warmup:g}"] * (self.warmup != 0) + [self.form] * (self.form != "cosine")
        return "-".join(parts)

    @property
    def plain(self) -> Trial:
        """The same trial without the residual term."""
        return Trial(0.0, self.method, self.momentum, self.length, momentum_end=self.momentum_end)


def cross_entropy_form(student: Tensor, teacher: Tensor, *, temperature: float = 0.1) -> Tensor:
    """Distillation in its usual form, as a control: H(softmax(t / T), softmax(s / T)) over the D components of the
    normalised outputs [N, D], averaged over the rows.

    The publication's abstract says that a cross-entropy form did not help. Its details are not public; this form is our
    own.
    """
    s, t = (torch.nn.functional.normalize(x.float(), dim=1) / temperature for x in (student, teacher))
    return torch.nn.functional.cross_entropy(s, t.detach().softmax(dim=1))


def _with_cross_entropy(
    query: Tensor, key: Tensor, same: Tensor, queue: Tensor | None = None, *, residual_weight: Any,
    contrastive_weight: float, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Replaces ``residual_info_nce``, with the cross-entropy form of the residual term."""
    own, term = info_nce(query, key, queue, **options), cross_entropy_form(query, same)
    return contrastive_weight * own + residual_weight * term, own.detach(), term.detach()


def run(trial: Trial, seed: int, setup: Setup, folder: Path, threads: int) -> dict[str, float]:
    """Train and score one trial with one seed, or read the results of an earlier call in ``folder``."""
    torch.set_num_threads(threads)
    out = folder / trial.name / str(seed)
    out.mkdir(parents=True, exist_ok=True)
    settings = {**setup.settings, **setup.of_method[trial.method]}
    epochs = settings["epochs"] * trial.length
    if trial.method != "mocov2":
        settings = {"predictor_hidden_dim": settings["hidden_dim"], **settings}
    module = setup.network(seed)
    if module is not None:
        settings["arch"] = module
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(out / "log.txt", "a"))))
        if trial.form == "cross-entropy":
            stack.enter_context(mock.patch.object(contrastive, "residual_info_nce", _with_cross_entropy))
        pretrain(
            setup.data,
            data_root=setup.data_root,
            method=trial.method,
            residual_weight=trial.weight,
            residual_at=trial.at,
            residual_warmup_epochs=trial.warmup * epochs,
            teacher_momentum=trial.momentum,
            teacher_momentum_end=trial.momentum_end,
            seed=seed,
            keep=1,
            out=out,
            **settings | {"epochs": epochs},
        )
    scores = out / "scores.json"
    if not scores.exists():
        steps, gaps = curve(out, "gap")
        late = [gap for step, gap in zip(steps, gaps, strict=True) if step > steps[-1] / 2]
        trained = open_pretrained(out, choose_device("auto"), arch=module)
        write_json(scores, {"gap": statistics.fmean(late), **scored(trained.networks, setup, trained.image_size)})
    return read_json(scores)


def scored(networks: Mapping[str, nn.Module], setup: Setup, image_size: int) -> dict[str, float]:
    """kNN (k = 20) and quick linear accuracy of networks, by the names in :data:`SCORES`."""
    source, setting = (
        open_source(setup.data, setup.data_root),
        Setting(image_size, choose_device("auto"), setup.workers),
    )
    found = frozen_scores(networks, source, setting, knn=True, linear=True)
    kinds = {"knn": "knn20", "linear": "linear_quick"}
    return {f"{kind}_{name}": found[name][score].value for kind, score in kinds.items() for name in networks}


def untouched(trained: Path, setup: Setup) -> dict[str, dict[str, float]]:
    """Scores of the raw pixels, and of a run's network with random weights."""
    run = open_pretrained(trained, torch.device("cpu"), arch=setup.network(0))
    networks: dict[str, nn.Module] = {"pixels": Pixels(), "untrained": run.untrained().to(choose_device("auto"))}
    return {name: scored({name: network}, setup, run.image_size) for name, network in networks.items()}


def curve(out: Path, metric: str, by: Literal["step", "epoch"] = "step") -> Curve:
    """The logged values of a metric."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if metric in record]
    return [record[by] for record in found], [record[metric] for record in found]


def made() -> dict[str, Any]:
    """The source of figures: commit, date, torch version and device."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": asked.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def in_turn(
    run: Callable[..., dict[str, Any]], tasks: Sequence[tuple[Trial, int]], *rest: Any, jobs: int
) -> Iterator[tuple[Trial, int, dict[str, Any]]]:
    """Call ``run(trial, seed, *rest, threads)`` in ``jobs`` processes, and yield each result when it is complete.

    Raises:
        Stopped: by Ctrl-C.
    """
    begin = time.monotonic()
    # On a terminal, Ctrl-C reaches all processes; only this one handles it.
    deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), **deaf) as pool:
        threads = max(1, available_cores() // jobs)
        waiting = {pool.submit(run, *task, *rest, threads): task for task in tasks}
        try:
            for number, done in enumerate(as_completed(waiting), start=1):
                (trial, seed), found = waiting[done], done.result()
                minutes = (time.monotonic() - begin) / 60
                print(f"{number}/{len(tasks)}  {minutes:.1f} min  {trial.name} {seed}", flush=True)
                yield trial, seed, found
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()  # its run continues from the last checkpoint
            if isinstance(error, KeyboardInterrupt):
                raise Stopped("stopped; the same command continues", 128 + signal.SIGINT) from None
            raise


def mean(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation over the seeds."""
    spread = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{spread}"


def save(figure: Figure, path: Path) -> None:
    """Write a figure, with the same bytes each time."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    if not figure.legends:
        figure.axes[0].legend(frameon=False)
    with mock.patch.dict(rcParams, {"svg.hashsalt": "fastrm", "svg.fonttype": "none"}):
        write_whole(path, lambda to: figure.savefig(to, format="svg", metadata={"Date": None}))
