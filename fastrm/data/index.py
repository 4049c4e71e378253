"""Tables with information about the images of a set, one file in the cache, which all processes map.

Such a file can always be rebuilt: if it is missing, damaged, or of another version, it is made again.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrm.files import cache_root, write_whole

VERSION = 2
"""Version of the file format; files of other versions are made again."""
_MAGIC = b"fastrm index\n"
_START = struct.Struct(f"<{len(_MAGIC)}sIIQ")
"""The magic number, the version, the CRC-32 of all that follows, and the length of the header, which is JSON."""
_ALIGNED = 64
_CHUNK = 2**20


class Table:
    """Columns with one row per image of a set, or per other item, and metadata.

    Args:
        columns: arrays by name.
        rows: number of images in the set.
        about: JSON-compatible metadata.
        path: file of the table, or the file for :meth:`keep`; None for none.
    """

    def __init__(
        self,
        columns: Mapping[str, NDArray[Any]],
        rows: int,
        about: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self._columns, self.rows, self.about, self.path = dict(columns), rows, dict(about or {}), path
        self._checksum: int | None = None
        """Checksum of the file from which the columns are mapped; None if they are in memory."""
        self._doubted: set[int] = set()

    @property
    def columns(self) -> Mapping[str, NDArray[Any]]:
        """All columns by name."""
        return self._columns

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def keep(self, columns: Mapping[str, NDArray[Any]], about: Mapping[str, Any] | None = None) -> None:
        """Add or replace columns, write all to the file, and map them from it.

        If the file cannot be written, they stay in memory.
        """
        self._columns |= columns
        self.about |= about or {}
        self._checksum = None
        if self.path is None:
            return
        own = self.path.with_name(f"{self.path.name}.{os.getpid()}")  # another process may write the same file now
        with contextlib.suppress(OSError, ValueError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(own, self._write)
            try:
                kept = opened(own)
                os.replace(own, self.path)
            finally:
                own.unlink(missing_ok=True)
            self._stale().unlink(missing_ok=True)
            if kept is not None:
                self._columns, self._checksum = kept._columns, kept._checksum

    def keep_at(self, path: Path) -> None:
        """Set the file of this table to ``path``, and read the columns that are already there."""
        kept = opened(path)
        self.path = path
        if kept is not None and kept.rows == self.rows:
            self._columns, self.about, self._checksum = kept._columns, kept.about, kept._checksum
        else:
            self._columns.pop("looks", None)

    def _write(self, path: Path) -> None:
        places, at = {}, 0
        arrays = {name: np.ascontiguousarray(column) for name, column in self._columns.items()}
        for name, array in arrays.items():
            places[name] = (array.dtype.str, array.shape, at)
            at += -(-array.nbytes // _ALIGNED) * _ALIGNED
        header = json.dumps({"rows": self.rows, "about": self.about, "columns": places}).encode()
        header += b" " * (-(_START.size + len(header)) % _ALIGNED)
        checksum = zlib.crc32(header)
        with open(path, "wb") as file:
            file.write(_START.pack(_MAGIC, VERSION, 0, len(header)) + header)
            for array in arrays.values():
                for part in (array.reshape(-1).view(np.uint8).data, bytes(-array.nbytes % _ALIGNED)):
                    checksum = zlib.crc32(part, checksum)
                    file.write(part)
            file.seek(0)
            file.write(_START.pack(_MAGIC, VERSION, checksum, len(header)))

    def _stale(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.stale")

    @property
    def stale(self) -> bool:
        """Whether a row was marked as outdated since the file was written."""
        return bool(self._doubted) or (self.path is not None and self._stale().exists())

    def doubt(self, row: int) -> bool:
        """Mark a row as outdated, so that the next start checks again; return whether this is new."""
        if row in self._doubted:
            return False
        self._doubted.add(row)
        if self._checksum is not None:
            with contextlib.suppress(OSError), open(self._stale(), "a+", encoding="utf-8") as file:
                file.seek(0)
                if str(row) in file.read().split():  # another process has read it too
                    return False
                file.write(f"{row}\n")
        return True

    def by_value(self) -> tuple[Callable[..., Table], tuple[Any, ...]]:
        """The pickle form from which another process, also on another machine, rebuilds the table.

        If the same file exists there, it is mapped.
        """
        columns = {name: np.array(column) for name, column in self._columns.items()}
        return _received, (self.path, self._checksum, columns, self.rows, self.about)

    def __reduce__(self) -> tuple[Callable[..., Table], tuple[Any, ...]]:
        """A loader process maps the same file, if it is unchanged."""
        if self._checksum is not None and self.path is not None:
            with contextlib.suppress(OSError, struct.error), open(self.path, "rb") as file:
                if _START.unpack(file.read(_START.size))[2] == self._checksum:
                    return _same, (self.path, self._checksum)
        return Table, ({name: np.array(column) for name, column in self._columns.items()}, self.rows, self.about)


def opened(path: Path, *, checksum: int | None = None) -> Table | None:
    """Map a file that :meth:`Table.keep` wrote.

    Args:
        path: the file.
        checksum: checksum of the file, if known; then the content is not verified again.

    Returns:
        The table; None if the file is missing, damaged, or of another kind or version.
    """
    try:
        with open(path, "rb") as file:
            magic, version, stored, length = _START.unpack(file.read(_START.size))
            if (magic, version) != (_MAGIC, VERSION):
                return None
            header = file.read(length)
            found = zlib.crc32(header)
            while checksum is None and (chunk := file.read(_CHUNK)):  # not mapped, so no page of it stays
                found = zlib.crc32(chunk, found)
            if stored != (found if checksum is None else checksum):
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = json.loads(header)
        start = _START.size + length
        columns = {
            name: np.frombuffer(mapped, dtype, count=int(np.prod(shape)), offset=start + at).reshape(shape)
            for name, (dtype, shape, at) in content["columns"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    table = Table(columns, content["rows"], content["about"], path)
    table._checksum = stored
    return table


def _received(
    path: Path | None, checksum: int | None, columns: dict[str, NDArray[Any]], rows: int, about: dict[str, Any]
) -> Table:
    here = None if path is None or checksum is None else opened(path, checksum=checksum)
    return Table(columns, rows, about) if here is None else here


def _same(path: Path, checksum: int) -> Table:
    table = opened(path, checksum=checksum)
    if table is None:
        raise OSError(f"{path} has changed while a loader process started; start again")
    return table


def place(name: str) -> Path:
    """The path of a table in the cache."""
    return cache_root() / "index" / f"{name}.index"


TICK = 3_000_000_000
"""Nanoseconds before a read in which modification times are unreliable; file systems count in steps of up to 2 s."""


class Found(NamedTuple):
    """The cached tables of a set."""

    table: Table | None
    """The table of the set, if it is up to date."""
    earlier: Table | None
    """The table of an earlier state of the set."""
    path: Path | None
    """The path for its table; None for none."""

    def keep(self, table: Table, columns: Mapping[str, NDArray[Any]], about: Mapping[str, Any] | None = None) -> None:
        """Store a table with these additional columns for the next start; it replaces earlier ones of the set."""
        table.path = self.path
        table.keep(columns, about)
        if self.path is None:
            return
        for other in self.path.parent.glob(f"{self.path.name.partition('-')[0]}-*.index*"):
            if not other.name.startswith(self.path.name):
                with contextlib.suppress(OSError):
                    other.unlink()


def look_up(where: object, what: object, holds: Callable[[Table], bool]) -> Found:
    """Find the table of a set, even if the set was moved since.

    Args:
        where: identifies the set, even after changes.
        what: identifies the content of the set, as far as this is cheap.
        holds: whether a table is up to date.
    """
    first, second = (
        blake2b(repr(told).encode(errors="surrogateescape"), digest_size=8).hexdigest() for told in (where, what)
    )
    path, earlier = place(f"{first}-{second}"), None
    for kept in sorted(path.parent.glob(f"*-{second}.index"), key=lambda kept: kept != path):
        table = opened(kept)
        if table is not None and holds(table):
            return Found(table, None, path)
        earlier = earlier or table
    for kept in path.parent.glob(f"{first}-*.index"):
        earlier = earlier or opened(kept)
    return Found(None, earlier, path)
