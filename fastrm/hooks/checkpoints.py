"""Saves checkpoints, and keeps the best one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fastrm.hooks.base import Hook

if TYPE_CHECKING:
    from fastrm.run.run import Run


class Checkpoints(Hook):
    """Saves checkpoints at regular steps or after each epoch, after the last step, and after some minutes without one.

    Args:
        every: steps between two checkpoints; None means one epoch.
        minutes: minutes since the last checkpoint, by the clock of the first process, after which all save; 0 turns
            this off.
        keep_best: function that gets the score of the last saved step, with its value; None keeps no best checkpoint.
    """

    def __init__(
        self, every: int | None, *, minutes: float = 0.0, keep_best: Callable[[int, str, float], None] | None = None
    ) -> None:
        self._every, self._seconds, self._keep_best = every, 60 * minutes, keep_best
        self._last = time.monotonic()

    def on_start(self, run: Run) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_checkpoint(self, *_: object) -> None:
        """Restart the clock."""
        self._last = time.monotonic()

    def on_step(self, run: Run, step: int, _: object = None) -> None:
        """Save a checkpoint if one is due."""
        due = step % self._every == 0 if self._every else run.schedule.ends_epoch(step)
        if due or step == run.total_steps:
            run.save()
        elif run.rank == 0 and self._seconds and time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()  # several processes save a step later
            run.save_soon()

    def on_evaluate(self, run: Run, step: int, scores: Mapping[str, float]) -> None:
        """Keep the checkpoint of this step if none has a better score."""
        name = "linear_student" if "linear_student" in scores else "knn_student"
        if self._keep_best is not None and run.rank == 0 and name in scores:
            self._keep_best(step, name, scores[name])
