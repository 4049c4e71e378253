"""Opens the images of a run, according to its settings or an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastrm.data import Source, open_source
from fastrm.data.formats import PixelFormat
from fastrm.data.scan import scan
from fastrm.data.sent import Opened
from fastrm.data.settling import PixelOptions, formatted, settled
from fastrm.files import as_utf8
from fastrm.machine.distributed import on_this_machine
from fastrm.models.published import trained_on
from fastrm.run import checkpoint
from fastrm.settings.config import Config


def opened(data: Any, config: Config, workers: int) -> Opened:
    """Open the readable images, and list the others with the reason.

    Args:
        data: a Python object, or None for the data in the settings.
        config: settings of the run.
        workers: loader processes per process; all of them read files here as threads, since other processes wait.
    """
    settings, broken = config.input, dict[str, str]()
    keep = not config.run.dry_run  # the list of files is cached, and a dry run writes nothing
    source = open_source(
        settings.data if data is None else data,
        settings.data_root,
        image_column=settings.image_column,
        label_column=settings.label_column,
        keep=keep,
    )
    threads = workers * on_this_machine()
    if settings.scan and keep:
        source, broken = scan(source, workers=threads)
    # A continued run keeps the format of its images, whatever the data folder has by now.
    before = _before(config, source)
    if before is not None and before.format is not None:
        source = formatted(source, before.format)
    else:
        options = PixelOptions.of(settings, _trained_on(config.model.init_from))
        source = settled(source, options, workers=threads)
    return Opened(source, broken, source.train.hashes(), before and before.batch)


def _trained_on(start: Path | None) -> PixelFormat | None:
    """The pixel format that the start weights were trained on; None if there are none, or they do not say it."""
    if start is None:
        return None
    run = checkpoint.glanced(start)
    return trained_on(start, flag="--init-from") if run is None else run.format


def folder_of(config: Config, source: Source) -> Path:
    """The run folder."""
    return config.run.out or Path("runs", f"{as_utf8(source.name)}-{config.method.method}-{config.model.arch}")


def _before(config: Config, source: Source) -> checkpoint.Glance | None:
    """Information from the checkpoint to continue from; if a run's own checkpoint is damaged, from an earlier one."""
    wish = config.run.resume
    if wish == "never":
        return None
    there = checkpoint.own(folder_of(config, source)) if wish == "auto" else [Path(wish)]
    return next((found for found in map(checkpoint.glanced, there) if found is not None), None)
