"""Images from the rows of a list or a table, with their labels and splits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrm.data.encoded import EncodedImages, FileImages
from fastrm.data.sources import TRAIN, VALIDATION, Source, natural, passed_over, without_validation
from fastrm.errors import UsageError
from fastrm.files import at_home

_NUMBER = re.compile(r"[-+]?\d{1,300}(\.\d*)?([eE][-+]?\d+)?")
_MOST = 100_000
"""Limit of labels that keep their numbers; a classifier has an output per number up to the largest."""
_LOOKED_FOR = 16


@dataclass(frozen=True)
class Rows:
    """Images and the labels of their rows."""

    images: EncodedImages
    """One image per row, without labels."""
    labels: Sequence[Any] | None = None
    """A number or a text per row, None for a row without one; None if there is no column of labels."""

    def taken(self, indices: NDArray[np.int64]) -> Rows:
        """The rows at ``indices``."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Rows(self.images.subset(indices), labels)


class Classes:
    """Numbers the labels: whole numbers from 0 up are kept; others are numbered in their natural order.

    Raises:
        UsageError: they are numbers with a fraction; the message names one.
    """

    def __init__(self, values: set[Any]) -> None:
        numbers = {_number(value) for value in values}
        self._by_number = None not in numbers
        self._kept = self._by_number and all(0 <= (number or 0) < _MOST for number in numbers)
        order: list[Any]
        if self._by_number:
            order = sorted(number for number in numbers if number is not None)
            if part := next((number for number in order if isinstance(number, float)), None):
                raise UsageError(f"{part:g}, which is not a class: labels are whole numbers or text")
        else:
            order = sorted({str(value) for value in values}, key=natural)
        self._places = {value: value if self._kept else place for place, value in enumerate(order)}

    def number(self, value: Any) -> int | None:
        """The number of a training label; None for an unknown label, unless it is a number that is kept."""
        if not self._by_number:
            return self._places.get(str(value))
        number = _number(value)
        if self._kept and isinstance(number, int) and 0 <= number < _MOST:
            return number
        return self._places.get(number)


def _number(value: Any) -> int | float | None:
    """The number of a label, also if it is text; None for other labels."""
    text = str(value)
    if not _NUMBER.fullmatch(text):
        return None
    if text.lstrip("+-").isdecimal():
        return int(text)
    number = float(text)
    return int(number) if number.is_integer() else number


def as_label(value: Any) -> Any:
    """The label in a cell; None for empty text or NaN."""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, str):
        value = value.strip()
    return None if value is None or value == "" or value != value else value


def numbered(labels: Sequence[Any]) -> NDArray[np.int64]:
    """Labels as numbers, int64 [N].

    Raises:
        UsageError: a label is missing, or they are not classes; the message says what they are.
    """
    if None in labels:
        raise UsageError(f"{labels.count(None):,} cells without one")
    classes = Classes(set(labels))
    return np.array([classes.number(label) for label in labels], dtype=np.int64)


def source_of(
    name: str,
    data: str,
    train: Rows,
    test: Rows | None,
    *,
    about: Sequence[str],
    passed: Mapping[str, int],
    required: bool = False,
    why: str = "there are no validation images",
) -> Source:
    """Build a data set from rows.

    Args:
        name: name of the set.
        data: value of ``--data``.
        train: training rows.
        test: validation rows, or None.
        about: description of the set.
        passed: number of unused items by kind.
        required: whether labels were requested, so that it is an error if none can be used.
        why: why there is no ``test``.

    Raises:
        UsageError: validation classes are not among the training classes, or the labels cannot be used.
    """
    about, images = list(about), train.images
    given = [None] * len(images) if train.labels is None else [as_label(value) for value in train.labels]
    known = np.array([i for i, value in enumerate(given) if value is not None], dtype=np.int64)
    try:
        classes = Classes({value for value in given if value is not None})
    except UsageError as error:
        if required:
            raise UsageError(f"--data {data}: the labels hold {error}") from None
        about.append(f"labels are not used, since they hold {error}")
        known = known[:0]
    if len(known) < 2:
        if required:
            raise UsageError(f"--data {data}: fewer than two rows have a label")
        return without_validation(name, images, "; ".join(about), passed)
    numbers = np.array([classes.number(given[i]) for i in known], dtype=np.int64)
    if len(known) < len(images):
        labelled = images.subset(known).with_labels(numbers)
        about.append(f"{len(known):,} of them have a label")
    else:
        images = labelled = images.with_labels(numbers)
    tested, said = _tested(data, test, classes)
    if tested is None:
        return without_validation(name, images, "; ".join(about), passed, why=said or why, labelled=labelled)
    about += [f"{len(np.unique(numbers)):,} classes", f"{len(tested):,} for validation"]
    return Source(name=name, train=images, bank=labelled, test=tested, about="; ".join(about) + passed_over(passed))


def _tested(data: str, rows: Rows | None, classes: Classes) -> tuple[EncodedImages | None, str]:
    """The labelled images for validation; or None, and why there are none."""
    if rows is None:
        return None, ""
    given = [None] * len(rows.images) if rows.labels is None else [as_label(value) for value in rows.labels]
    known = np.array([i for i, value in enumerate(given) if value is not None], dtype=np.int64)
    if not len(known):
        return None, "the validation images have no labels"
    numbers = [classes.number(given[i]) for i in known]
    if None in numbers:
        unknown = sorted({str(given[i]) for i, number in zip(known, numbers, strict=True) if number is None})
        raise UsageError(
            f"--data {data}: the validation images have classes that the training images lack: {', '.join(unknown[:3])}"
        )
    return rows.images.subset(known).with_labels(np.array(numbers, dtype=np.int64)), ""


def by_parts(rows: Rows, parts: Sequence[Any]) -> tuple[Rows, Rows | None, Counter[str]]:
    """Split rows by a column that names the part of each row.

    Returns:
        Training rows, which are all if none is marked; validation rows; and the number of unused rows by part.
    """
    said = np.array([str(part or "").strip().casefold() for part in parts], dtype=object)
    train = np.flatnonzero(np.isin(said, TRAIN))
    if not len(train):
        return rows, None, Counter()
    aside = next((name for name in VALIDATION if name in said), None)
    rest = Counter(f"rows of {part or 'no part'}" for part in said if part not in TRAIN and part != aside)
    test = None if aside is None else rows.taken(np.flatnonzero(said == aside))
    return rows.taken(train), test, rest


class Listed(NamedTuple):
    """Rows of paths without repetitions."""

    rows: Rows
    kept: NDArray[np.int64]
    """Indices of these rows."""
    passed: Counter[str]


def path_rows(
    paths: Sequence[str | None], labels: Sequence[Any] | None, folder: Path, data: str, place: Callable[[int], str]
) -> Listed:
    """Rows that name files. Of several rows with one path, one is kept, without a label if their labels differ.

    Args:
        paths: absolute, or relative to ``folder``; None for a row without a path.
        labels: as in :class:`Rows`.
        folder: folder of the list or the table.
        data: value of ``--data``.
        place: names the row at an index, as in ``"line 3"``.

    Raises:
        UsageError: the paths are URLs, or the first ones do not exist.
    """
    passed: Counter[str] = Counter()
    first = next(((i, path) for i, path in enumerate(paths) if path), None)
    if first is None:
        raise UsageError(f"--data {data} names no image")
    if re.match(r"\w+://", first[1]):
        raise UsageError(
            f"--data {data}, {place(first[0])}: {first[1]} is a URL; images are read from files: download them, as "
            "img2dataset does"
        )
    turned = os.sep == "/" and "\\" in first[1] and not os.path.lexists(os.path.join(folder, first[1]))
    places: dict[str, int] = {}
    said: list[Any] = [] if labels is None else list(labels)
    for i, path in enumerate(paths):
        if not path:
            passed["rows without a path"] += 1
            continue
        whole = os.path.abspath(os.path.join(folder, at_home(path.replace("\\", "/") if turned else path)))
        before = places.setdefault(whole, i)
        if before != i:
            passed["repeated paths"] += 1
            if said and as_label(said[before]) != as_label(said[i]):
                said[before] = None
    some = list(places.items())[:_LOOKED_FOR]
    if not any(os.path.lexists(path) for path, _ in some):
        raise UsageError(
            f"--data {data}, {place(some[0][1])}: {some[0][0]} does not exist, nor do those after it; paths must be "
            f"absolute, or relative to {folder}"
        )
    kept = np.fromiter(places.values(), dtype=np.int64, count=len(places))
    inside = all(path.startswith(str(folder).rstrip(os.sep) + os.sep) for path in places)
    images = FileImages([Path(path) for path in places], None, folder if inside else None)
    return Listed(Rows(images, [said[i] for i in kept] if said else None), kept, passed)


def beside(path: Path) -> Path | None:
    """The validation file beside a file called ``train``, such as ``val.csv`` beside ``train.csv``."""
    if path.stem.casefold() not in TRAIN:
        return None
    others = {other.name.casefold(): other for other in sorted(path.parent.glob(f"*{path.suffix}"))}
    return next((others[found] for name in VALIDATION if (found := f"{name}{path.suffix.casefold()}") in others), None)
