"""Caches the offsets of the images in tar shards; a shard that has changed is searched again."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrm.data.encoded import EncodedImages
from fastrm.data.index import TICK, Table, look_up
from fastrm.data.looks import carried
from fastrm.data.paths import Paths, columns, folder_at, folders_of, names_of, stated, string, within
from fastrm.data.remote import is_url
from fastrm.data.sources import endings
from fastrm.data.tar import Shard, read_shard
from fastrm.files import at_home, insistent


class ShardImages(EncodedImages):
    """Images in tar files.

    Args:
        table: index of the shards, in which each shard takes the place of a folder.
        folder: folder of the shards; None if there are several, which are in the table.
    """

    def __init__(self, table: Table, folder: str | None) -> None:
        super().__init__(None, slice(0, table.rows), table)
        self._folder = folder

    def _shard(self, at: int) -> str:
        """The path of a shard."""
        folder = self.table.about["folders"][at] if self._folder is None else self._folder
        return within(folder, "") + os.fsdecode(string(self.table, "folder", at))

    def name(self, index: int) -> str:
        """The shard's path, followed by the member's name."""
        row = self.row(index)
        return f"{self._shard(folder_at(self.table, row))}/{os.fsdecode(string(self.table, 'name', row))}"

    def content(self, index: int) -> bytes:
        """The bytes of a member."""
        return insistent(lambda: self._member(self.row(index)))

    def _member(self, row: int) -> bytes:
        at = folder_at(self.table, row)
        with open(self._shard(at), "rb") as file:
            self._compare(at, os.fstat(file.fileno()))
            file.seek(int(self.table["offset"][row]))
            return file.read(int(self.table["bytes"][row]))

    def _compare(self, at: int, now: os.stat_result) -> None:
        """Warn if the size of a shard differs from the index, and let the next start search it again."""
        size, changed = (int(self.table[name][at]) for name in ("shard_bytes", "shard_changed"))
        if (size, changed) == (now.st_size, now.st_mtime_ns):
            return
        if self.table.doubt(int(self.table["folder_starts"][at])) and size != now.st_size:
            warnings.warn(
                f"{self._shard(at)} has {now.st_size:,} bytes, and had {size:,} when it was indexed; the next start "
                "indexes it again",
                stacklevel=3,
            )

    def identities(self) -> Iterator[bytes]:
        """The identity of each image: the names of its shard and of the member, and its size in bytes."""
        names, sizes = Paths(self.table, "", self.rows).texts(), self.table["bytes"][self.rows].tolist()
        return (os.fsencode(name) + b"\0%d" % size for name, size in zip(names, sizes, strict=True))

    def renew(self) -> None:
        """Do nothing: the shards were compared with the index when they were opened."""

    def stored_in(self) -> Sequence[Path]:
        """The shards."""
        return [Path(self._shard(at)) for at in range(len(self.table["shard_bytes"]))]


def found_in(shards: Sequence[Path], data: str, *, keep: bool) -> ShardImages:
    """The images in shards, from their index; new and changed shards are read.

    Args:
        shards: tar files.
        data: value of ``--data``.
        keep: whether to cache the index for the next start.

    Raises:
        UsageError: raised by :func:`fastrm.data.tar.read_shard`.
    """
    begin, known = time.time_ns(), sorted(endings())
    paths = [str(shard) for shard in shards]
    folders, names = ([split(path) for path in paths] for split in (os.path.dirname, os.path.basename))
    folder = folders[0] if len(set(folders)) == 1 else None
    sizes, changed = stated(paths, len(paths))
    several = folders if folder is None else [""] * len(paths)
    now = list(zip(several, names, sizes.tolist(), changed.tolist(), strict=True))
    readable = [os.access(path, os.R_OK) for path in paths]

    where = "shards", data if is_url(data) else os.path.realpath(at_home(data))
    found = look_up(where, (now, known), lambda table: all(readable) and bool(_settled(table).all()))
    if found.table is not None:
        return ShardImages(found.table, folder)
    earlier = found.earlier if found.earlier is not None and found.earlier.about["endings"] == known else None
    before = {} if earlier is None else _then(earlier)

    def read(at: int) -> Shard:
        if earlier is not None and readable[at] and now[at] in before:
            return _part(earlier, before[now[at]])
        return read_shard(shards[at])

    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:  # which mostly wait for the disk
        parts = list(threads.map(read, range(len(paths))))
    table = _made(names, parts)
    table.about |= {"begin": begin, "endings": known, "folders": several}
    told = {"shard_bytes": sizes, "shard_changed": changed, "shard_ended": np.array([part.ended for part in parts])}
    images = ShardImages(table, folder)
    table.keep(told | {"hash": images.hashes()})
    if keep and table.rows:
        found.keep(table, *(carried(_by_file(earlier), _by_file(table)) if earlier is not None else ({}, {})))
    return images


def _settled(table: Table) -> NDArray[np.bool_]:
    """Which shards of an index were old enough when it was made that their times identify their content."""
    changed = table["shard_changed"]
    # A file that changed just before it was read may have changed again with the same time.
    settled: NDArray[np.bool_] = (changed >= 0) & (changed <= table.about["begin"] - TICK)
    return settled


def _then(table: Table) -> dict[tuple[str, str, int, int], int]:
    """The positions in an index of its reusable shards, by folder, name, size and time."""
    told = zip(
        table.about["folders"], folders_of(table), table["shard_bytes"].tolist(), table["shard_changed"].tolist(),
        strict=True,
    )  # fmt: skip
    return {one: at for (at, one), settled in zip(enumerate(told), _settled(table), strict=True) if settled}


def _part(table: Table, at: int) -> Shard:
    """One shard of an index."""
    start, stop = table["folder_starts"][at : at + 2].tolist()
    offsets, sizes, labels = (table[name][start:stop] for name in ("offset", "bytes", label_column(table)))
    ended = bool(table["shard_ended"][at])
    return Shard(names_of(table, start, stop), offsets, sizes, labels, table.about["passed"][at], ended)


def _made(names: Sequence[str], parts: Sequence[Shard]) -> Table:
    """Build the index of shards."""
    found = columns(zip(names, (part.names for part in parts), strict=True))
    labels = np.concatenate([part.labels for part in parts])
    found |= {
        "label" if (labels >= 0).all() else "some_label": labels,
        "offset": np.concatenate([part.offsets for part in parts]),
        "bytes": np.concatenate([part.sizes for part in parts]),
    }
    return Table(found, len(labels), {"passed": [dict(part.passed) for part in parts]})


def label_column(table: Table) -> str:
    """The column with the labels: ``label``, which images use, if all have one, otherwise ``some_label``."""
    return "label" if "label" in table else "some_label"


def _by_file(table: Table) -> Table:
    """An index with the modification time of the shard in each image's row."""
    changed = np.repeat(table["shard_changed"], counts(table))
    return Table({**table.columns, "changed": changed}, table.rows, table.about)


def counts(table: Table) -> NDArray[np.int64]:
    """Number of images in each shard of an index."""
    starts = table["folder_starts"].astype(np.int64)
    return starts[1:] - starts[:-1]
