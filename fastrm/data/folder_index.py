"""The cached index of a folder of images, and the check whether it is up to date."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrm import own
from fastrm.data.index import TICK, Found, Table, look_up
from fastrm.data.indexed import differ, with_sizes
from fastrm.data.listing import Folder, Listing, checksum, is_sheet
from fastrm.data.paths import columns, folders_of, stated
from fastrm.data.sources import endings

_TOLD = 4096
"""Largest number of names in the data folder that its key depends on."""


def find(root: Path) -> Found:
    """Find the index of a folder, even if the folder was moved since."""
    try:
        with os.scandir(root) as entries:
            names = sorted(itertools.islice((entry.name for entry in entries), _TOLD + 1))
        changed = os.stat(root).st_mtime_ns
    except OSError:
        return Found(None, None, None)
    told = [changed, names if len(names) <= _TOLD else [], sorted(endings())]
    return look_up(os.path.realpath(root), told, lambda table: _holds(table, root))


def make(listing: Listing, begin: int, parts: Sequence[Folder], labels: Mapping[Folder, int] | None) -> Table:
    """Build the index of a folder in memory.

    Args:
        listing: content of the folder.
        begin: start time of the listing, in nanoseconds.
        parts: folders whose images are used, with everything below them.
        labels: label of the images in each folder; None for none.
    """
    every = list(listing.top)
    used = {folder for part in parts for folder in part}
    beside = [folder for left_out in listing.left_out for folder in _beside_runs(left_out)]
    watched = [*every, *(folder for folder in beside if not folder.is_run)]
    found = columns((folder.inside, folder.names if folder in used else b"") for folder in watched)
    starts = found["folder_starts"].astype(np.int64)
    if labels is not None:
        of_folders = np.array([labels.get(folder, -1) for folder in watched], dtype=np.int64)
        found["label"] = np.repeat(of_folders, np.diff(starts))
    found["folder_changed"] = np.array([folder.changed for folder in watched], dtype=np.int64)
    found["folder_entries"] = np.array([folder.entries for folder in watched], dtype=np.uint32)
    about = {
        "begin": begin,
        "parts": [_span(part, every, starts) for part in parts],
        "runs": [folder.inside for folder in beside if folder.is_run],
        "nowhere": listing.nowhere,
        "sheets": listing.sheets,
    }
    return Table(found, int(starts[-1]), about)


def _span(part: Folder, every: Sequence[Folder], starts: NDArray[np.int64]) -> tuple[int, int, str]:
    """First row and end row of a part, and its path in the folder."""
    at = every.index(part)
    return int(starts[at]), int(starts[at + sum(1 for _ in part)]), part.inside


def _beside_runs(folder: Folder) -> Iterator[Folder]:
    """Yield a skipped folder and those below it, except run folders, which change during the run."""
    yield folder
    for inner in [] if folder.is_run else folder.folders:
        yield from _beside_runs(inner)


def keep(table: Table, root: Path, found: Found) -> None:
    """Store an index for the next start, with the sizes of all files; it replaces earlier ones of the folder."""
    if found.path is not None:
        found.keep(table, *with_sizes(table, str(root), found.earlier))


def _holds(table: Table, root: Path) -> bool:
    """Whether an index is up to date, judged by the folders and a sample of the files."""
    if table.stale:
        return False
    paths = [os.path.join(root, folder) for folder in folders_of(table)]
    _, changed = stated(paths, len(paths))
    if not np.array_equal(changed, table["folder_changed"]):
        return False
    try:
        recent = np.flatnonzero(changed > table.about["begin"] - TICK)  # another change may have the same time
        same = all(checksum(sorted(os.listdir(paths[at]))) == table["folder_entries"][at] for at in recent)
    except OSError:
        return False
    return (
        same
        and all(os.access(path, os.R_OK | os.X_OK) for path in paths)
        and not any(os.path.exists(root / link) for link in table.about["nowhere"])
        and all(own.run(root / run) for run in table.about["runs"])
        and all(is_sheet(root / sheet) for sheet in table.about["sheets"])
        and not differ(table, str(root))
    )
