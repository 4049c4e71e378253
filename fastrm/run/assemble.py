"""Builds the parts of a run from its settings; every setting is passed to the part that needs it.

Errors are found here, before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from fastrm import hooks as listeners
from fastrm.data import Augmentation, Loader, Source, augmentation_of, located, make_loader
from fastrm.data.formats import PixelFormat
from fastrm.data.inventory import Inventory, inventory
from fastrm.data.loader import Batch
from fastrm.data.scan import unreadable
from fastrm.data.sent import opened_once
from fastrm.errors import UsageError
from fastrm.machine.joined import Machine, joined, own_cores
from fastrm.machine.meeting import everyone
from fastrm.machine.memory import enough
from fastrm.methods import Method, build_method, find
from fastrm.models import Backbone, untrained
from fastrm.models.vit import patch_size
from fastrm.optim import Schedule, build_optimizer
from fastrm.probes import OnlineLinear
from fastrm.probes.features import Setting
from fastrm.run import images, said
from fastrm.run.faults import LOWER
from fastrm.run.graph import GraphedStep
from fastrm.run.objects import Objects
from fastrm.run.step import AUTOCAST, Step
from fastrm.settings.config import Config, RunConfig, resolved
from fastrm.terminal.progress import Display, console
from fastrm.terminal.shell import screen


@dataclass(frozen=True)
class Parts:
    """The parts of a run, before it has a folder."""

    config: Config
    """Resolved settings, in which nothing depends on the machine or the data any more."""
    machine: Machine
    source: Source
    labelled: dict[str, int]
    """Number of images that an evaluation could use, in the form of :attr:`fastrm.data.Source.scored`."""
    broken: dict[str, str]
    """Images that are left out, by name, with the reason."""
    images: Inventory
    augmentation: Augmentation | None
    """The augmentation; None if a callable makes the views."""
    loader: Loader
    schedule: Schedule
    method: Method[Any]
    untrained: Callable[[], Backbone]
    """Builds the backbone as it was before the run, with random weights unless it is a module of the user."""
    step: Step
    online: OnlineLinear | None
    display: Display
    out: Path
    workers: int

    @property
    def format(self) -> PixelFormat:
        """The conversion from images to the input of the network.

        It has no limits if a callable of the user makes views with other channels than the images.
        """
        format, count = self.source.train.format, self.loader.channels
        if count == format.channels:
            return format
        return PixelFormat(channels=count, limits={}, mean=(0.0,) * count, std=(1.0,) * count)

    @property
    def say(self) -> Callable[[str], None]:
        """Prints a line."""
        return partial(self.display.console.print, markup=False)

    def batches(self, schedule: Schedule, step: int) -> Iterator[Batch]:
        """Yield micro-batches without end, starting at an optimizer step.

        Micro-batches at the end of an epoch that do not fill a step are left out.
        """
        while True:
            epoch, done = schedule.place(step)
            self.loader.seek(epoch * len(self.loader) + done * schedule.accumulate)
            epoch_left = iter(self.loader)
            for _ in range((schedule.steps_per_epoch - done) * schedule.accumulate):
                with record_function("data"):
                    batch = next(epoch_left)
                yield batch
            step += schedule.steps_per_epoch - done


def assemble(config: Config, objects: Objects, opened: ExitStack) -> Parts:
    """Build the parts of a run. It joins the processes, and enters what must be closed at the end into ``opened``.

    Raises:
        UsageError: a setting, the data or the machine does not support the run.
    """
    machine = opened.enter_context(joined(config.device, optimizer=config.optim.optimizer))
    device, world, precision = machine.device, machine.world, machine.precision
    config = config.replace(compile="on" if machine.compiled else "off")
    if config.input.batch_size is not None:  # report errors before the images are read
        config = resolved(config, world.size)
    opened.enter_context(enough(device, lambda: said.asked(config, world), LOWER))

    kind = find(objects.method or config.method.method)
    given = config.input
    recipe = objects.augmentation or augmentation_of(
        kind,
        crop_min=given.crop_min,
        given=given.augmentation,
        image_size=given.image_size,
        multiple=patch_size(objects.arch or config.model.arch) or 2,
    )
    if isinstance(recipe, Augmentation):
        kind.check_views(len(recipe.views))
    workers = min(own_cores(), 8) if config.input.workers is None else config.input.workers
    whole, broken, hashes, before = opened_once(lambda: images.opened(objects.data, config, workers))
    source = whole.limited(config.run.eval_images)
    if config.input.batch_size is None:
        config = resolved(config.replace(batch_size=everyone(before)[0]), world.size)
    batch, accumulate = config.input.batch_size, config.optim.accumulate
    assert batch is not None
    # A run may be evaluated from another folder than it was started in.
    root = config.input.data_root
    place = config.input.data if objects.data is not None else located(config.input.data)
    start = config.model.init_from
    if start is not None and start.exists():  # timm: and hf: are not files
        start = start.absolute()
    config = config.replace(data=place, data_root=root and root.absolute(), init_from=start)
    loader = make_loader(
        source,
        method=recipe,
        image_size=config.input.image_size,
        batch_size=batch // (world.size * accumulate),
        device=device,
        workers=workers,
        seed=config.run.seed,
        dtype=AUTOCAST.get(precision, torch.float32),
        loader=config.input.loader,
        rank=world.rank,
        world_size=world.size,
        epochs=min(config.optim.epochs, (config.optim.max_steps or math.inf) * batch / len(source.train)),
    )
    kind.check_views(len(loader.sizes))
    steps_per_epoch = len(loader) // accumulate
    if steps_per_epoch == 0:
        raise UsageError(f"--batch-size {batch} is more than the {len(source.train)} images")

    torch.manual_seed(config.run.seed)
    method = build_method(
        config,
        device=device,
        precision=precision,
        backend=machine.backend,
        channels=loader.channels,
        arch=objects.arch,
        kind=kind,
        sizes=loader.sizes,
    )
    method.check_sizes(loader.sizes)
    _check_channels(config, method.student.backbone, loader, source)
    if precision in AUTOCAST:
        method.pair.keep_low_precision(AUTOCAST[precision])
    optimizer = build_optimizer(method, config.optim, backend=machine.backend)
    if machine.compiled:
        for part in (method.student, method.teacher, method.predictor):
            # In place: the parameters keep their names. Views of several sizes get code each, not one for any size.
            part.compile(dynamic=False if len(set(loader.sizes)) > 1 else None)
    step = (GraphedStep if config.device.cuda_graph else Step)(
        method,
        optimizer,
        precision=precision,
        accumulate=accumulate,
        clip_norm=config.optim.clip_norm,
        clip_each=config.optim.clip_each,
        layout=torch.channels_last if config.device.channels_last else torch.contiguous_format,
    )
    return Parts(
        config=config,
        machine=machine,
        source=source,
        labelled=whole.scored,
        broken=broken,
        images=inventory(source.train, left_out=len(broken), steps_per_epoch=steps_per_epoch, hashes=hashes),
        augmentation=recipe if isinstance(recipe, Augmentation) else None,
        loader=loader,
        schedule=Schedule(config.optim, config.method, batch, steps_per_epoch),
        method=method,
        untrained=partial(
            untrained,
            objects.arch or config.model.arch,
            image_size=config.input.image_size,
            stem=config.model.stem,
            channels=loader.channels,
        ),
        step=step,
        online=_online(config.run, source, method, batch, device),
        display=Display(console(file=screen(), highlight=False, soft_wrap=True, quiet=world.rank > 0)),
        out=images.folder_of(config, source),
        workers=workers,
    )


def _check_channels(config: Config, backbone: Backbone, loader: Loader, source: Source) -> None:
    """Raise a UsageError unless the network takes images with these channels."""
    given = {"the views": loader.channels}
    if config.run.eval_every and source.test is not None:
        given["the images of an evaluation (--eval-every 0 makes none)"] = source.test.format.channels
    for what, channels in given.items():
        if channels != backbone.channels:
            raise UsageError(
                f"--arch {config.model.arch} takes images of {backbone.channels} channels, and {what} have {channels}"
            )


def _online(
    settings: RunConfig, source: Source, method: Method[Any], batch: int, device: torch.device
) -> OnlineLinear | None:
    """The online linear classifier, if requested."""
    if not settings.online_linear:
        return None
    if source.train.labels is None:
        raise UsageError(f"--online-linear needs labels, and the images of {source.name} have none")
    return OnlineLinear(method.student.backbone.dim, source.train.labels, batch_size=batch, device=device)


def built_in(
    parts: Parts, metrics: listeners.JsonLines, keep_best: Callable[[int, str, float], None]
) -> tuple[list[Any], list[Any]]:
    """The built-in hooks according to the settings, those before and those after the hooks of the user."""
    settings, source = parts.config.run, parts.source
    before: list[Any] = [
        listeners.LeftOut(parts.broken, lambda: parts.loader.broken | unreadable(source)),
        listeners.CollapseWatch(),
    ]
    if parts.online is not None:
        before.append(listeners.Online(parts.online))
    if settings.profile:
        before.append(listeners.Profile(settings.profile))
    if settings.verify_every:
        before.append(listeners.Verification(settings.verify_every, parts.step.verify))
    after: list[Any] = [listeners.Progress(parts.display), metrics]
    after += [listeners.LOGGERS[name]() for name in settings.log_to]
    after.append(
        listeners.Checkpoints(
            settings.checkpoint_every,
            minutes=settings.checkpoint_minutes,
            keep_best=keep_best if settings.keep_best else None,
        )
    )
    if settings.eval_every and source.test is not None:
        given = parts.config.input
        setting = Setting(given.image_size, parts.machine.device, parts.workers, given.loader)
        after.append(
            listeners.KNN(source, setting, every=settings.eval_every, online=parts.online, untrained=parts.untrained)
        )
    if settings.export:
        after.append(
            listeners.Exports(
                settings.export,
                parts.out,
                parts.untrained,
                settings=parts.config.flat(),
                pixels=parts.format,
                images=source.train,
            )
        )
    return before, after
