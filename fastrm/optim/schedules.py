"""Schedules of the learning rate, weight decay, teacher momentum and temperature, and residual weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from fastrm.settings.config import MethodConfig, OptimConfig


class Rates(NamedTuple):
    """The scheduled values of one step."""

    lr: float
    residual_weight: float
    teacher_momentum: float
    """Momentum of the teacher update at the end of the step."""
    weight_decay: float | None = None
    """None if it is constant."""
    teacher_temperature: float = 1.0
    """Temperature of the teacher, in methods with prototypes."""
    holds: bool = False
    """Whether the prototypes are frozen."""


@dataclass(frozen=True)
class Schedule:
    """The schedules of a run, as functions of the optimizer step, which starts at 0.

    Args:
        optim, method: settings.
        batch_size: images per step, over all processes.
        steps_per_epoch: optimizer steps per epoch.
        shift: offset between the position in the epochs and the number of steps, in a run whose images changed.
    """

    optim: OptimConfig
    method: MethodConfig
    batch_size: int
    steps_per_epoch: int
    shift: int = 0

    @property
    def span(self) -> int:
        """Steps that the schedules span, as if all epochs had the current length."""
        return self.optim.epochs * self.steps_per_epoch

    @property
    def total(self) -> int:
        """Steps that the run trains."""
        limit, total = self.optim.max_steps, self.span - self.shift
        return total if limit is None else min(limit, total)

    @property
    def accumulate(self) -> int:
        """Micro-batches per step."""
        return self.optim.accumulate

    def place(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the number of the step in that epoch."""
        return divmod(step + self.shift, self.steps_per_epoch)

    def epoch(self, done: int) -> float:
        """Epochs completed after ``done`` steps."""
        return (done + self.shift) / self.steps_per_epoch

    def ends_epoch(self, done: int, every: int = 1) -> bool:
        """Whether an epoch, or one whose number is a multiple of ``every``, ends with the step before ``done``."""
        return (done + self.shift) % (every * self.steps_per_epoch) == 0

    def at(self, step: int) -> Rates:
        """The values of a step. The teacher momentum is that of the next step, whose update ends this one."""
        return Rates(
            self.lr(step),
            self.residual_weight(step),
            self.teacher_momentum(step + 1),
            self.weight_decay(step),
            self.teacher_temperature(step),
            self._warmed(step, self.method.freeze_prototypes_epochs) < 1,
        )

    def lr(self, step: int) -> float:
        """Linear warm-up, then a half cosine to ``--min-lr``; peak ``--lr`` × batch / 256 (arXiv 1706.02677)."""
        optim, last = self.optim, self.optim.min_lr * 256 / self.batch_size
        warmup, step = optim.warmup_epochs * self.steps_per_epoch, step + self.shift
        if step < warmup:
            rate = optim.warmup_start_lr + (optim.lr - optim.warmup_start_lr) * step / warmup
        else:
            rate = last + (optim.lr - last) * _half_cosine((step - warmup) / (self.span - warmup))
        return rate * self.batch_size / 256

    def teacher_momentum(self, step: int) -> float:
        """Momentum of the teacher update that precedes this step: 1 - (1 - start) × half cosine, to its end value.

        MoCo-v3 and BYOL update the teacher before they compute a step's keys; the update after step t is that of
        step t + 1.
        """
        return self._cosine(self.method.teacher_momentum, self.method.teacher_momentum_end, step)

    def weight_decay(self, step: int) -> float | None:
        """A half cosine from ``--weight-decay`` to ``--weight-decay-end``; None if the latter is not given."""
        end = self.optim.weight_decay_end
        return None if end is None else self._cosine(self.optim.weight_decay, end, step)

    def teacher_temperature(self, step: int) -> float:
        """Linear from ``--teacher-temperature-start`` to ``--teacher-temperature`` over its warm-up."""
        method = self.method
        start, share = method.teacher_temperature_start, self._warmed(step, method.teacher_temperature_warmup_epochs)
        return start + (method.teacher_temperature - start) * share

    def residual_weight(self, step: int) -> float:
        """Weight of the residual term, growing linearly over its warm-up."""
        return self.method.residual_weight * self._warmed(step, self.method.residual_warmup_epochs)

    def _warmed(self, step: int, epochs: float) -> float:
        """The completed fraction of a warm-up of ``epochs`` epochs; 1 if there is no warm-up."""
        warmup = epochs * self.steps_per_epoch
        return min(1.0, (step + self.shift) / warmup) if warmup else 1.0

    def _cosine(self, start: float, end: float, step: int) -> float:
        return end - (end - start) * _half_cosine((step + self.shift) / self.span)


def _half_cosine(share: float) -> float:
    """1 at share 0, 0 at share 1."""
    return (1 + math.cos(math.pi * min(share, 1.0))) / 2
