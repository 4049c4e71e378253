"""Images in rows of CSV, TSV and Parquet files: a column of paths or of encoded images, optionally one of labels."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastrm.data.cells import CellImages, Cells, cells_of
from fastrm.data.columns import Kind, Wanted, image_column, label_column, part_column, told
from fastrm.data.copies import said
from fastrm.data.list_index import by_index
from fastrm.data.lists import encoding
from fastrm.data.rows import Listed, Rows, beside, by_parts, path_rows, source_of
from fastrm.data.sources import VALIDATION, Source, natural
from fastrm.errors import UsageError, first_line
from fastrm.packages import optional

TABLES = (".csv", ".tsv", ".parquet")
_MARKS = ",;\t"
_PART = re.compile(rf"(?<![a-z])({'|'.join(VALIDATION)})(?![a-z])")
_HEAD = 2**16


class _Csv:
    """A CSV or TSV file, whose first line names the columns."""

    def __init__(self, path: Path, data: str) -> None:
        self.path = path
        self._csv = optional("pyarrow.csv", extra="tables", wanted_by=f"--data {data}")
        with open(path, "rb") as file:
            head = file.read(_HEAD)
        code = encoding(head)
        line = head.decode(code, "replace").lstrip("\r\n").partition("\n")[0]
        mark = "\t" if path.suffix.lower() == ".tsv" else max(_MARKS, key=line.count)
        self._read = {
            "read_options": self._csv.ReadOptions(encoding="utf8" if code == "utf-8-sig" else code),
            "parse_options": self._csv.ParseOptions(delimiter=mark, newlines_in_values=True),
        }
        with self._csv.open_csv(path, **self._read) as reader:
            names: list[str] = reader.schema.names
        self.kinds: dict[str, Kind] = dict.fromkeys(names, "text")
        if len(self.kinds) < len(names):
            raise UsageError(f"--data: {path} has the column {Counter(names).most_common(1)[0][0]} twice")

    def values(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Columns as text, with None for empty cells."""
        types = dict.fromkeys(columns, "string")
        options = self._csv.ConvertOptions(include_columns=list(types), column_types=types, strings_can_be_null=True)
        table = self._csv.read_csv(self.path, convert_options=options, **self._read)
        self._count: int = table.num_rows
        return {name: table.column(name).to_pylist() for name in types}

    def count(self) -> int:
        """Number of rows, after they were read."""
        return self._count

    def close(self) -> None:
        """Do nothing: no file is open."""


class _Parquet:
    """A Parquet file."""

    def __init__(self, path: Path, data: str) -> None:
        self.path = path
        parquet = optional("pyarrow.parquet", extra="tables", wanted_by=f"--data {data}")
        self.file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        self.kinds: dict[str, Kind] = {field.name: kind_of(field.type) for field in self.file.schema_arrow}

    def values(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Columns as Python values."""
        table = self.file.read(columns=list(dict.fromkeys(columns)))
        return {name: table.column(name).to_pylist() for name in table.column_names}

    def count(self) -> int:
        """Number of rows."""
        count: int = self.file.metadata.num_rows
        return count

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def kind_of(kind: Any) -> Kind:
    """The kind of content of an Arrow type."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    kind = getattr(kind, "storage_type", kind)
    if types.is_struct(kind):
        return "bytes" if "bytes" in {kind.field(i).name for i in range(kind.num_fields)} else "other"
    plain = str(kind).removeprefix("large_")
    if plain in ("string", "string_view"):
        return "text"
    return "bytes" if plain in ("binary", "binary_view") or plain.startswith("fixed_size_binary") else "other"


class _Columns(NamedTuple):
    """The columns in use."""

    image: str
    label: str | None
    part: str | None


class _Read(NamedTuple):
    """The content of some tables."""

    rows: Rows
    parts: list[Any] | None
    """The value of the column ``split`` per row."""
    passed: Counter[str]
    notes: list[str]


def open_tables(files: Sequence[Path], data: str, wanted: Wanted, keep: bool) -> Source:
    """Open the images in tables.

    kNN is tested on files that are for validation by their names, on rows that a column ``split`` marks, or on
    ``val.csv`` beside ``train.csv``.

    Args:
        files: CSV, TSV or Parquet files, all with the columns in use.
        data: value of ``--data``.
        wanted: requested columns.
        keep: whether to cache the result for the next start.

    Raises:
        UsageError: a file is damaged or lacks the columns, columns are ambiguous, or there are no images.
    """
    files, aside = _aside([Path(os.path.abspath(file)) for file in files])
    named = wanted.image, wanted.label, len(files)
    return by_index([*files, *aside], named, lambda: _built(files, aside, data, wanted), keep=keep)


def _built(files: Sequence[Path], aside: Sequence[Path], data: str, wanted: Wanted) -> Source:
    """The images in training tables and validation tables; raises like :func:`open_tables`."""
    read = _read(files, data, wanted)
    test, about = None, [f"{len(read.rows.images):,} images in {_named(files)}", *read.notes]
    rows, passed = read.rows, read.passed
    if aside:
        tested = _read(aside, data, wanted)
        test, notes = tested.rows, tested.notes
        about += [f"validation images in {_named(aside)}", *notes]
    elif read.parts is not None:
        rows, test, rest = by_parts(rows, read.parts)
        passed = passed + rest
    name = files[0].stem if len(files) == 1 else files[0].parent.name or "tables"
    return source_of(name, data, rows, test, about=about, passed=passed, required=wanted.label is not None)


def _aside(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Split files by name into those for training and those for validation; all are for training if none stands out."""
    parts = {file: found[1] if (found := _PART.search(file.stem.casefold())) else "" for file in files}
    train = [file for file in files if not parts[file]]
    if not train:
        return files, []
    if len(files) == 1:
        other = beside(files[0])
        return files, [] if other is None else [other]
    name = next((name for name in VALIDATION if name in parts.values()), None)
    return train, [file for file in files if parts[file] == name]


def _named(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{len(files):,} tables in {files[0].parent}"


def _read(files: Sequence[Path], data: str, wanted: Wanted) -> _Read:
    chosen, kind = _Columns("", None, None), "other"
    kinds: dict[str, Kind] = {}
    values: dict[str, list[Any]] = {}
    counts: list[int] = []
    cells: list[Cells] = []
    copied = 0
    for file in files:
        with _reading(file, data), closing(_opened(file, data)) as table:
            if not chosen.image:
                kinds = table.kinds
                chosen = _Columns(
                    image_column(kinds, wanted, data), label_column(kinds, wanted, data), part_column(kinds)
                )
                kind = kinds[chosen.image]
            lacking = [name for name in chosen if name and table.kinds.get(name) != kinds[name]]
            if lacking:
                raise UsageError(f"--data {data}: {file} has no column {lacking[0]} like that of {files[0]}")
            of_rows = [name for name in chosen if name and (name != chosen.image or kind == "text")]
            for name, column in table.values(of_rows).items():
                values.setdefault(name, []).extend(column)
            if kind == "bytes":
                assert isinstance(table, _Parquet)
                held, size = cells_of(table.file, file, chosen.image, data)
                cells.append(held)
                copied += size
            counts.append(table.count())
    notes = [told(chosen.image, chosen.label)]
    labels = values[chosen.label] if chosen.label else None
    if labels is not None and isinstance(some := next((v for v in labels if v is not None), None), list | dict):
        if wanted.label is not None:
            raise UsageError(f"--label-column {wanted.label}: its cells are of type {type(some).__name__}, no classes")
        labels = None
        notes.append(f"labels are not used, since they are of type {type(some).__name__}")
    if kind == "bytes":
        images = CellImages(cells)
        if not len(images):
            raise UsageError(f"--data {data} holds no image: the column {chosen.image} is empty")
        kept, without = images.cells, sum(counts) - len(images)
        passed = Counter({"rows without an image": without} if without else {})
        notes.append(said(copied))
        rows = Rows(images, None if labels is None else [labels[i] for i in kept])
    else:
        rows, kept, passed = _paths(files, values[chosen.image], counts, labels, data)
    parts = None if chosen.part is None else [values[chosen.part][i] for i in kept]
    return _Read(rows, parts, passed, notes)


def _paths(
    files: Sequence[Path], paths: list[str | None], counts: Sequence[int], labels: Sequence[Any] | None, data: str
) -> Listed:
    """Rows that name files, relative to the folder of their table."""
    folder, ends = files[0].parent, np.cumsum(counts)
    if any(file.parent != folder for file in files):
        folders = itertools.chain.from_iterable([f.parent] * n for f, n in zip(files, counts, strict=True))
        paths = [path and os.path.join(parent, path) for parent, path in zip(folders, paths, strict=True)]

    def place(index: int) -> str:
        table = int(np.searchsorted(ends, index, side="right"))
        return f"row {index - int(ends[table] - counts[table])} of {files[table].name}"

    return path_rows(paths, labels, folder, data, place)


def _opened(path: Path, data: str) -> _Csv | _Parquet:
    return (_Parquet if path.suffix.lower() == ".parquet" else _Csv)(path, data)


@contextmanager
def _reading(path: Path, data: str) -> Iterator[None]:
    """Report in one line why a table cannot be read."""
    pa = optional("pyarrow", extra="tables", wanted_by=f"--data {data}")
    try:
        yield
    except UsageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"--data: {path} cannot be read as a table: {first_line(error)}") from None


def tables_in(folder: Path) -> list[Path]:
    """The Parquet files in a folder, or in ``data/`` below it, as in Hugging Face's layout."""
    for place in (folder, folder / "data"):
        if found := sorted(place.glob("*.parquet"), key=natural):
            return found
    return []
