"""A list of images: a text file with one path per line, optionally followed by a tab or a comma and a label."""

from __future__ import annotations

import codecs
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from fastrm.data.list_index import by_index
from fastrm.data.rows import Rows, beside, path_rows, source_of
from fastrm.data.sources import Source, endings
from fastrm.errors import UsageError
from fastrm.files import at_home
from fastrm.settings.config import check_path


class _Lines(NamedTuple):
    """The content of a list."""

    paths: list[str]
    labels: list[str]
    numbers: list[int]
    """Line numbers, from 1 up."""
    comments: int


def open_list(data: str, *, keep: bool = True) -> Source:
    """Open the images in a list.

    Args:
        data: ``@`` and the path of the list. Blank lines are skipped, and so are lines that begin with ``#``, unless a
            file has that name. A path may be in quotes, and is relative to the folder of the list.
        keep: whether to cache the result for the next start.

    Raises:
        UsageError: there is no such list, it names no images, or the first ones do not exist.
    """
    check_path("data", data)
    path = Path(os.path.abspath(at_home(data[1:])))
    other = beside(path)

    def build() -> Source:
        rows, passed = _rows(path, data)
        about = [f"{len(rows.images):,} images in {path}"]
        test = None
        if other is not None:
            test, _ = _rows(other, f"@{other}")
            about.append(f"validation images in {other}")
        return source_of(path.stem or "list", data, rows, test, about=about, passed=passed)

    return by_index([path] if other is None else [path, other], None, build, keep=keep)


def _rows(path: Path, data: str) -> tuple[Rows, Counter[str]]:
    lines = _read(path, data)
    labels = lines.labels if any(lines.labels) else None
    listed = path_rows(lines.paths, labels, path.parent, data, lambda index: f"line {lines.numbers[index]}")
    return listed.rows, listed.passed + Counter({"comments": lines.comments} if lines.comments else {})


def _read(path: Path, data: str) -> _Lines:
    try:
        content = path.read_bytes()
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UsageError(f"--data {data}: the list {path} {why}") from None
    try:
        text = content.decode(encoding(content), "surrogateescape")
    except UnicodeError:  # of UTF-16
        raise UsageError(f"--data {data}: {path} begins like a text in UTF-16, and is none") from None
    if "\0" in text:
        raise UsageError(f"--data {data}: {path} is not a text file; it must be a list of paths, one per line")
    lines = _Lines([], [], [], 0)
    known = tuple(endings())
    comments = 0
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        image, label = _parted(line, known)
        image = image.strip().strip('"')
        if line.startswith("#") and not os.path.lexists(path.parent / image):
            comments += 1
            continue
        lines.paths.append(image)
        lines.labels.append(label.strip().strip('"'))
        lines.numbers.append(number)
    return lines._replace(comments=comments)


def _parted(line: str, known: tuple[str, ...]) -> tuple[str, str]:
    """Split a line into path and label, the text after the last tab or comma, unless it ends like an image name."""
    for mark in "\t,":
        path, found, label = line.rpartition(mark)
        if found and not label.strip().strip('"').lower().endswith(known):
            return path, label
    return line, ""


def encoding(content: bytes) -> str:
    """The encoding of a text by its first bytes: UTF-8 with or without a mark, or UTF-16 as on Windows."""
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
