"""Whatever ``--data`` names, opened: a folder, shards or a named set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fastrm.data.folders import open_folder
from fastrm.data.named import NAMED, open_named
from fastrm.data.shards import COMPRESSED, open_shards
from fastrm.data.sources import Source
from fastrm.errors import UsageError
from fastrm.files import at_home, cache_root
from fastrm.settings.config import check_path, flag


def open_source(data: str | Path, data_root: str | Path | None = None) -> Source:
    """Open a named set, or a folder in one of the three layouts.

    Raises:
        UsageError: there is no such set or folder, it holds no image, or a named set is not there and cannot be
            downloaded.
    """
    for name, value in (("data", data), ("data_root", data_root)):
        if not isinstance(value, str | Path | None):
            raise UsageError(f"{flag(name)} is a {type(value).__name__}; it must be a path or the name of a set")
    data = str(data or "")
    if not data:
        raise UsageError("--data is missing; give a folder of images, or a named set such as digits")
    check_path("data_root", data_root)
    if data in NAMED:
        source = open_named(data, Path(data_root) if data_root else cache_root())
        if os.path.isdir(data):
            about = f"{source.about}; this is the set of that name, and the folder {data} is meant by ./{data}"
            source = replace(source, about=about)
        return source
    if COMPRESSED.search(data):
        raise UsageError(f"--data {data} is compressed, and shards are read by offset; unpack them to .tar files")
    folder = Path(at_home(data))
    if data.lower().endswith(".tar") and not os.path.isdir(folder):
        return open_shards(data)
    check_path("data", data)
    if not folder.exists():
        raise UsageError(
            f"--data {data} does not exist{_below(folder)}; give a folder of images, shards as in "
            f"'train-*.tar', or one of {', '.join(NAMED)}"
        )
    if not folder.is_dir():
        raise UsageError(f"--data {data} is a file; give the folder that holds the images, or shards that end in .tar")
    return open_folder(folder)


def located(data: str) -> str:
    """What ``--data`` names, as it is found from every other folder too: the name of a set, or an absolute path."""
    return data if data in NAMED else os.path.abspath(at_home(data))


def _below(path: Path) -> str:
    """Which folder a path was looked for in, where the path does not say it."""
    return "" if path.is_absolute() else f" in {os.getcwd()}"
