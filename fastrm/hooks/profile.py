"""Where a step goes: a Chrome trace, and the time of each part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastrm.own import MARK
from fastrm.version import __version__

TRACE = "trace.json"
PARTS = ("data", "student", "teacher", "loss", "backward", "optimizer and teacher update", "queue")
"""Names of the ranges that loader, method and step record with ``record_function``."""
WARM_UP = 2  # steps before the profiled ones: the first allocate, and compile where asked to


@contextmanager
def profiled(steps: int, out: Path, say: Callable[[str], None], *, ahead: int) -> Iterator[Callable[[], None]]:
    """Profile ``steps`` steps of a run after the first two; 0 profiles none.

    Args:
        steps: how many.
        out: folder that gets ``trace.json``, for chrome://tracing or Perfetto.
        say: gets the table.
        ahead: steps that the run still makes; where they are too few, that is said and none is profiled.

    Yields:
        What is to be called after each step.
    """
    if steps and ahead < WARM_UP + steps:
        say(f"profile    is left out: {steps} steps after the first {WARM_UP} are more than the {ahead} to come")
        steps = 0
    if steps == 0:
        yield lambda: None
        return

    def finish(profiler: profile) -> None:
        profiler.add_metadata(MARK, __version__)
        profiler.export_chrome_trace(str(out / TRACE))
        say(f"profile    {steps} steps, in {out / TRACE}\n{table(profiler, steps)}")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=0, warmup=WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish, acc_events=True) as profiler:
        yield profiler.step


def table(profiler: profile, steps: int) -> str:
    """Milliseconds a step and share of each part, on the GPU where there is one and else on the host."""
    events = {event.key: event for event in profiler.key_averages()}
    on_device = torch.cuda.is_available()

    def milliseconds(name: str) -> float:
        event = events.get(name)
        return 0.0 if event is None else (event.device_time_total if on_device else event.cpu_time_total) / 1e3 / steps

    times = {name: milliseconds(name) for name in PARTS}
    whole = sum(e.cpu_time_total for key, e in events.items() if key.startswith("ProfilerStep")) / 1e3 / steps
    times["the rest"] = max(0.0, whole - sum(times.values()))
    rows = [f"{'part':<30}{'ms a step':>12}{'share':>9}"]
    rows += [f"{name:<30}{time:>12.2f}{time / whole:>9.1%}" for name, time in times.items()]
    return "\n".join([*rows, f"{'step':<30}{whole:>12.2f}"])
