"""The progress of a run on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fastrm.hooks.base import Hook
from fastrm.terminal.progress import Display, Task

if TYPE_CHECKING:
    from fastrm.run.run import Run
    from fastrm.run.step import Output


class Progress(Hook):
    """Shows a bar with the remaining time on a terminal, otherwise a line per logged step; and a line per
    evaluation."""

    def __init__(self, display: Display) -> None:
        self._display, self._shown = display, ExitStack()
        self._task: Task | None = None

    def on_start(self, run: Run) -> None:
        """Start the bar at the first step of this run."""
        task = self._display.task("training", run.total_steps, start=run.step, lines=False)
        self._task = self._shown.enter_context(task)

    def on_step(self, run: Run, step: int, outputs: Sequence[Output]) -> None:
        """Advance the bar."""
        if self._task is not None:
            self._task.reach(step)

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Print a line with the values of a step, which stays above the bar."""
        self.on_evaluate(run, step, values)

    def on_evaluate(self, run: Run, step: int, scores: Mapping[str, float]) -> None:
        """Print the scores of an evaluation."""
        shown = "  ".join(f"{name} {_short(value)}" for name, value in scores.items())
        run.say(f"step {step:>6}  epoch {run.epoch:6.2f}  {shown}")

    def close(self) -> None:
        """Remove the bar."""
        self._shown.close()


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
