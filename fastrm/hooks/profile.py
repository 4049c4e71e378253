"""Profiles steps: a Chrome trace, and the time of each part."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastrm.hooks.base import Hook
from fastrm.own import MARK
from fastrm.version import __version__

if TYPE_CHECKING:
    from fastrm.run.run import Run

TRACE = "trace.json"
PARTS = ("data", "student", "teacher", "loss", "backward", "optimizer and teacher update", "queue")
"""Names of the ranges that loader, method and step mark with ``record_function``."""
WARM_UP = 2  # steps before the profiled ones, which allocate memory and may compile


class Profile(Hook):
    """Profiles some steps after the first two; writes a Chrome trace to the run folder and prints a table.

    Args:
        steps: number of steps to profile.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._opened = ExitStack()
        self._profiler: Any = None

    def on_start(self, run: Run) -> None:
        """Start the profiler, unless the run makes too few steps."""
        if run.rank:
            return
        ahead = run.total_steps - run.step
        if ahead < WARM_UP + self._steps:
            run.say(
                f"profile    is skipped: {self._steps} steps after the first {WARM_UP} are more than the {ahead} "
                "remaining"
            )
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=0, warmup=WARM_UP, active=self._steps, repeat=1)
        ready = partial(self._finish, run)
        profiler = profile(activities=activities, schedule=plan, on_trace_ready=ready, acc_events=True)
        self._profiler = self._opened.enter_context(profiler)

    def on_step(self, *_: object) -> None:
        """Advance the profiler to the next step."""
        if self._profiler is not None:
            self._profiler.step()

    def _finish(self, run: Run, profiler: profile) -> None:
        profiler.add_metadata(MARK, __version__)
        profiler.export_chrome_trace(str(run.out / TRACE))
        run.say(f"profile    {self._steps} steps, in {run.out / TRACE}\n{table(profiler, self._steps)}")

    def close(self) -> None:
        """Stop the profiler."""
        self._opened.close()


def table(profiler: profile, steps: int) -> str:
    """Milliseconds per step and share of each part, on the GPU if there is one, otherwise on the host."""
    events = {event.key: event for event in profiler.key_averages()}
    on_device = torch.cuda.is_available()

    def milliseconds(name: str) -> float:
        event = events.get(name)
        return 0.0 if event is None else (event.device_time_total if on_device else event.cpu_time_total) / 1e3 / steps

    times = {name: milliseconds(name) for name in PARTS}
    whole = sum(e.cpu_time_total for key, e in events.items() if key.startswith("ProfilerStep")) / 1e3 / steps
    times["the rest"] = max(0.0, whole - sum(times.values()))
    rows = [f"{'part':<30}{'ms per step':>12}{'share':>9}"]
    rows += [f"{name:<30}{time:>12.2f}{time / whole:>9.1%}" for name, time in times.items()]
    return "\n".join([*rows, f"{'step':<30}{whole:>12.2f}"])
