"""What a run would take, from a few real steps, of which nothing is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from fastrm.data import Loader
from fastrm.data.torch_loader import AHEAD, TorchLoader
from fastrm.machine import memory
from fastrm.machine.distributed import gather_objects, world
from fastrm.optim import Schedule
from fastrm.run.graph import EAGER, GraphedStep
from fastrm.run.step import Step
from fastrm.settings.config import Config
from fastrm.terminal.progress import spelled

TIMED = 3
LONGEST = 20.0
"""Seconds after which no further step is made, if one was timed."""


def dry_run(
    config: Config,
    step_once: Step,
    loader: Loader,
    batches: Iterator[tuple[Tensor, ...]],
    schedule: Schedule,
    workers: int,
) -> dict[str, Any]:
    """Make real steps, and say and return what memory and time they take; nothing is written.

    The first steps make what is made once. Loader processes work ahead, so that the batches that they had ready when
    a step began would hide what they take: the time is that of steps after those.

    Args:
        config: settings, resolved.
        step_once: the step of the run.
        loader, batches: the loader, and its micro-batches from the start on.
        schedule: of the run.
        workers: loader processes.

    Returns:
        In the first process ``peak_memory`` (bytes, of the process that took most), ``step_seconds``,
        ``first_step_seconds``, ``epoch_seconds``, ``run_seconds``, ``steps_per_epoch``, ``images_per_epoch``,
        ``images_per_second``, ``steps``; else nothing.
    """
    assert config.input.batch_size is not None
    ahead = math.ceil(AHEAD * workers / config.optim.accumulate) if isinstance(loader, TorchLoader) else 0
    once = EAGER + 1 if isinstance(step_once, GraphedStep) else 1
    first, times, began = 0.0, [], time.perf_counter()
    for step in count():
        begin = time.perf_counter()
        step_once(
            islice(batches, config.optim.accumulate),
            lr=schedule.lr(step),
            residual_weight=schedule.residual_weight(step),
            teacher_momentum=schedule.teacher_momentum(step + 1),
            measure=False,
        )
        skipped = step_once.check(step + 1)  # which waits for the device
        if step == 0:
            first = time.perf_counter() - begin
        if step >= once:
            times.append(time.perf_counter() - begin)
        done = len(times) >= TIMED + ahead or (bool(times) and time.perf_counter() - began > LONGEST)
        if any(gather_objects(done)):
            break
    steady = times[ahead:] or times
    everyone = gather_objects((memory.peak(step_once.device), sum(steady) / len(steady), first))
    if world().rank:
        return {}
    peaks, means, firsts = zip(*everyone, strict=True)
    seconds = max(means)
    found = {
        "peak_memory": max((p for p in peaks if p is not None), default=None),
        "first_step_seconds": max(firsts),
        "step_seconds": seconds,
        "epoch_seconds": seconds * schedule.steps_per_epoch,
        "run_seconds": seconds * schedule.total,
        "images_per_second": config.input.batch_size / seconds,
        "images_per_epoch": schedule.steps_per_epoch * config.input.batch_size,
        "steps_per_epoch": schedule.steps_per_epoch,
        "steps": schedule.total,
    }
    _say(found, step_once.device, workers if isinstance(loader, TorchLoader) else 0)
    if len(times) < TIMED + ahead:
        print("notice     few steps were made, since they take long: the times are less certain")
    if skipped:
        print(f"warning    {skipped} of {step + 1} steps had a gradient that is not finite")
    return found


def _say(found: dict[str, Any], device: torch.device, workers: int) -> None:
    there, taken = memory.capacity(device), found["peak_memory"]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the host"
    parts = ["unknown here" if taken is None else f"{memory.size(taken)} at most per process"]
    if there is not None:
        parts.append(f"of {memory.size(there)} of {where}")
    if workers and device.type != "cuda":
        parts.append(f"besides {workers} loader processes")
    print(f"memory     {', '.join(parts)}; evaluations are not counted")
    print(
        f"step       {found['step_seconds']:.3f} s, the first one {found['first_step_seconds']:.3f} s; "
        f"{found['images_per_second']:,.1f} images per second"
    )
    print(
        f"epoch      {found['steps_per_epoch']:,} steps, {found['images_per_epoch']:,} images, "
        f"{spelled(found['epoch_seconds'])}"
    )
    print(f"run        {found['steps']:,} steps, {spelled(found['run_seconds'])}, and evaluations and checkpoints")
    print("dry run    nothing was written, and broken files were not looked for")
