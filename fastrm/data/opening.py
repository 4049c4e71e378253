"""Whatever images can be given as, opened: what ``--data`` names, or an object of a script's."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrm.data.folders import open_folder
from fastrm.data.given import open_given
from fastrm.data.named import NAMED, open_named
from fastrm.data.shards import COMPRESSED, open_shards
from fastrm.data.sources import Source
from fastrm.errors import UsageError
from fastrm.files import at_home, cache_root
from fastrm.settings.config import check_path, flag


def open_source(data: Any, data_root: str | Path | None = None) -> Source:
    """Open images, however they are given.

    Args:
        data: one of

            - what ``--data`` takes, as str or Path: a folder, shards, or the name of a set;
            - a map-style Dataset: anything with ``len`` and ``[index]``, whose items are an image, (image, label) with
              or without more, or a dict with ``image`` and ``label``. An image is a PIL image, or a tensor [C, H, W] or
              [H, W], or an array [H, W, C] or [H, W], of uint8, uint16, or floats from 0 to 1;
            - a list of paths of images;
            - an array or a tensor [N, H, W, C], or [N, H, W] of gray images;
            - an opened :class:`Source`, which is returned.
        data_root: where a named set lies.

    Returns:
        The source. Labels of a Dataset are whole numbers from 0 up; they are taken from its attribute ``targets`` or
        ``labels``, or of a HuggingFace dataset from its column ``label``, where its items agree, and else asked of
        each item once something needs them, which takes as long as an epoch in one process. As in a folder without
        ``val/``, kNN is tried on a tenth of the images.

    Raises:
        UsageError: it is of another kind; there is no such set or folder, it holds no image, or a named set is not
            there and cannot be downloaded.
    """
    if isinstance(data, Source):
        return data
    if not isinstance(data_root, str | Path | None):
        raise UsageError(f"{flag('data_root')} is a {type(data_root).__name__}; it must be a path")
    if not isinstance(data, str | Path | None):
        return open_given(data)
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
    if re.fullmatch(r"<\w+>", data) and not folder.exists():
        raise UsageError(f"--data {data} stands for what a script gave as an object; give a folder or a named set")
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
