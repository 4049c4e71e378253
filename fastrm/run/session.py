"""A run in its folder: start or resume, requests of signals and hooks, and results."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from fastrm.errors import Stopped, TrainingError, UsageError
from fastrm.exports import place
from fastrm.files import read_json
from fastrm.hooks import JsonLines
from fastrm.hooks.base import Hooks
from fastrm.hooks.metrics import recorded
from fastrm.machine.distributed import gather_objects
from fastrm.machine.lock import Lock
from fastrm.machine.signals import Deaths, Signals
from fastrm.optim.groups import LR_SCALE
from fastrm.run import checkpoint, folder, said
from fastrm.run.assemble import Parts, built_in
from fastrm.run.faults import again, faults
from fastrm.run.results import SUMMARY, Results, complete, intervals
from fastrm.run.resume import Start, origin, resume
from fastrm.run.run import Run
from fastrm.run.saver import Saver
from fastrm.settings.config_file import VIEWS


@dataclass(frozen=True)
class Session:
    """A run that is ready to train.

    Attributes:
        run, hooks: the object that hooks get, and the hooks.
        finished: whether the folder has the complete run; then nothing is written.
        lock, results: used by :meth:`agree` and :meth:`finish`.
        resumes: whether the same command continues the run.
    """

    run: Run
    hooks: Hooks
    finished: bool
    lock: Lock
    results: Results
    resumes: bool

    def agree(self) -> bool:
        """Do in all processes what signals and hooks of any process requested; return whether the run ends.

        Raises:
            Stopped: a signal ended the run after saving.
            TrainingError: a hook failed in another process.
        """
        self.lock.check()
        asked = self.run.asked()
        ends = self.run.step >= self.run.total_steps or asked.stop or asked.failed or asked.end != 0
        if asked.save or ends:
            self.run.save(wait=ends)  # the steps are safe from here on
        if asked.failed and self.hooks.fault is None:
            raise TrainingError(f"a hook failed in another process, after step {self.run.step}, which is saved")
        if asked.end:
            words = f"stopped after step {self.run.step} and saved; {again(self.resumes)}"
            raise Stopped(words, 128 + asked.end)
        return ends

    def finish(self) -> dict[str, Any]:
        """Write the results in the first process; return the content of ``summary.json`` in all."""
        summary = {} if self.run.rank else self.results.write(self.run.student, self.run.latest)
        found: dict[str, Any] = gather_objects(summary)[0]
        return found


def begin(parts: Parts, theirs: Iterable[Any], opened: ExitStack) -> Session:
    """Lock the run folder, find out where the run continues, and report it.

    Raises:
        UsageError: another run holds the folder, or its run has other settings, images or processes.
    """
    config, out, world, wish = parts.config, parts.out, parts.machine.world, parts.config.run.resume
    deaths = opened.enter_context(Deaths())
    lock = opened.enter_context(folder.held(out))
    states: dict[str, Any] = {"method": parts.method, "optimizer": parts.step.optimizer, "scaler": parts.step.scaler}
    metrics = JsonLines()
    saver = Saver(out, states, keep=config.run.keep, keep_every=config.run.keep_every, before=metrics.sync)
    before, after = built_in(parts, metrics, saver.keep_best)
    hooks = Hooks(theirs, before=before, after=after)
    states["hooks"] = hooks
    begun = resume(config.flat(), out, parts.images, states, parts.augmentation)
    start, config = begun.step, config.replace(**begun.settings)
    schedule = replace(parts.schedule, optim=config.optim, shift=begun.images.shift)
    made = None if parts.augmentation is None else parts.augmentation.plain()
    saver.describe(start, config.flat(), images=begun.images, pixels=parts.format.plain(), augmentation=made)
    parts.method.pair.refresh()

    ended = start >= schedule.total
    known = recorded(origin(wish, out), start) if start else {}
    exported = all(place(out, kind).exists() for kind in config.run.export)
    finished = ended and complete(out, start) and exported
    moved = start > 0 and not checkpoint.own(out)
    # All processes have read the folder by now.
    if len(everyone := set(gather_objects((start, "knn_student" in known, finished, moved)))) > 1:
        steps = sorted(step for step, *_ in everyone)
        raise UsageError(
            f"--out {out}: the processes read different steps from it, {steps}; all must share its file system"
        )
    signals = Signals()
    run = Run(
        student=parts.method.student.backbone,
        teacher=parts.method.teacher.backbone,
        config=config,
        out=out,
        schedule=schedule,
        rank=world.rank,
        hooks=hooks,
        say=parts.say,
        saver=saver,
        signals=signals,
        step=start,
        scored="knn_student" in known,
    )
    if ended:
        run.remember({**known, **intervals(origin(wish, out), start)})
    session = Session(
        run=run,
        hooks=hooks,
        finished=finished,
        lock=lock,
        results=Results(out, config, parts.source, parts.format),
        resumes=wish != "never",
    )
    if finished:
        parts.say(f"{out} holds this run, complete after {start} steps")
        run.latest = read_json(out / SUMMARY)
        return session
    if world.rank == 0:
        folder.prepare(out, {**config.flat(), VIEWS: made}, fresh=start == 0 or moved)
    opened.enter_context(faults(out, world, deaths, resumes=session.resumes))
    opened.enter_context(parts.display)
    opened.enter_context(closing(hooks))
    opened.enter_context(closing(saver))
    opened.enter_context(signals)
    _say(parts, begun, run, ended)
    if moved and ended:
        saver.save(start)
    return session


def _say(parts: Parts, begun: Start, run: Run, ended: bool) -> None:
    """Report what was found, what will be used, and what may go wrong."""
    start = run.step
    lines = [("data", parts.source.about), *(("notice", note) for note in begun.notes)]
    if begun.settings:
        lines.append(("notice", said.lengthened(run.schedule, start, run.config.optim.warmup_epochs)))
    lines.append(("settings", said.described(run.config, parts.machine)))
    lines.append(("folder", f"{run.out}" + (f", continued after step {start}" if start else "")))
    made = parts.augmentation
    if made is not None and (run.config.input.augmentation is not None or len(made.views) > 2):
        lines.append(("views", said.views(made, run.config.input.image_size)))
    lines += [("loader", note) for note in parts.loader.notes]
    lines += [("network", note) for note in parts.method.notes]
    scales = (group.get(LR_SCALE, 1.0) for group in parts.step.optimizer.param_groups)
    if (rates := said.rates(run.config, parts.method, scales)) is not None:
        lines.append(("rate", rates))
    if not start:
        found = said.cautions(run.config, parts.method, run.schedule, len(parts.source.train))
        lines += [("notice", caution) for caution in found]
    if run.rank == 0 and (problem := folder.short_of_space(run.out, parts.method, run.config.run.keep)) is not None:
        lines.append(("warning", problem))
    if run.config.run.eval_every and parts.source.test is None:
        lines.append(("evaluation", "kNN is left out: the images have no labels"))
    if run.config.run.eval_every and (part := said.part(parts.source, parts.labelled)) is not None:
        lines.append(("evaluation", part))
    if ended:
        total = run.total_steps
        lines.append(("steps", f"{start} are complete, {total} were requested: only missing results are written"))
    for title, text in lines:
        parts.say(f"{title:<11}{text}")
