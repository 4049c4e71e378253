"""Estimates the memory and time of a run from a few real steps, of which nothing is kept."""

from __future__ import annotations

import math
import time
from itertools import count, islice
from typing import Any

import torch

from fastrm.data.torch_loader import AHEAD, TorchLoader
from fastrm.machine import memory
from fastrm.machine.distributed import gather_objects
from fastrm.run import folder
from fastrm.run.assemble import Parts
from fastrm.run.graph import EAGER, GraphedStep
from fastrm.run.said import described
from fastrm.terminal.progress import spelled

TIMED = 3
LONGEST = 20.0
"""Seconds after which no further step is made, once one was timed."""


def dry_run(parts: Parts) -> dict[str, Any]:
    """Make real steps, then print and return their memory and time; nothing is written.

    The first steps include one-time work. Loader processes work ahead, and batches that were ready when a step began
    would hide the time of loading, so only later steps are timed.

    Returns:
        In the first process, ``peak_memory`` (bytes, the maximum over the processes), ``step_seconds``,
        ``first_step_seconds``, ``epoch_seconds``, ``run_seconds``, ``steps_per_epoch``, ``images_per_epoch``,
        ``images_per_second``, ``steps``; in other processes, nothing.

    Raises:
        UsageError: the output folder cannot be used.
    """
    folder.claim(parts.out)
    parts.say(f"data       {parts.source.about}")
    parts.say(f"settings   {described(parts.config, parts.machine)}")
    parts.method.pair.refresh()
    schedule, step_once, loader = parts.schedule, parts.step, parts.loader
    batches = parts.batches(schedule, 0)
    workers = parts.workers
    ahead = math.ceil(AHEAD * workers / schedule.accumulate) if isinstance(loader, TorchLoader) else 0
    once = EAGER + 1 if isinstance(step_once, GraphedStep) else 1
    first, times, began = 0.0, [], time.perf_counter()
    for step in count():
        begin = time.perf_counter()
        step_once(
            islice(batches, schedule.accumulate),
            schedule.at(step),
            measure=False,
        )
        skipped = step_once.check(step + 1)  # waits for the device
        if step == 0:
            first = time.perf_counter() - begin
        if step >= once:
            times.append(time.perf_counter() - begin)
        done = len(times) >= TIMED + ahead or (bool(times) and time.perf_counter() - began > LONGEST)
        if any(gather_objects(done)):
            break
    steady = times[ahead:] or times
    everyone = gather_objects((memory.peak(step_once.device), sum(steady) / len(steady), first))
    if parts.machine.world.rank:
        return {}
    peaks, means, firsts = zip(*everyone, strict=True)
    seconds = max(means)
    found = {
        "peak_memory": max((p for p in peaks if p is not None), default=None),
        "first_step_seconds": max(firsts),
        "step_seconds": seconds,
        "epoch_seconds": seconds * schedule.steps_per_epoch,
        "run_seconds": seconds * schedule.total,
        "images_per_second": schedule.batch_size / seconds,
        "images_per_epoch": schedule.steps_per_epoch * schedule.batch_size,
        "steps_per_epoch": schedule.steps_per_epoch,
        "steps": schedule.total,
    }
    _say(found, step_once.device, workers if isinstance(loader, TorchLoader) else 0)
    if len(times) < TIMED + ahead:
        print("notice     only a few steps were made, since they take long: the times are less accurate")
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
