"""The training loop: read :meth:`Trainer.fit` from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrm.hooks.base import check
from fastrm.machine.distributed import mean
from fastrm.run import said
from fastrm.run.assemble import assemble
from fastrm.run.dry_run import dry_run
from fastrm.run.faults import released
from fastrm.run.objects import named
from fastrm.run.session import begin
from fastrm.run.step import Output
from fastrm.settings.config import build


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        student, teacher: the trained backbones, in evaluation mode: images [B, C, H, W] to features [B, D].
            :func:`fastrm.load` loads them from the folder.
        scores: content of ``summary.json``, in every process.
        folder: the run folder.
    """

    student: nn.Module
    teacher: nn.Module
    scores: dict[str, Any]
    folder: Path


class Trainer:
    """A run. Its arguments are those of :func:`fastrm.pretrain`; nothing is opened or written before :meth:`fit`.

    Raises:
        UsageError: an argument is unknown, of the wrong kind or out of range.
    """

    def __init__(
        self,
        data: Any,
        *,
        arch: str | nn.Module | None = None,
        method: Any = None,
        augmentation: Any = None,
        hooks: Iterable[Any] = (),
        out: str | Path | None = None,
        **settings: Any,
    ) -> None:
        names, self._objects = named(data, arch, method, augmentation)
        self._hooks = check(hooks)
        self.config = build(**names, out=out, **settings)

    @released
    def fit(self) -> Result:
        """Train to the last step, starting from the newest checkpoint in the folder, if there is one.

        Afterwards the state of the process is restored: random state, signal handlers, ``cudnn.benchmark``.

        Raises:
            UsageError: the data, the machine or the folder does not allow the run; nothing was written.
            TrainingError: the run cannot continue; what was saved before is kept.
        """
        with ExitStack() as opened:
            parts = assemble(self.config, self._objects, opened)
            student, teacher = parts.method.student.backbone, parts.method.teacher.backbone
            if self.config.run.dry_run:
                return Result(student.eval(), teacher.eval(), dry_run(parts), parts.out)
            session = begin(parts, self._hooks, opened)
            run, hooks, make_step = session.run, session.hooks, parts.step
            if session.finished:
                return Result(student.eval(), teacher.eval(), run.latest, run.out)

            parts.method.train()
            run.note_modes()
            batches = parts.batches(run.schedule, run.step)
            hooks.tell("on_start", run)
            ended = session.agree()
            while not ended:
                run.remind()
                rates = run.schedule.at(run.step)
                run.advance()
                micro_batches = islice(batches, run.schedule.accumulate)
                outputs = make_step(micro_batches, rates, measure=run.logging)
                if run.logging or parts.machine.device.type == "cpu":  # do not wait for a GPU in between
                    skipped = make_step.check(run.step)
                if run.logging:
                    run.record({**averaged(outputs), "lr": rates.lr, "teacher_momentum": rates.teacher_momentum})
                    speed = run.schedule.batch_size * run.clock.lap()
                    run.record({"skipped_steps": skipped, "images_per_second": speed})
                with run.clock.paused():
                    hooks.tell("on_step", run, run.step, outputs)
                    run.flush()
                    ended = session.agree()
            if hooks.fault is None:
                summary = session.finish()
                hooks.tell("on_end", run, summary)
        if hooks.fault is not None:
            raise hooks.fault
        for line in said.ended(summary, run.out, named=self._objects.data is None):
            run.say(line)
        return Result(student.eval(), teacher.eval(), summary, run.out)


def averaged(outputs: Sequence[Output]) -> dict[str, float]:
    """Mean over the micro-batches of a step and all processes, read in one transfer; the host waits for the device."""
    names = ("loss", "contrastive", "residual", "gap")
    stacked = torch.stack([torch.stack([getattr(output, name).float() for name in names]) for output in outputs])
    return dict(zip(names, mean(stacked.mean(dim=0)).tolist(), strict=True))
