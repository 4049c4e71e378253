"""Paths of many files; each path is built on access."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fastrm.data.index import Table

Rows = slice | NDArray[np.int32]
"""Rows of a table, as a range or as indices."""
_AT_ONCE = 1024
_THREADS, _SOME = 16, 64
_SLOW = 1e-4  # seconds per call above which threads make several calls at a time


class Paths(Sequence[Path]):
    """Paths of files, by their rows in a table.

    Args:
        table: table with the columns of :func:`columns`.
        root: parent of the folders in the table; empty if they are complete paths.
        rows: rows of the files.
    """

    def __init__(self, table: Table, root: str = "", rows: Rows | None = None) -> None:
        self.table, self.root = table, root
        self.rows = slice(0, table.rows) if rows is None else rows

    @classmethod
    def of(cls, paths: Iterable[str | Path]) -> Paths:
        """Build from a list of paths."""
        pairs = (os.path.split(os.fspath(path)) for path in paths)
        groups = itertools.groupby(pairs, key=lambda pair: pair[0])
        held = columns((folder, packed(name for _, name in files)) for folder, files in groups)
        return cls(Table(held, len(held["name_ends"])))

    def __len__(self) -> int:
        return count(self.rows)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Paths: ...
    def __getitem__(self, index: int | slice) -> Path | Paths:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        return Path(self.text(index))

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.texts())

    def text(self, index: int) -> str:
        """A path as a string."""
        row = row_at(self.rows, index)
        return self._before(folder_at(self.table, row)) + os.fsdecode(string(self.table, "name", row))

    def texts(self) -> Iterator[str]:
        """All paths as strings."""
        if not isinstance(self.rows, slice):
            yield from map(self.text, range(len(self)))
            return
        starts = self.table["folder_starts"]
        row, stop = int(self.rows.start), int(self.rows.stop)
        while row < stop:
            folder = folder_at(self.table, row)
            until = min(stop, int(starts[folder + 1]), row + _AT_ONCE)
            before = self._before(folder)
            yield from (before + os.fsdecode(name) for name in names_of(self.table, row, until).split(b"\0")[:-1])
            row = until

    def _before(self, folder: int) -> str:
        return within(self.root, os.fsdecode(string(self.table, "folder", folder)))

    def subset(self, indices: NDArray[Any]) -> Paths:
        """The paths at ``indices``."""
        return Paths(self.table, self.root, chosen(self.rows, indices))


def count(rows: Rows) -> int:
    """Number of rows."""
    return int(rows.stop) - int(rows.start) if isinstance(rows, slice) else len(rows)


def row_at(rows: Rows, index: int) -> int:
    """The row of the table at ``index``."""
    index = range(count(rows))[index]
    return int(rows.start) + index if isinstance(rows, slice) else int(rows[index])


def chosen(rows: Rows, indices: NDArray[Any]) -> NDArray[np.int32]:
    """The rows at ``indices``."""
    picked = indices + rows.start if isinstance(rows, slice) else rows[indices]
    return picked.astype(np.int32)


def within(root: str, folder: str) -> str:
    """The prefix of the file names in a folder."""
    parts = ("" if root == os.curdir else root, folder)
    return "".join(part if not part or part.endswith(os.sep) else part + os.sep for part in parts)


def packed(names: Iterable[str]) -> bytes:
    """Names as one byte string, each followed by a NUL byte."""
    return b"".join(os.fsencode(name) + b"\0" for name in names)


def columns(folders: Iterable[tuple[str, bytes]]) -> dict[str, NDArray[Any]]:
    """The columns of a table of files.

    Args:
        folders: paths of folders, and the packed names of the files in them.

    Returns:
        Bytes of all names, uint8, and where each ends, [N]; the same of the folders, [F]; and the row of each folder's
        first file, [F + 1].
    """
    held = list(folders)
    found: dict[str, NDArray[Any]] = {}
    starts = np.cumsum([0, *(names.count(b"\0") for _, names in held)])
    blobs = {"name": b"".join(names for _, names in held), "folder": packed(folder for folder, _ in held)}
    for name, blob in blobs.items():
        found[f"{name}s"] = np.frombuffer(blob, dtype=np.uint8)
        found[f"{name}_ends"] = _small(np.flatnonzero(found[f"{name}s"] == 0))
    return found | {"folder_starts": _small(starts)}


def _small(values: NDArray[Any]) -> NDArray[Any]:
    """Non-negative numbers in 4 bytes each, if they fit."""
    return values.astype("<u4" if not len(values) or values[-1] < 2**32 else "<i8")


def string(table: Table, name: str, at: int) -> bytes:
    """One of the names of files (``"name"``) or folders (``"folder"``) in a table."""
    ends = table[f"{name}_ends"]
    return table[f"{name}s"][int(ends[at - 1]) + 1 if at else 0 : int(ends[at])].tobytes()


def names_of(table: Table, start: int, stop: int) -> bytes:
    """The packed names of the files in rows ``start`` to ``stop``."""
    ends = table["name_ends"]
    first, last = (int(ends[row - 1]) + 1 if row else 0 for row in (start, stop))
    return table["names"][first:last].tobytes()


def folder_at(table: Table, row: int) -> int:
    """The index of the folder of a file in a table."""
    starts = table["folder_starts"]  # is copied at each call to be compared with a number of another dtype
    return int(np.searchsorted(starts, starts.dtype.type(row), side="right")) - 1


def folders_of(table: Table) -> list[str]:
    """The folders in a table as strings."""
    return [os.fsdecode(name) for name in table["folders"].tobytes().split(b"\0")[:-1]]


def stated(paths: Iterable[str], number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes in bytes and modification times in nanoseconds of files, int64 [number]; -1 for missing files.

    If calls are slow, as over a network, several run at a time.
    """
    found = np.full((2, number), -1, dtype=np.int64)
    waiting = enumerate(paths)

    def look(numbered: Iterable[tuple[int, str]]) -> None:
        for at, path in numbered:
            try:
                state = os.stat(path)
            except (OSError, ValueError):
                continue
            found[:, at] = state.st_size, state.st_mtime_ns

    def some() -> list[tuple[int, str]]:
        return list(itertools.islice(waiting, _SOME))

    begin = time.monotonic()
    look(some())
    if time.monotonic() - begin < _SLOW * _SOME:
        look(waiting)
    else:
        with ThreadPoolExecutor(_THREADS) as threads:
            while any(parts := [some() for _ in range(4 * _THREADS)]):
                list(threads.map(look, parts))
    return found[0], found[1]
