"""Encoded images in the cells of Parquet files.

A Parquet file packs many rows together, so a single image cannot be read without its neighbours. The column of images
is therefore copied once into the cache, as an uncompressed Arrow file. All processes map this file: its pages are in
memory only once, and the system frees them when memory is short.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrm.data.copies import copied, folder_of, state
from fastrm.data.decode import BrokenImage
from fastrm.data.encoded import EncodedImages
from fastrm.errors import UsageError, first_line
from fastrm.machine.memory import size as in_words
from fastrm.terminal.progress import bar

_AT_ONCE = 256


class Cells:
    """A column of encoded images.

    Args:
        copy: the Arrow file.
        name: name of the table for messages.

    Attributes:
        digests: digests of the bytes, int64 [rows].
        present: rows with an image, int64 [M].
    """

    def __init__(self, copy: Path, name: str) -> None:
        self.copy, self.name = copy, name
        held = _mapped(copy)
        self.digests: NDArray[np.int64] = np.array(held.column("digest").to_numpy())
        self.present = np.flatnonzero(held.column("bytes").is_valid().to_numpy())

    def __len__(self) -> int:
        return len(self.digests)

    def content(self, row: int) -> bytes:
        """The bytes of a row."""
        found: bytes | None = _mapped(self.copy).column("bytes")[row].as_py()
        if found is None:
            raise BrokenImage("the cell is empty")
        return found


@lru_cache(256)  # each is an open file, whose number is limited
def _mapped(copy: Path) -> Any:
    """A memory-mapped Arrow file."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(copy))).read_all()


class CellImages(EncodedImages):
    """Images in the cells of tables.

    Args:
        tables: columns of images.
        rows: row numbers, counted through all tables, int64 [N]; None means all rows with an image.
        labels: int64 [N], or None.
    """

    NOUN = "rows"

    def __init__(
        self,
        tables: Sequence[Cells],
        rows: NDArray[np.int64] | None = None,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        self._tables = tables
        self._starts = np.array([0, *itertools.accumulate(map(len, tables))], dtype=np.int64)
        if rows is None:
            rows = np.concatenate([start + t.present for start, t in zip(self._starts, tables, strict=False)])
        super().__init__(labels, slice(0, len(rows)))
        self.cells = rows

    def _place(self, index: int) -> tuple[Cells, int]:
        """The table of an image, and its row there."""
        row = self.cells[self.row(index)]
        table = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._tables[table], int(row - self._starts[table])

    def name(self, index: int) -> str:
        """The path of the table, and the row from 0."""
        table, row = self._place(index)
        return f"{table.name}, row {row}"

    def content(self, index: int) -> bytes:
        """The bytes of a cell."""
        table, row = self._place(index)
        return table.content(row)

    def identities(self) -> Iterator[bytes]:
        """The identity of each image, a digest of its bytes."""
        digests = np.concatenate([table.digests for table in self._tables])[self.cells[self.rows]]
        return (digest.tobytes() for digest in digests)

    def stored_in(self) -> Sequence[Path]:
        """The copies."""
        return [table.copy for table in self._tables]


def cells_of(parquet: Any, path: Path, column: str, data: str) -> tuple[Cells, int]:
    """The images in a column of a Parquet file, and the size of their copy in bytes; the copy is made if missing.

    Args:
        parquet: the file, as ``pyarrow.parquet.ParquetFile`` opens it.
        path: path of the file.
        column: column of bytes, or of Hugging Face's ``{bytes, path}``.
        data: value of ``--data``.

    Raises:
        UsageError: the file is damaged, or there is not enough space for the copy.
    """
    groups = [parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    leaf = (
        next(c.path_in_schema for c in chunks if c.path_in_schema in (column, f"{column}.bytes")) if chunks else column
    )
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)

    def write(partial: Path) -> None:
        import pyarrow as pa

        schema = pa.schema([("bytes", pa.large_binary()), ("digest", pa.int64())])
        text = f"copy of the images in {path.name}, {in_words(size)}"
        with (
            bar(text, parquet.metadata.num_rows) as task,
            pa.OSFile(str(partial), "wb") as file,
            pa.ipc.new_file(file, schema) as out,
        ):
            for cells in _batches(parquet, path, leaf):
                digests = [_digest(cell.as_py()) for cell in cells]
                out.write_batch(pa.record_batch([cells, pa.array(digests, pa.int64())], schema=schema))
                task.advance(len(cells))

    copy = copied(data, folder_of("cells", state(path), column) / "cells.arrow", size, write)
    return Cells(copy, str(path)), size


def _batches(parquet: Any, path: Path, leaf: str) -> Iterator[Any]:
    """Yield the cells as arrays of large binaries."""
    import pyarrow as pa

    try:
        for batch in parquet.iter_batches(batch_size=_AT_ONCE, columns=[leaf]):
            column = batch.column(0)
            yield (column.flatten()[0] if pa.types.is_struct(column.type) else column).cast(pa.large_binary())
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"--data: {path} is damaged: {first_line(error)}") from None


def _digest(content: bytes | None) -> int:
    return int.from_bytes(blake2b(content or b"", digest_size=8).digest(), "little", signed=True)
