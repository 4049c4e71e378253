"""The images of a run, as its settings or an earlier run want them."""

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
from fastrm.run import checkpoint
from fastrm.settings.config import Config


def opened(data: Any, config: Config, workers: int) -> Opened:
    """The images, without those that cannot be read, and what is wrong with these.

    Args:
        data: an object of a script's, or None for what the settings say.
        config: settings of the run.
        workers: loader processes of each process; as many threads of all read files here, since the others wait.
    """
    settings, broken = config.input, dict[str, str]()
    keep = not config.run.dry_run  # what is found in a folder and its files is kept, and a dry run writes nothing
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
    if (format := _format_of_before(config, source)) is not None:
        source = formatted(source, format)
    else:
        source = settled(source, PixelOptions.of(settings), workers=threads)
    return Opened(source, broken, source.train.hashes())


def folder_of(config: Config, source: Source) -> Path:
    """The run folder."""
    return config.run.out or Path("runs", f"{as_utf8(source.name)}-{config.method.method}-{config.model.arch}")


def _format_of_before(config: Config, source: Source) -> PixelFormat | None:
    """How the run that is to go on takes its images, whatever is in its folder of data by now."""
    wish = config.run.resume
    if wish == "never":
        return None
    if wish != "auto":
        return checkpoint.format_in(Path(wish))
    formats = map(checkpoint.format_in, checkpoint.own(folder_of(config, source)))
    return next((format for format in formats if format is not None), None)  # a damaged one gives way to those before
