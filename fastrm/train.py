"""Pre-train a backbone.

    python -m fastrm.train --arch resnet50 --data /imagenet

Read :func:`train` from top to bottom: what can be wrong is found first, then the folder is written, then the loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from fastrm.data import Batch, Loader, located, make_loader, open_source
from fastrm.data.inventory import inventory
from fastrm.data.scan import SKIPPED, list_further, scan, unreadable, write_skipped
from fastrm.errors import Stopped, TrainingError, UsageError
from fastrm.files import as_utf8, read_json
from fastrm.hooks.evaluation import Evaluations, online_linear, watched
from fastrm.hooks.metrics import Recorder, recorded
from fastrm.hooks.profile import profiled
from fastrm.hooks.verification import warning as verification_warning
from fastrm.machine.device import (
    available_cores,
    check_cuda_graph,
    choose_compile,
    choose_device,
    choose_kernels,
    choose_precision,
)
from fastrm.machine.distributed import (
    World,
    first_alone,
    gather_objects,
    mean,
    own_device,
    processes,
    synchronise_norms,
)
from fastrm.machine.memory import enough, exhausted
from fastrm.machine.signals import Signals
from fastrm.methods import StepOutput, build_method
from fastrm.methods.unused import counted
from fastrm.models.weights import load_weights, read_weights
from fastrm.optim import Schedule, build_optimizer
from fastrm.run import checkpoint, folder
from fastrm.run.dry_run import dry_run
from fastrm.run.graph import GraphedStep
from fastrm.run.results import SUMMARY, Results, complete
from fastrm.run.step import AUTOCAST, Step
from fastrm.settings import command_line
from fastrm.settings.config import Config, resolved, validate
from fastrm.settings.flags import read_flags

LOWER = (
    "Lower --batch-size, or raise --accumulate, which takes fewer images at a time, or lower --image-size; on the host "
    "--workers too. What was saved before stays"
)


def train(config: Config) -> dict[str, Any]:
    """Train as configured and return what ``summary.json`` holds, or nothing in any but the first of several processes.

    Raises:
        UsageError: a setting, the data, the machine or the output folder does not allow the run; nothing was written.
        TrainingError: the run cannot go on; what was saved before stays.
    """
    validate(config)
    device = own_device(choose_device(config.device.device))
    with processes(device) as world, ExitStack() as stack:
        return _train(config, device, world, stack)


def _train(config: Config, device: torch.device, world: World, stack: ExitStack) -> dict[str, Any]:
    precision = choose_precision(config.device.precision, device)
    backend = choose_kernels(config.device.kernels, device)
    config = resolved(config, world.size).replace(
        compile="on" if choose_compile(config.device.compile, device) else "off",
    )
    if config.device.cuda_graph:
        check_cuda_graph(config, device, precision, world.size)
    batch, accumulate, workers = _sizes(config)
    stack.enter_context(enough(device, lambda: _asked(config, world), LOWER))
    broken: dict[Path, str] = {}
    with first_alone():  # it may download the images, and leaves the others what its scan found
        source = open_source(config.input.data, config.input.data_root)
        if config.input.scan and not config.run.dry_run:  # what the search finds is kept, and a dry run writes nothing
            source, broken = scan(source, workers=workers)
    # A run is evaluated from other folders than it was started in.
    root = config.input.data_root
    config = config.replace(data=located(config.input.data), data_root=root and root.absolute())
    loader = make_loader(
        source,
        method=config.method.method,
        image_size=config.input.image_size,
        batch_size=batch // (world.size * accumulate),
        device=device,
        workers=workers,
        seed=config.run.seed,
        dtype=AUTOCAST.get(precision, torch.float32),
        loader=config.input.loader,
        crop_min=config.input.crop_min,
        rank=world.rank,
        world_size=world.size,
    )
    schedule = Schedule(config, steps_per_epoch=len(loader) // accumulate)
    if schedule.steps_per_epoch == 0:
        raise UsageError(f"--batch-size {config.input.batch_size} is more than the {len(source.train)} images")
    images = inventory(source.train, left_out=len(broken), steps_per_epoch=schedule.steps_per_epoch)

    torch.manual_seed(config.run.seed)
    torch.backends.cudnn.benchmark = True
    method = build_method(config, device=device, backend=backend)
    if config.model.init_from is not None:
        weights, _ = read_weights(config.model.init_from)
        for network in (method.student, method.teacher):
            left_out = load_weights(network.backbone, weights, source=f"--init-from {config.model.init_from}")
        said = f"the backbone starts from {len(weights) - len(left_out)} tensors of {config.model.init_from}"
        method.notes.append(said + (f"; {counted(left_out)} of a classifier are left out" if left_out else ""))
    if not method.queues:
        synchronise_norms(method, device)
    if precision in AUTOCAST:
        method.keep_low_precision_teacher(AUTOCAST[precision])
    optimizer: Any = build_optimizer(method, config.optim, backend=backend)
    if config.device.compile == "on":
        for part in (method.student, method.teacher, method.predictor):
            part.compile()  # in place: the parameters keep their names
    step_once = (GraphedStep if config.device.cuda_graph else Step)(
        method,
        optimizer,
        precision=precision,
        accumulate=accumulate,
        clip_norm=config.optim.clip_norm,
        layout=torch.channels_last if config.device.channels_last else torch.contiguous_format,
    )
    parts: dict[str, Any] = {"method": method, "optimizer": optimizer, "scaler": step_once.scaler}
    online = online_linear(config, source, method, device)
    if online is not None:
        parts["online"] = online

    out = config.run.out or Path("runs", f"{as_utf8(source.name)}-{config.method.method}-{config.model.arch}")
    if config.run.dry_run:
        folder.claim(out)
        for title, text in (("data", source.about), ("settings", _described(config, device, precision, world))):
            if world.rank == 0:
                print(f"{title:11}{text}")
        method.refresh_low_precision_teacher()
        batches = _micro_batches(loader, 0, schedule, deque(maxlen=accumulate))
        return dry_run(config, step_once, loader, batches, schedule, workers)

    lock = stack.enter_context(folder.held(out))
    begun = checkpoint.resume(config, out, images, **parts)
    start, schedule = begun.step, replace(schedule, shift=begun.images.shift)
    method.refresh_low_precision_teacher()
    ended = start >= schedule.total
    known = recorded(checkpoint.origin(config, out), start) if start else {}
    scored, finished = "knn_student" in known, ended and complete(out, start)
    moved = start > 0 and not checkpoint.own(out)
    # All have looked at what is in the folder.
    if len(everyone := set(gather_objects((start, scored, finished, moved)))) > 1:
        steps = sorted(step for step, *_ in everyone)
        raise UsageError(f"--out {out}: the processes found it at steps {steps}; all must share its file system")
    if finished:
        if world.rank:
            return {}
        print(f"{out} holds this run, complete after {start} steps")
        return read_json(out / SUMMARY)
    if world.rank == 0:
        folder.prepare(config, out, fresh=start == 0 or moved)
    recorder = Recorder(out if world.rank == 0 else None, start=start, total=schedule.total)
    recorder.note(f"data       {source.about}")
    if begun.note:
        recorder.note(f"notice     {begun.note}")
    recorder.note(f"settings   {_described(config, device, precision, world)}")
    recorder.note(f"folder     {out}" + (f", continued after step {start}" if start else ""))
    for note in method.notes:
        recorder.note(f"network    {note}")
    if world.rank == 0 and (problem := folder.short_of_space(out, method, config.run.keep)) is not None:
        recorder.note(f"warning    {problem}")
    if broken and world.rank == 0:
        write_skipped(out, broken)
        recorder.note(f"left out   {len(broken)} broken files, listed in {out / SKIPPED}")
    if ended:
        recorder.note(f"steps      {start} are done of {schedule.total} asked for: only missing results are made")
    evaluations = Evaluations(config, method, source, online, recorder, schedule, device=device, workers=workers)
    results = Results(out, config, source)

    method.train()
    recent: deque[Batch] = deque(maxlen=accumulate)
    batches = _micro_batches(loader, start, schedule, recent)
    clock = _Clock()
    last: dict[str, Any] = {"step": start, "epoch": schedule.epoch(start), **known} if ended else {}
    scores: dict[str, float] = {}
    profile = config.run.profile if world.rank == 0 else 0
    checkpoints = checkpoint.Checkpoints(out, config, start, **parts, images=begun.images)
    with (
        _faults(out, world),
        closing(recorder),
        closing(checkpoints),
        Signals() as signals,
        profiled(profile, out, recorder.note, ahead=schedule.total - start) as stepped,
    ):
        if moved and ended:
            checkpoints.save(start)
            checkpoints.wait()
        if start and evaluations.due(start) and not scored:  # the run before was cut off there
            scores = evaluations.run(start)
        for step in range(start, schedule.total):
            done = step + 1
            epoch = schedule.epoch(done)
            end = done == schedule.total
            logged = done == 1 or done % config.run.log_every == 0 or end
            lr, momentum = schedule.lr(step), schedule.teacher_momentum(done)
            outputs = step_once(
                islice(batches, accumulate),
                lr=lr,
                residual_weight=schedule.residual_weight(step),
                teacher_momentum=momentum,
                measure=logged,
            )
            if online is not None:
                for output, given in zip(outputs, recent, strict=True):
                    online.step(output.features, given.indices, step / schedule.total)
            with clock.paused():
                stepped()
            if config.run.verify_every and done % config.run.verify_every == 0:
                with clock.paused():
                    found = step_once.verify(recent[-1].views)
                    recorder.record({"step": done, "epoch": epoch, **found})
                    if (problem := verification_warning(found)) is not None:
                        recorder.note(f"warning    {problem}")
            recorder.advance(done)
            clock.steps += 1
            if world.rank == 0:
                list_further(out, broken, loader.broken | unreadable(source))
            if logged or device.type == "cpu":  # a GPU is not waited for in between
                skipped = step_once.check(done)
            if logged:
                last |= {"step": done, "epoch": epoch, **_averaged(outputs)}  # the host waits for the device here
                last |= {"lr": lr, "teacher_momentum": momentum, "skipped_steps": skipped}
                last |= watched(outputs[0].features, recorder)
                if online is not None:
                    last["online_accuracy"] = online.accuracy()
                recorder.record({**last, "images_per_second": batch * clock.lap()})
            with clock.paused():
                scoring = evaluations.due(done)
                save, ending = signals.asked()
                lock.check()
                every = config.run.checkpoint_every
                due = end or (done % every == 0 if every else schedule.ends_epoch(done))
                if due or save or scoring:
                    recorder.sync()
                    checkpoints.save(done)
                if end or ending or scoring:  # whatever happens from here on, the steps are safe
                    checkpoints.wait()
                if ending:
                    raise Stopped(f"stopped after step {done} and saved; the same command goes on", 128 + ending)
                if scoring:
                    scores = evaluations.run(done)
        if world.rank == 0:
            list_further(out, broken, unreadable(source))
            results.write(method, {**last, **scores})
    return read_json(out / SUMMARY) if world.rank == 0 else {}


@contextmanager
def _faults(out: Path, world: World) -> Iterator[None]:
    """Say in one line what the machine did to the run."""
    kept = "what was saved before stays, and the same command goes on from there"
    loader_ended = (
        f"a loader process ended unexpectedly, perhaps for want of memory; {kept}, with fewer --workers if need be"
    )
    try:
        yield
    except (ConnectionError, EOFError):  # of the pipe from a loader process: it can break before torch sees the death
        raise TrainingError(loader_ended) from None
    except OSError as error:
        if exhausted(error):
            raise
        raise TrainingError(f"{error.filename or out}: {error.strerror or error}; {kept}") from None
    except RuntimeError as error:
        if exhausted(error):
            raise
        if world.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise TrainingError(f"another process ended, or cannot be reached any more; {kept}") from None
        if "DataLoader worker (pid" in str(error):  # torch's signal handler raises it wherever the run happens to be
            raise TrainingError(loader_ended) from None
        raise


def _sizes(config: Config) -> tuple[int, int, int]:
    """(batch size, micro-batches a step, loader processes) of resolved settings."""
    assert config.input.batch_size is not None
    workers = min(available_cores(), 8) if config.input.workers is None else config.input.workers
    return config.input.batch_size, config.optim.accumulate, workers


def _micro_batches(loader: Loader, step: int, schedule: Schedule, recent: deque[Batch]) -> Iterator[tuple[Tensor, ...]]:
    """Views without end, from an optimizer step on, whose batches are also appended to ``recent``.

    Micro-batches at the end of an epoch that do not fill a step are left out.
    """
    accumulate = schedule.config.optim.accumulate
    while True:
        epoch, done = schedule.place(step)
        loader.seek(epoch * len(loader) + done * accumulate)
        batches = islice(loader, (schedule.steps_per_epoch - done) * accumulate)
        while True:
            with record_function("data"):
                batch = next(batches, None)
            if batch is None:
                break
            recent.append(batch)
            yield batch.views
        step += schedule.steps_per_epoch - done


def _averaged(outputs: Sequence[StepOutput]) -> dict[str, float]:
    """Mean over a step's micro-batches and all processes, read in one transfer."""
    names = ("loss", "contrastive", "residual", "gap")
    stacked = torch.stack([torch.stack([getattr(output, name).float() for name in names]) for output in outputs])
    return dict(zip(names, mean(stacked.mean(dim=0)).tolist(), strict=True))


class _Clock:
    """Steps a second of training alone."""

    def __init__(self) -> None:
        self._start, self.steps = time.perf_counter(), 0

    def lap(self) -> float:
        """Steps a second since the last lap."""
        now = time.perf_counter()
        rate = self.steps / (now - self._start)
        self._start, self.steps = now, 0
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of evaluations and checkpoints out."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin


def _asked(config: Config, world: World) -> str:
    """What a run asks of the memory."""
    batch, accumulate, _ = _sizes(config)
    images = batch // (world.size * accumulate)
    return (
        f"{config.method.method} with {config.model.arch} on {images} images of {config.input.image_size} pixels at a "
        f"time per process (--batch-size {batch}, --accumulate {accumulate}"
        + (f", {world.size} processes)" if world.size > 1 else ")")
    )


def _described(config: Config, device: torch.device, precision: str, world: World) -> str:
    """What ``auto`` chose, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    settings = config.method
    residual = f"residual weight {settings.residual_weight:g} at the {settings.residual_at}"
    extras = {
        "compiled": config.device.compile == "on",
        "one CUDA graph": config.device.cuda_graph,
        f"{world.size} processes": world.size > 1,
    }
    parts = [
        f"{settings.method}, {residual}; {config.model.arch}; batch {config.input.batch_size}; {name}; {precision}",
        *(extra for extra, chosen in extras.items() if chosen),
    ]
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    train(read_flags(argv))


if __name__ == "__main__":
    command_line.run(main)
