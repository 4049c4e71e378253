"""Opens images, from a value of ``--data`` or from a Python object."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastrm.data.array_files import open_array_file
from fastrm.data.columns import Wanted
from fastrm.data.folders import open_folder
from fastrm.data.given import open_given
from fastrm.data.huggingface import HUB, is_saved, open_hub
from fastrm.data.lists import open_list
from fastrm.data.named import NAMED, open_named
from fastrm.data.patterns import matching
from fastrm.data.remote import fetched, is_url
from fastrm.data.shards import COMPRESSED, open_shards
from fastrm.data.sources import Source, endings
from fastrm.data.tables import TABLES, open_tables, tables_in
from fastrm.errors import UsageError
from fastrm.files import at_home, cache_root
from fastrm.settings.config import check_path, flag

_LIST = "@"


def _shards(files: Sequence[Path], data: str, wanted: Wanted, keep: bool) -> Source:
    wanted.refuse(data)
    return open_shards(files, data, keep=keep)


_FILES: Mapping[str, Callable[[Sequence[Path], str, Wanted, bool], Source]] = {
    ".tar": _shards,
    **dict.fromkeys(TABLES, open_tables),
    **dict.fromkeys((".npy", ".h5", ".hdf5"), open_array_file),
}
"""Functions that open files, by the endings of the file names; a pattern may name several files."""

_FORMS = (
    f"give a folder of images, one of {', '.join(NAMED)}, a list of paths as @paths.txt, a table that ends in "
    f"{', '.join(TABLES)}, a Hugging Face dataset as hf:PATH or hf:owner/name, shards as in 'train-*.tar', an array "
    "that ends in .npy, .h5 or .hdf5, or a URL of these files"
)


def open_source(
    data: Any,
    data_root: str | Path | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    keep: bool = True,
) -> Source:
    """Open images from a path, a name or a Python object.

    Args:
        data: one of

            - a value of ``--data``, as str or Path: a folder, the name of a set, a list of paths, a table, a Hugging
              Face dataset, shards, an array in a file, or a URL of such files;
            - a map-style Dataset: an object with ``len`` and ``[index]``, whose items are an image, (image, label) with
              or without more values, or a dict with ``image`` and ``label``. An image is a PIL image, or a tensor [C,
              H, W] or [H, W], or an array [H, W, C] or [H, W], of uint8, uint16, or floats from 0 to 1;
            - a list of paths of images;
            - an array or a tensor [N, H, W, C], or [N, H, W] of gray images;
            - an opened :class:`Source`, which is returned.
        data_root: folder of a named set.
        image_column: column of a table or a Hugging Face dataset, or array of an HDF5 file, with the images; None
            detects it by its name.
        label_column: column or array with the labels, like ``image_column``.
        keep: whether to cache the result, so that the next start is fast.

    Returns:
        The source. Labels of a Dataset are whole numbers from 0 up. They come from its attribute ``targets`` or
        ``labels``, or from the column ``label`` of a HuggingFace dataset, if they agree with the items. Otherwise each
        item is read once when labels are needed, which takes as long as an epoch in one process. As in a folder without
        ``val/``, kNN is tested on a tenth of the images.

    Raises:
        UsageError: ``data`` has another type; there is no such set or folder, it has no images, or a named set is
            missing and cannot be downloaded.
    """
    wanted = Wanted(image=image_column, label=label_column)
    if isinstance(data, Source):
        return data
    if not isinstance(data_root, str | Path | None):
        raise UsageError(f"{flag('data_root')} is a {type(data_root).__name__}; it must be a path")
    if not isinstance(data, str | Path | None):
        wanted.refuse(f"<{type(data).__name__}>")
        return open_given(data, keep=keep)
    data = str(data or "")
    if not data:
        raise UsageError("--data is missing; give a folder of images, or a named set such as digits")
    check_path("data_root", data_root)
    if data in NAMED:
        wanted.refuse(data)
        return _named(data, Path(data_root) if data_root else cache_root())
    folder = Path(at_home(data))
    if is_url(data):
        return _at_url(data, wanted, keep)
    if data.startswith(HUB) and not os.path.isdir(folder):
        return open_hub(data, wanted)
    if data.startswith(_LIST) and not os.path.isdir(folder):
        wanted.refuse(data)
        return open_list(data, keep=keep)
    if os.path.isdir(folder):
        return _directory(folder, data, wanted, keep=keep)
    return _files(matching(data), data, wanted, keep) if _ending(data) in _FILES else _nothing(data, folder)


def _named(data: str, root: Path) -> Source:
    source = open_named(data, root)
    if os.path.isdir(data):
        about = f"{source.about}; this is the set of that name, and the folder {data} is meant by ./{data}"
        source = replace(source, about=about)
    return source


def _at_url(data: str, wanted: Wanted, keep: bool) -> Source:
    if COMPRESSED.search(data):
        return _nothing(data, Path())
    files, said = fetched(data, _FILES)
    source = _files(files, data, wanted, keep)
    return replace(source, about=f"{source.about}; {said}") if said else source


def _directory(folder: Path, data: str, wanted: Wanted, *, keep: bool) -> Source:
    if is_saved(folder):
        raise UsageError(f"--data {data} is a Hugging Face dataset; give {HUB}{data}")
    if (tables := tables_in(folder)) and not _holds(folder, endings() | {".tar"}):
        return open_tables(tables, data, wanted, keep)
    wanted.refuse(data)
    check_path("data", data)
    return open_folder(folder, keep=keep)


def _holds(folder: Path, kinds: frozenset[str]) -> bool:
    """Whether a folder has a file with one of these endings, at any depth."""
    return any(_ending(name) in kinds for _, _, names in os.walk(folder) for name in names)


def _files(files: Sequence[Path], data: str, wanted: Wanted, keep: bool) -> Source:
    kinds = {_ending(file.name) for file in files}
    if len(kinds) > 1 or not kinds <= _FILES.keys():
        raise UsageError(f"--data {data} matches files that end in {', '.join(sorted(kinds))}; {_FORMS}")
    return _FILES[kinds.pop()](files, data, wanted, keep)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _nothing(data: str, path: Path) -> Source:
    """Report what is wrong with a value that has none of the forms."""
    if COMPRESSED.search(data):
        raise UsageError(f"--data {data} is compressed, and shards are read by offset; unpack them to .tar files")
    check_path("data", data)
    if path.is_file():
        raise UsageError(f"--data {data} is a file of another kind; {_FORMS}")
    if path.exists():
        raise UsageError(f"--data {data} is neither a file nor a folder; {_FORMS}")
    if re.fullmatch(r"<\w+>", data):
        raise UsageError(f"--data {data} names an object that a script passed; give a folder or a named set")
    below = "" if path.is_absolute() else f" in {os.getcwd()}"
    raise UsageError(f"--data {data} does not exist{below}; {_FORMS}")


def everywhere(data: str) -> bool:
    """Whether a value of ``--data`` names the same images on every machine: a named set, a URL, or one on the Hub."""
    return data in NAMED or is_url(data) or data.startswith(HUB)


def located(data: str) -> str:
    """A value of ``--data`` that works from any folder: a name, a URL, or an absolute path."""
    if data in NAMED or is_url(data):
        return data
    mark = next((mark for mark in (_LIST, HUB) if data.startswith(mark)), "")
    if not mark or os.path.isdir(at_home(data)):
        return os.path.abspath(at_home(data))
    path = os.path.abspath(at_home(data.removeprefix(mark)))
    return data if mark == HUB and not os.path.isdir(path) else mark + path
