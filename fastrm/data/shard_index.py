"""The index of tar shards: where the images lie in them, found once, and anew in a shard that was changed."""

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
        table: what is in them; to a :class:`Paths` they are folders.
        folder: that the shards are in; None where they are in several, which are in the table.
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
        """Say of a shard that it is not as long as it was when its members were found, and let them be found anew."""
        size, changed = (int(self.table[name][at]) for name in ("shard_bytes", "shard_changed"))
        if (size, changed) == (now.st_size, now.st_mtime_ns):
            return
        if self.table.doubt(int(self.table["folder_starts"][at])) and size != now.st_size:
            warnings.warn(
                f"{self._shard(at)} has {now.st_size:,} bytes, and had {size:,} when its images were found; the next "
                "start finds them anew",
                stacklevel=3,
            )

    def identities(self) -> Iterator[bytes]:
        """What tells each image from others: the names of its shard and itself, and its size in bytes."""
        names, sizes = Paths(self.table, "", self.rows).texts(), self.table["bytes"][self.rows].tolist()
        return (os.fsencode(name) + b"\0%d" % size for name, size in zip(names, sizes, strict=True))

    def renew(self) -> None:
        """The shards were compared with the index when they were opened."""

    def stored_in(self) -> Sequence[Path]:
        """The shards."""
        return [Path(self._shard(at)) for at in range(len(self.table["shard_bytes"]))]


def found_in(shards: Sequence[Path], data: str, *, keep: bool) -> ShardImages:
    """The images in shards: by their index if no shard has changed since, and else read from those that have.

    Args:
        shards: tar files.
        data: what ``--data`` says.
        keep: whether the index is kept in the cache.

    Raises:
        UsageError: as :func:`fastrm.data.tar.read_shard` raises it.
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

    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:  # waiting for the disk, mostly
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
    """Which shards are as they were when an index was made, if their names, sizes and times are."""
    changed = table["shard_changed"]
    # What was changed just before it was read may have been changed again, and have got the same time.
    settled: NDArray[np.bool_] = (changed >= 0) & (changed <= table.about["begin"] - TICK)
    return settled


def _then(table: Table) -> dict[tuple[str, str, int, int], int]:
    """The places of the shards of an index that may be as they were, by folder, name, size and time."""
    told = zip(
        table.about["folders"], folders_of(table), table["shard_bytes"].tolist(), table["shard_changed"].tolist(),
        strict=True,
    )  # fmt: skip
    return {one: at for (at, one), settled in zip(enumerate(told), _settled(table), strict=True) if settled}


def _part(table: Table, at: int) -> Shard:
    """What an index holds of one shard."""
    start, stop = table["folder_starts"][at : at + 2].tolist()
    offsets, sizes, labels = (table[name][start:stop] for name in ("offset", "bytes", label_column(table)))
    ended = bool(table["shard_ended"][at])
    return Shard(names_of(table, start, stop), offsets, sizes, labels, table.about["passed"][at], ended)


def _made(names: Sequence[str], parts: Sequence[Shard]) -> Table:
    """A table of what shards hold."""
    found = columns(zip(names, (part.names for part in parts), strict=True))
    labels = np.concatenate([part.labels for part in parts])
    found |= {
        "label" if (labels >= 0).all() else "some_label": labels,
        "offset": np.concatenate([part.offsets for part in parts]),
        "bytes": np.concatenate([part.sizes for part in parts]),
    }
    return Table(found, len(labels), {"passed": [dict(part.passed) for part in parts]})


def label_column(table: Table) -> str:
    """Which column of an index says the labels: that which images have theirs from only if none is missing there."""
    return "label" if "label" in table else "some_label"


def _by_file(table: Table) -> Table:
    """An index in which each image has the time at which its shard was changed."""
    changed = np.repeat(table["shard_changed"], counts(table))
    return Table({**table.columns, "changed": changed}, table.rows, table.about)


def counts(table: Table) -> NDArray[np.int64]:
    """How many images there are in each shard of an index."""
    starts = table["folder_starts"].astype(np.int64)
    return starts[1:] - starts[:-1]
