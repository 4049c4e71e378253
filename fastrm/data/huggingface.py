"""Hugging Face datasets: on disk as ``hf:PATH``, or by name over the network as ``hf:owner/name``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrm.data.columns import Kind, Wanted, image_column, label_column, told
from fastrm.data.decode import BrokenImage
from fastrm.data.encoded import EncodedImages
from fastrm.data.items import fingerprint
from fastrm.data.rows import Rows, path_rows, source_of
from fastrm.data.sources import TRAIN, VALIDATION, Source
from fastrm.data.tables import kind_of
from fastrm.errors import UsageError, first_line
from fastrm.files import at_home
from fastrm.machine.memory import exhausted
from fastrm.packages import optional

HUB = "hf:"
_SAVED = ("dataset_dict.json", "state.json")
"""Files in a folder that ``save_to_disk`` wrote."""


class HubImages(EncodedImages):
    """Encoded images of a dataset.

    Args:
        held: the column of the images, with ``{bytes, path}``.
        column: name of the column.
        called: name of the dataset for messages.
        mark: fingerprint of the dataset.
        rows: rows of the images, int64 [N].
        labels: int64 [N], or None.
    """

    NOUN = "rows"

    def __init__(
        self,
        held: Any,
        column: str,
        called: str,
        mark: str,
        rows: NDArray[np.int64],
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(labels, slice(0, len(rows)))
        self._held, self._column, self._called, self._mark, self._cells = held, column, called, mark, rows

    def name(self, index: int) -> str:
        """The dataset, and the row, counted from 0."""
        return f"{self._called}, row {self._cells[self.row(index)]}"

    def content(self, index: int) -> bytes:
        """The bytes of a row, or of the file that it names."""
        cell = self._held[int(self._cells[self.row(index)])][self._column]
        if cell is None or not (cell["bytes"] or cell["path"]):
            raise BrokenImage("the cell is empty")
        content: bytes = cell["bytes"] or Path(cell["path"]).read_bytes()
        return content

    def identities(self) -> Iterator[bytes]:
        """The identity of each image: the fingerprint of the dataset, and the row."""
        return (f"{row}\0{self._mark}".encode() for row in self._cells[self.rows])

    def stored_in(self) -> Sequence[Path]:
        """The dataset's files."""
        return [Path(file["filename"]) for file in self._held.cache_files]


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / _SAVED[0]).is_file() or all((folder / name).is_file() for name in ("dataset_info.json", _SAVED[1]))


def open_hub(data: str, wanted: Wanted) -> Source:
    """Open a dataset that ``save_to_disk`` wrote, a folder that ``load_dataset`` takes, or a dataset of the Hub.

    Training uses the split ``train``; kNN is tested on ``validation`` or, without it, ``test``.

    Args:
        data: ``hf:`` and a path or ``owner/name``, optionally with ``:configuration``.
        wanted: requested columns.

    Raises:
        UsageError: it is missing, cannot be loaded, or lacks the split or the columns.
    """
    loaded, name = _loaded(data)
    about = f"dataset {data.removeprefix(HUB)}"
    train, test = loaded, None
    if isinstance(loaded, dict):
        part = next((part for part in loaded if part in TRAIN), next(iter(loaded)) if len(loaded) == 1 else None)
        if part is None:
            raise UsageError(f"--data {data} has the splits {', '.join(loaded)}, and none is called train")
        other = next((other for other in VALIDATION if other in loaded and other != part), None)
        train, test = loaded[part], None if other is None else loaded[other]
        about += f", split {part}"
        rest = Counter({f"rows of {key}": len(loaded[key]) for key in loaded if key not in (part, other)})
    else:
        rest = Counter()
    kinds = _kinds(train)
    image, label = image_column(kinds, wanted, data), label_column(kinds, wanted, data)
    rows, passed = _rows(train, image, label, data, f"{data}")
    said = [f"{len(rows.images):,} images in {about}", told(image, label)]
    tested = None
    if test is not None:
        if lacking := [column for column in (image, label) if column and column not in test.column_names]:
            raise UsageError(f"--data {data}: the split {other} has no column {lacking[0]}")
        tested, _ = _rows(test, image, label, data, f"{data} {other}")
        said.append(f"validation images in split {other}")
    required = wanted.label is not None
    return source_of(name, data, rows, tested, about=said, passed=passed + rest, required=required)


def _loaded(data: str) -> tuple[Any, str]:
    """A Dataset or a DatasetDict, and a name for it."""
    datasets = optional("datasets", extra="hf", wanted_by=f"--data {data}")
    name: str = at_home(data.removeprefix(HUB))
    folder = Path(name)
    owner, _, configuration = name.partition(":")
    if not name.strip():
        raise UsageError(f"--data {data} names no dataset; give hf:PATH or hf:owner/name")
    if not folder.is_dir() and (owner.startswith((os.sep, ".")) or owner.count("/") > 1):
        raise UsageError(f"--data {data}: there is no folder {folder}")
    try:
        if is_saved(folder):
            loaded = datasets.load_from_disk(str(folder))
        elif folder.is_dir():
            loaded = datasets.load_dataset(str(folder))
        else:
            loaded = datasets.load_dataset(owner, configuration or None)
    except Exception as error:  # errors of the network, of the Hub and of damaged files have many types
        if exhausted(error):
            raise
        where = "" if folder.is_dir() else f"; there is no such folder in {os.getcwd()}, and no such dataset by name"
        raise UsageError(f"--data {data} cannot be loaded: {first_line(error)}{where}") from None
    return loaded, folder.resolve().name if folder.is_dir() else owner.rpartition("/")[2]


def _kinds(dataset: Any) -> dict[str, Kind]:
    return {field.name: kind_of(field.type) for field in dataset.features.arrow_schema}


def _rows(dataset: Any, image: str, label: str | None, data: str, called: str) -> tuple[Rows, Counter[str]]:
    datasets = optional("datasets", extra="hf", wanted_by=f"--data {data}")
    if not len(dataset):
        raise UsageError(f"--data {data} holds no image: it has no row")
    labels = None
    if label is not None:
        labels = list(dataset[label])
        if isinstance(dataset.features[label], datasets.ClassLabel):
            labels = [None if number == -1 else number for number in labels]  # -1 means no label
    if _kinds(dataset)[image] == "text":
        paths = list(dataset[image])
        listed = path_rows(paths, labels, Path.cwd(), data, lambda index: f"row {index}")
        return listed.rows, listed.passed
    mark = fingerprint(dataset) or ""
    held = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Rows(HubImages(held, image, called, mark, np.arange(len(dataset))), labels), Counter()
