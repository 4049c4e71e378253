"""Results of the search for broken files per image, stored in a table."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrm.data.index import Table
from fastrm.data.paths import Rows

UNKNOWN, SOUND, FAULTY, LOST = range(4)
"""States of an image: not checked; readable; broken; disk error, which may be temporary."""
_LOOK = np.dtype(
    [("state", "u1"), ("dtype", "u1"), ("bands", "<u2"), ("pages", "<u4"), ("size", "<i4", (2,))]
)  # 16 bytes


class Looks(NamedTuple):
    """Results for N images; all 0 for images that are not readable."""

    state: NDArray[np.uint8]
    """[N]: ``UNKNOWN``, ``SOUND``, ``FAULTY`` or ``LOST``."""
    size: NDArray[np.int32]
    """[N, 2]: height and width, upright."""
    dtype: NDArray[np.uint8]
    """[N]: index of the dtype in :data:`fastrm.data.stored.DTYPES`."""
    bands: NDArray[np.uint16]
    """[N]."""
    pages: NDArray[np.uint32]
    """[N]: number of pages in the file."""

    def at(self, rows: Rows) -> Looks:
        """The results of some images."""
        state, size, dtype, bands, pages = self
        return Looks(state[rows], size[rows], dtype[rows], bands[rows], pages[rows])


def looks(table: Table, rules: str | None = None) -> Looks | None:
    """The results in a table; None if there are none, or if they follow other rules."""
    if "looks" not in table or (rules is not None and table.about["rules"] != rules):
        return None
    return views(table["looks"])


def empty(count: int) -> NDArray[np.uint8]:
    """A new column for ``count`` images."""
    return np.zeros((count, _LOOK.itemsize), dtype=np.uint8)


def views(column: NDArray[np.uint8]) -> Looks:
    """The results in a column, in the same memory."""
    records = column.view(_LOOK).reshape(-1)
    return Looks(*(records[name] for name in Looks._fields))


def carried(earlier: Table, table: Table) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Columns and metadata of the images in ``table`` that ``earlier`` has with the same size and time.

    Both have the columns ``hash`` and ``changed``.
    """
    if "looks" not in earlier or "hash" not in earlier:
        return {}, {}
    then, now = _keys(earlier), _keys(table)
    order = np.argsort(then)
    rows = order[np.searchsorted(then, now, sorter=order).clip(max=len(order) - 1)]
    same = (earlier["hash"][rows] == table["hash"]) & (earlier["changed"][rows] == table["changed"])
    column = empty(len(rows))
    column[same] = earlier["looks"][rows[same]]  # compared besides the keys, which may collide
    said: dict[str, str] = earlier.about["faults"]
    why = {str(row): said[str(was)] for row, was in enumerate(rows) if same[row] and str(was) in said} if said else {}
    return {"looks": column}, {"rules": earlier.about["rules"], "faults": why}


def _keys(table: Table) -> NDArray[np.uint64]:
    """A key per image from name, size and time; names alone may repeat between training and validation images."""
    hashes, changed = (table[name].astype(np.uint64) for name in ("hash", "changed"))
    keys: NDArray[np.uint64] = hashes + changed * np.uint64(0x9E3779B97F4A7C15)  # overflow beyond 64 bits is intended
    return keys
