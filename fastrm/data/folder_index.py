"""The index of a folder of images: what was found in it once, and whether that is still so."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrm import own
from fastrm.data.encoded import FileImages
from fastrm.data.index import TICK, Found, Table, look_up
from fastrm.data.listing import Folder, Listing, checksum, is_sheet
from fastrm.data.looks import carried
from fastrm.data.paths import Paths, columns, folders_of, stated
from fastrm.data.sources import endings

_SAMPLE = 256
"""Files whose sizes and times are compared at each start."""
_TOLD = 4096
"""Names in the folder of all data that its key depends on, if there are no more."""


class FolderImages(FileImages):
    """Images in the files of a folder that has an index."""

    def renew(self) -> None:
        """Take the sizes anew if files of the sample were changed; what was found out of the others stays."""
        if "bytes" not in self.table or _changed(self.table, self.paths.root):
            self.table.keep(*_with_sizes(self.table, Path(self.paths.root), self.table))

    def compare(self, index: int, size: int, changed: int) -> None:
        """Say of a file that is not as long as it was when it was listed, and let the next start list it again."""
        if "bytes" not in self.table:
            return
        row = self.row(index)
        before = int(self.table["bytes"][row])
        if (before, self.table["changed"][row]) == (size, changed) or not self.table.doubt(row):
            return
        if before not in (-1, size):
            warnings.warn(
                f"{self.name(index)} has {size:,} bytes, and had {before:,} when it was listed; the next start lists "
                "the images anew",
                stacklevel=2,
            )


def find(root: Path) -> Found:
    """Look for the index of a folder, wherever that lay when the index was made."""
    try:
        with os.scandir(root) as entries:
            names = sorted(itertools.islice((entry.name for entry in entries), _TOLD + 1))
        changed = os.stat(root).st_mtime_ns
    except OSError:
        return Found(None, None, None)
    told = [changed, names if len(names) <= _TOLD else [], sorted(endings())]
    return look_up(os.path.realpath(root), told, lambda table: _holds(table, root))


def make(listing: Listing, begin: int, parts: Sequence[Folder], labels: Mapping[Folder, int] | None) -> Table:
    """Make the index of a folder; it is in memory.

    Args:
        listing: what is in it.
        begin: when that was begun to be read, in nanoseconds.
        parts: the folders of which the images are used, each with all that is below it.
        labels: of the images in each folder; None for none.
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
    """The first row of a part, the one behind its last, and its path inside of the folder."""
    at = every.index(part)
    return int(starts[at]), int(starts[at + sum(1 for _ in part)]), part.inside


def _beside_runs(folder: Folder) -> Iterator[Folder]:
    """A folder that is left out and those below it; not what is in a run, which changes as that goes on."""
    yield folder
    for inner in [] if folder.is_run else folder.folders:
        yield from _beside_runs(inner)


def images(table: Table, root: Path, part: int) -> FolderImages:
    """The images of a part of the data."""
    start, stop, inside = table.about["parts"][part]
    return FolderImages(Paths(table, str(root), slice(start, stop)), None, root / inside)


def keep(table: Table, root: Path, found: Found) -> None:
    """Keep an index for the next start, with the sizes of all files, in the place of earlier ones of the folder."""
    if found.path is not None:
        found.keep(table, *_with_sizes(table, root, found.earlier))


def _with_sizes(table: Table, root: Path, earlier: Table | None) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Columns of the sizes of all files and the times at which they were changed, and what was found out before."""
    sizes, changed = stated(Paths(table, str(root)).texts(), table.rows)
    named = {name: column for name, column in table.columns.items() if name not in ("hash", "looks")}
    told = Table({**named, "bytes": sizes, "changed": changed}, table.rows, table.about)
    hashes = np.zeros(len(sizes), dtype=np.int64)
    for part, (start, stop, _) in enumerate(table.about["parts"]):
        hashes[start:stop] = images(told, root, part).hashes()
    told.keep({"hash": hashes})
    columns, about = carried(earlier, told) if earlier is not None else ({}, {})
    return {name: told[name] for name in ("bytes", "changed", "hash")} | columns, about


def _changed(table: Table, root: str | Path) -> bool:
    """Whether one of a sample of the files has another size or time than in the table."""
    rows = np.unique(np.linspace(0, table.rows - 1, min(table.rows, _SAMPLE)).astype(np.int32))
    sizes, changed = stated(Paths(table, str(root), rows).texts(), len(rows))
    return not (np.array_equal(sizes, table["bytes"][rows]) and np.array_equal(changed, table["changed"][rows]))


def _holds(table: Table, root: Path) -> bool:
    """Whether an index tells what is in a folder, by the folders in it and a sample of its files."""
    if table.stale:
        return False
    paths = [os.path.join(root, folder) for folder in folders_of(table)]
    _, changed = stated(paths, len(paths))
    if not np.array_equal(changed, table["folder_changed"]):
        return False
    try:
        recent = np.flatnonzero(changed > table.about["begin"] - TICK)  # another change may have got the same time
        same = all(checksum(sorted(os.listdir(paths[at]))) == table["folder_entries"][at] for at in recent)
    except OSError:
        return False
    return (
        same
        and all(os.access(path, os.R_OK | os.X_OK) for path in paths)
        and not any(os.path.exists(root / link) for link in table.about["nowhere"])
        and all(own.run(root / run) for run in table.about["runs"])
        and all(is_sheet(root / sheet) for sheet in table.about["sheets"])
        and not _changed(table, root)
    )
