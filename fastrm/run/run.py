"""The object through which hooks access a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastrm.hooks.base import Hooks
from fastrm.machine.signals import Asked, Signals
from fastrm.models import Backbone
from fastrm.optim import Schedule
from fastrm.run.saver import Saver
from fastrm.settings.config import Config

RECORDED = (
    "step", "epoch", "loss", "contrastive", "residual", "gap", "lr", "teacher_momentum", "skipped_steps",
    "images_per_second",
)  # fmt: skip
"""What the run itself records of each logged step."""
_PAST = frozenset({"images_per_second", "verify_loss", "verify_gradient"})
"""Values of a record that describe the steps before it, not the state after them."""


class Run:
    """A run, as its hooks see it.

    Attributes:
        student, teacher: the backbones that are trained: images [B, C, H, W] to features [B, D].
        config: resolved settings of the run.
        out: the run folder.
        schedule: schedules of the run; ``total_steps`` and ``steps_per_epoch`` come from it.
        rank: rank of this process; rank 0 writes.
        say: function that prints a line.
        step: number of optimizer steps so far.
        scored: whether the step at which the run started has been evaluated.
        logging: whether this step is logged.
        stopping: whether :meth:`stop` was called.
        clock: measures the steps per second of training, without evaluations and checkpoints.
        latest: the values recorded last, by name.
    """

    def __init__(
        self,
        *,
        student: Backbone,
        teacher: Backbone,
        config: Config,
        out: Path,
        schedule: Schedule,
        rank: int,
        hooks: Hooks,
        say: Callable[[str], None],
        saver: Saver,
        signals: Signals,
        step: int,
        scored: bool,
    ) -> None:
        self.student, self.teacher, self.config, self.out, self.rank = student, teacher, config, out, rank
        self.schedule, self.say, self.clock = schedule, say, Clock()
        self.step, self.scored, self.logging, self.stopping = step, scored, False, False
        self.latest: dict[str, Any] = {}
        self._hooks, self._saver, self._saved, self._signals = hooks, saver, step, signals
        self._asked: tuple[int, Asked] | None = None
        self._values: dict[str, Any] = {}
        self._training: set[str] = set()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.schedule.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Number of epochs so far, with a fraction."""
        return self.schedule.epoch(self.step)

    def advance(self) -> None:
        """Advance to the next step."""
        self.step += 1
        self.clock.steps += 1
        self.logging = self.step == 1 or self.step % self.config.run.log_every == 0 or self.step == self.total_steps

    def log(self, values: Mapping[str, float | Tensor | np.generic]) -> None:
        """Record numbers of this step by name, in any process; the first process writes them.

        All values of a step become one record. Tensors of one value are read at the end of the step; the host waits
        for them.

        Raises:
            TypeError: a value is not a real number, or a name is not text.
            ValueError: a name is one of those that the run itself records, such as ``step`` and ``loss``.
        """
        for name, value in values.items():
            if not isinstance(name, str):
                raise TypeError(f"run.log: the name {name!r:.80} is a {type(name).__name__}; it must be text")
            if name in RECORDED:
                raise ValueError(f"run.log: the name {name} is taken: the run itself records {', '.join(RECORDED)}")
            if isinstance(value, Tensor):
                fits = value.numel() == 1 and not value.is_complex()
            else:
                fits = isinstance(value, (int, float, np.integer, np.floating, np.bool_))
            if not fits:
                raise TypeError(f"run.log: {name} is a {type(value).__name__}; it must be a real number")
        self.record(values)

    def record(self, values: Mapping[str, Any]) -> None:
        """Record values that :meth:`log` would accept, and the run's own (``RECORDED``)."""
        self._values.update(values)

    def flush(self) -> None:
        """Pass the values of this step on to the loggers."""
        if self._values:
            values = {n: v.item() if isinstance(v, Tensor | np.generic) else v for n, v in self._values.items()}
            self._values = {}
            self.remember(values)
            self._hooks.tell("on_log", self, self.step, values)

    def evaluated(self, scores: Mapping[str, float]) -> None:
        """Record the scores of an evaluation."""
        self.remember(scores)
        self._hooks.tell("on_evaluate", self, self.step, scores)

    def remember(self, values: Mapping[str, float]) -> None:
        """Restore the recorded values of this step, except those that describe the steps before it."""
        self.latest |= {"step": self.step, "epoch": self.epoch}
        self.latest |= {name: value for name, value in values.items() if name not in _PAST}

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint of this step, unless there is one. Call this in all processes.

        Args:
            wait: wait until the checkpoint is on the disk.
        """
        if self._saved != self.step:
            self.flush()
            self._saved = self.step
            path = self._saver.save(self.step)
            self._hooks.tell("on_checkpoint", self, path)
        if wait:
            self._saver.wait()

    def save_soon(self) -> None:
        """Ask all processes to save at the same step. A call in one process is enough."""
        self._signals.save_soon()

    def asked(self) -> Asked:
        """The requests of signals and hooks in any process after this step. Call this in all processes.

        With several processes a request takes effect one step later, except at the last step.
        """
        if self._asked is None or self._asked[0] != self.step:
            failed, last = self._hooks.fault is not None, self.step >= self.total_steps
            found = self._signals.asked(stop=self.stopping, failed=failed, wait=last)
            self._asked = self.step, found
        return self._asked[1]

    def note_modes(self) -> None:
        """Remember which networks are in training mode; some methods keep the teacher out of it."""
        self._training = {name for name in ("student", "teacher") if getattr(self, name).training}

    def remind(self) -> None:
        """Say once if a hook left a network in evaluation mode, where BatchNorm and dropout do not train as before."""
        for name in sorted(self._training):
            if getattr(self, name).training:
                continue
            self._training.remove(name)
            self.say(
                f"a hook left run.{name} in evaluation mode, in which it continues to train; a hook that evaluates "
                f"calls run.{name}.train() afterwards"
            )

    def stop(self) -> None:
        """End the run after this step, with a checkpoint and results; with several processes, after the next step.

        A call in one process is enough. The same command continues with the remaining steps.
        """
        self.stopping = True


class Clock:
    """Measures the steps per second of training."""

    def __init__(self) -> None:
        self._start, self.steps = time.perf_counter(), 0

    def lap(self) -> float:
        """Steps per second since the last lap."""
        now = time.perf_counter()
        rate = self.steps / (now - self._start)
        self._start, self.steps = now, 0
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of evaluations and checkpoints."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin
