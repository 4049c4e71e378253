"""Images per second of the trainer, compared with the loops of other projects and with the bare networks.

pytest benchmarks/bench_step.py --benchmark-only
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._loops import Transformed, in_workers, lars, lightly_loop, mocov3_loop, stepped, transform
from benchmarks._timing import DEVICE, synchronise
from fastrm import train
from fastrm.data import Batch, Source, open_source
from fastrm.machine.device import available_cores
from fastrm.methods import Method, build_method, find
from fastrm.optim import build_optimizer
from fastrm.optim.schedules import Rates
from fastrm.run.graph import GraphedStep
from fastrm.run.step import AUTOCAST, Step
from fastrm.settings.config import Config, build

SIZE, ROUNDS = 64, 3
# Batch size and steps by stem; the ImageNet stem needs a fourteenth of the work.
STEMS = {"small": (32, 6), "imagenet": (128, 9)}
WORKERS = min(available_cores(), 8)
SHARED: dict[str, Any] = {
    "data": "synthetic", "arch": "resnet18", "image_size": SIZE, "residual_weight": 0.0, "queue_size": 4096,
    "precision": "fp32", "epochs": 20, "eval_every": 0, "log_every": 1000, "warmup_epochs": 0.0,
}  # fmt: skip


def settings(method: str, stem: str, **leaves: Any) -> Config:
    batch, steps = STEMS[stem]
    return build(**{**SHARED, "method": method, "stem": stem, "batch_size": batch, "max_steps": steps, **leaves})


def rate(loader: Any, stem: str, step: Callable[[Tensor, Tensor], None]) -> float:
    """Images per second of a loop, from its second step on."""
    batch, steps = STEMS[stem]
    begin = 0.0
    for number, (first, second, *_) in enumerate(loader):
        if number == steps:
            break
        step(first.to(DEVICE), second.to(DEVICE))
        if number == 0:
            synchronise()
            begin = time.perf_counter()
    synchronise()
    return batch * (steps - 1) / (time.perf_counter() - begin)


def trainer(config: Config, folder: Path) -> Callable[[], float]:
    """Images per second that a run records, from its second step on."""
    config = config.replace(resume="never", out=folder)

    def run() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(config)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        speed: float = json.loads(lines[-1])["images_per_second"]
        return speed

    return run


def networks(config: Config) -> Method[Any]:
    """Backbone and heads of our run, in the usual memory format."""
    return build_method(config.replace(channels_last=False), device=DEVICE)


def lightly_run(source: Source, config: Config) -> Callable[[], float]:
    """Run lightly's MoCo example, with its transform and SGD."""
    method = networks(config)
    move = stepped(torch.optim.SGD(method.student.parameters(), lr=0.015, momentum=0.9, weight_decay=1e-4))
    step = lightly_loop(method, move, queue=4096, dim=128, temperature=0.2, momentum=lambda: 0.999)
    views = importlib.import_module("lightly.transforms").MoCoV2Transform(input_size=SIZE)
    batch, stem = STEMS[config.model.stem][0], config.model.stem
    return lambda: rate(in_workers(Transformed(source, views), batch, WORKERS), stem, step)


def mocov3_run(source: Source, config: Config) -> Callable[[], float]:
    """Run a loop in the official MoCo-v3's style, with torchvision's transforms and LARS."""
    method = networks(config)
    move = lars([*method.student.parameters(), *method.predictor.parameters()])
    step = mocov3_loop(method, move, temperature=1.0, momentum=lambda: 0.99)
    first, second = (transform(view, SIZE) for view in find("mocov3").augmentation(0.2).views)
    batch, stem = STEMS[config.model.stem][0], config.model.stem
    return lambda: rate(in_workers(Transformed(source, first, second), batch, WORKERS), stem, step)


def bare(config: Config) -> Callable[[], float]:
    """Forward passes of both networks and backward pass of the student on a batch in memory."""
    built = build_method(config, device=DEVICE).train()
    batch, steps = STEMS[config.model.stem]
    images = torch.randn(batch, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def step(first: Tensor, second: Tensor) -> None:
        views = (first, second)[: built.directions]
        total = torch.stack([built.encode_student(view).output.sum() for view in views]).sum()
        with torch.no_grad():
            for view in views:
                built.teacher(view)
        total.backward()
        built.zero_grad(set_to_none=True)

    return lambda: rate([(images, images)] * steps, config.model.stem, step)


def compare(names: dict[str, Callable[[], float]], title: str, enter: Any, note: Any) -> None:
    """Run the contenders in turn, and report by which factor the first is faster than each."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(names), len(names)):
            rates[name].append(names[name]())
    first = rates[next(iter(names))]
    case = f"{title}, ResNet-18, {SIZE} pixels, float32, {DEVICE}, {WORKERS} workers"
    lines = [case, "| loop | images per second | from, to | fastrm is faster by |", "|---|--:|--:|--:|"]
    for name, these in rates.items():
        ratio = statistics.median(a / b for a, b in zip(first, these, strict=True))
        lines.append(f"| {name} | {statistics.median(these):.0f} | {min(these):.0f}, {max(these):.0f} | {ratio:.2f} |")
    note("\n".join(lines))
    enter(f"{case}, time per image", {name: [1 / value for value in these] for name, these in rates.items()})


@pytest.mark.parametrize(("method", "stem"), [("mocov2", "small"), ("mocov2", "imagenet"), ("mocov3", "small")])
def test_against_the_loops(method: str, stem: str, tmp_path: Path, enter: Any, note: Any) -> None:
    source, config = open_source("synthetic"), settings(method, stem)
    rival: dict[str, Callable[[], float]]
    if method == "mocov2":
        pytest.importorskip("lightly")
        rival = {"lightly's MoCo example": lightly_run(source, config)}
    else:
        rival = {"the official MoCo-v3's style": mocov3_run(source, config)}
    names = {"fastrm.train": trainer(config, tmp_path / "run"), **rival, "bare networks": bare(config)}
    compare(names, f"{method}, {stem} stem", enter, note)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("arch", "size", "batch", "precision"), [("resnet50", 224, 128, "bf16"), ("resnet18", 32, 64, "bf16")]
)
def test_the_step_on_a_gpu(arch: str, size: int, batch: int, precision: str, enter: Any, note: Any) -> None:
    """The step on images in GPU memory: eager, as one CUDA graph, and the bare networks."""
    torch.backends.cudnn.benchmark = True  # as in a run
    config = build(data="synthetic", method="mocov3", arch=arch, image_size=size, precision=precision)
    views = torch.randn(2, batch, 3, size, size, device=DEVICE)
    first, second = (view.contiguous(memory_format=torch.channels_last) for view in views)

    def stepper(kind: type[Step]) -> Callable[[], object]:
        method = build_method(config, device=DEVICE).train()
        method.pair.keep_low_precision(AUTOCAST[precision])
        step = kind(
            method, build_optimizer(method, config.optim), precision=precision, accumulate=1, clip_norm=None,
            layout=torch.channels_last,
        )  # fmt: skip
        return lambda: step(
            [Batch((first, second), [])], Rates(0.1, 1.0, 0.99), measure=False
        )  # fmt: skip

    method = build_method(config, device=DEVICE).train()
    method.pair.keep_low_precision(AUTOCAST[precision])

    def networks() -> None:
        with torch.autocast(DEVICE.type, AUTOCAST[precision]):
            outputs = [method.encode_student(view).output.sum() for view in (first, second)]
            with torch.no_grad():
                for view in (first, second):
                    method.encode_teacher(view)
        torch.stack(outputs).sum().backward()
        method.zero_grad(set_to_none=True)

    contenders: dict[str, Callable[[], object]] = {
        "uncaptured": stepper(Step), "captured": stepper(GraphedStep), "bare networks": networks,
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(8):
        for name, run in contenders.items():
            begin = time.perf_counter()
            for _ in range(5):
                run()
            synchronise()
            if turn:  # the first turn compiles and captures
                times[name].append((time.perf_counter() - begin) / 5)
    case = f"{arch}, {size} pixels, batch {batch}, {precision}, {torch.cuda.get_device_name(DEVICE)}"
    lines = [case, "| | images per second | captured is faster by |", "|---|--:|--:|"]
    for name, these in times.items():
        ratio = statistics.median(a / b for a, b in zip(these, times["captured"], strict=True))
        lines.append(f"| {name} | {batch / statistics.median(these):.0f} | {ratio:.2f} |")
    note("\n".join(lines))
    enter(f"{case}, time per step", times)


@pytest.mark.parametrize("residual_weight", [0.0, 1.0])
@pytest.mark.parametrize(
    ("method", "stem"),
    [("mocov3", "small"), ("mocov2", "small"), ("mocov2", "imagenet"), ("byol", "small"), ("densecl", "small")],
)
def test_where_a_step_goes(
    method: str,
    stem: str,
    residual_weight: float,
    tmp_path: Path,
    enter: Any,
    note: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The share of time outside the networks' forward and backward passes, by the trainer's profile."""
    train.train(settings(method, stem, residual_weight=residual_weight, max_steps=5, out=tmp_path / "run", profile=3))
    shown = capsys.readouterr().out
    parts = re.findall(r"^([a-z ]+?)\s+([\d.]+)\s+([\d.]+)%$", shown, re.M)
    shares = {name: float(share) for name, _, share in parts}
    inside = sum(shares[name] for name in ("student", "teacher", "backward"))
    case = f"a step of {method}, {stem} stem, weight {residual_weight:g}"
    note(f"{case}: {100 - inside:.1f} % outside the networks: {shares}")
    enter(case, {name: [float(ms) / 1e3] for name, ms, _ in parts})
