"""Images in files that an index tells of, and whether the files are still as it says."""

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
"""Files whose sizes are compared at each start, and in each process."""


class IndexedImages(FileImages):
    """Images in files that an index tells of."""

    def renew(self) -> None:
        """Take the sizes anew if files of the sample were changed; what was found out of the others stays."""
        if "bytes" not in self.table or differ(self.table, self.paths.root):
            self.table.keep(*with_sizes(self.table, self.paths.root, self.table))

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


def images(table: Table, root: str, part: int) -> IndexedImages:
    """The images of a part of the data.

    Args:
        table: of which ``about["parts"]`` has for each part its first row, the one behind its last, and the folder that
            the names of its images start from, from ``root`` on; None for what their paths have in common.
        root: the folder that the folders in the table are in.
        part: its place among the parts.
    """
    start, stop, inside = table.about["parts"][part]
    named_from = None if inside is None else Path(root) / inside
    return IndexedImages(Paths(table, root, slice(start, stop)), None, named_from)


def with_sizes(table: Table, root: str, earlier: Table | None) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Columns of the sizes of all files and the times at which they were changed, and what was found out before."""
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
    """Whether one of a sample of the files has another size or time than in the table."""
    rows = np.array(spread_over(table.rows, SAMPLE), dtype=np.int32)
    sizes, changed = stated(Paths(table, root, rows).texts(), len(rows))
    return not (np.array_equal(sizes, table["bytes"][rows]) and np.array_equal(changed, table["changed"][rows]))
