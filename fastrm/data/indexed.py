"""Images in files of an index, and checks whether the index is up to date."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrm.data.encoded import FileImages
from fastrm.data.index import Table
from fastrm.data.looks import carried
from fastrm.data.measuring import spread_over
from fastrm.data.paths import Paths, stated

SAMPLE = 256
"""Number of files whose sizes are compared at each start, and in each process."""


class IndexedImages(FileImages):
    """Images in files of an index."""

    def renew(self) -> None:
        """Read the sizes again if files of the sample were changed; results about the others stay."""
        if "bytes" not in self.table or differ(self.table, self.paths.root):
            self.table.keep(*with_sizes(self.table, self.paths.root, self.table))

    def compare(self, index: int, size: int, changed: int) -> None:
        """Warn about a file whose size differs from the index, and let the next start list it again."""
        if "bytes" not in self.table:
            return
        row = self.row(index)
        before = int(self.table["bytes"][row])
        if (before, self.table["changed"][row]) == (size, changed) or not self.table.doubt(row):
            return
        if before not in (-1, size):
            warnings.warn(
                f"{self.name(index)} has {size:,} bytes, and had {before:,} when it was listed; the next start lists "
                "the images again",
                stacklevel=2,
            )


def images(table: Table, root: str, part: int) -> IndexedImages:
    """The images of a part of the data.

    Args:
        table: table whose ``about["parts"]`` has, per part, its first row, its end row, and the folder from which the
            names of its images start, relative to ``root``; None means the common folder of their paths.
        root: parent of the folders in the table.
        part: index of the part.
    """
    start, stop, inside = table.about["parts"][part]
    named_from = None if inside is None else Path(root) / inside
    return IndexedImages(Paths(table, root, slice(start, stop)), None, named_from)


def with_sizes(table: Table, root: str, earlier: Table | None) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Columns with sizes and modification times of all files, and earlier results."""
    sizes, changed = stated(Paths(table, root).texts(), table.rows)
    named = {name: column for name, column in table.columns.items() if name not in ("hash", "looks")}
    told = Table({**named, "bytes": sizes, "changed": changed}, table.rows, table.about)
    hashes = np.zeros(len(sizes), dtype=np.int64)
    for part, (start, stop, _) in enumerate(table.about["parts"]):
        hashes[start:stop] = images(told, root, part).hashes()
    told.keep({"hash": hashes})
    columns, about = carried(earlier, told) if earlier is not None else ({}, {})
    return {name: told[name] for name in ("bytes", "changed", "hash")} | columns, about


def differ(table: Table, root: str) -> bool:
    """Whether a file of a sample has another size or time than in the table."""
    rows = np.array(spread_over(table.rows, SAMPLE), dtype=np.int32)
    sizes, changed = stated(Paths(table, root, rows).texts(), len(rows))
    return not (np.array_equal(sizes, table["bytes"][rows]) and np.array_equal(changed, table["changed"][rows]))
