"""Finds the columns of a table with images, labels, and the part of the data set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fastrm.errors import UsageError

Kind = Literal["bytes", "text", "other"]
"""The content of a column, which is encoded images, text that may be paths, or something else."""

_IMAGES = frozenset(
    {"image", "path", "file", "img", "filename", "filepath", "imagepath", "imgpath", "imagefile", "imagefilename"}
)
_LABELS = frozenset({"label", "class"})
_PARTS = frozenset({"split"})
_TOLD = 20


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The columns that the user requested; None if they are to be detected."""

    image: str | None = None
    """``--image-column``."""
    label: str | None = None
    """``--label-column``."""

    def refuse(self, data: str) -> None:
        """Raise a UsageError if a column was requested, because the data has none."""
        for name, value in (("image", self.image), ("label", self.label)):
            if value is not None:
                raise UsageError(
                    f"--{name}-column {value}: --data {data} has no columns, as tables, hf: and HDF5 files have"
                )


def image_column(kinds: Mapping[str, Kind], wanted: Wanted, data: str) -> str:
    """The column of the images: the requested one, the one with bytes, or the one with a usual name.

    Raises:
        UsageError: it is missing, of another kind, or ambiguous.
    """
    if wanted.image is not None:
        _check(wanted.image, kinds, "image", data)
        if kinds[wanted.image] == "other":
            raise UsageError(f"--image-column {wanted.image}: it holds neither paths nor encoded images")
        return wanted.image
    stored = [name for name, kind in kinds.items() if kind == "bytes"]
    named = [name for name, kind in kinds.items() if kind == "text" and _plain(name) in _IMAGES]
    if len(stored) > 1:
        stored = [name for name in stored if _plain(name) in _IMAGES] or stored
    return _one(stored or named, kinds, "image", "image, path or file", data)


def label_column(kinds: Mapping[str, Kind], wanted: Wanted, data: str) -> str | None:
    """The column of the labels, or None; raises as :func:`image_column`."""
    if wanted.label is not None:
        _check(wanted.label, kinds, "label", data)
        return wanted.label
    named = [name for name, kind in kinds.items() if kind != "bytes" and _plain(name) in _LABELS]
    return _one(named, kinds, "label", "label or class", data) if named else None


def part_column(kinds: Mapping[str, Kind]) -> str | None:
    """The column that names the split, or None."""
    return next((name for name, kind in kinds.items() if kind == "text" and _plain(name) in _PARTS), None)


def told(image: str, label: str | None) -> str:
    """Describe the columns in use, for the line about a data set."""
    return f"column {image}, {f'labels in {label}' if label else 'and none called label or class'}"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _check(name: str, kinds: Mapping[str, Kind], what: str, data: str) -> None:
    if name not in kinds:
        raise UsageError(f"--{what}-column {name}: --data {data} has no such column; {_listed(kinds)}")


def _one(found: list[str], kinds: Mapping[str, Kind], what: str, names: str, data: str) -> str:
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--data {data}: {' and '.join(found)} may be the column meant; give --{what}-column")
    raise UsageError(f"--data {data} has no column {names}; {_listed(kinds)}: give --{what}-column")


def _listed(kinds: Mapping[str, Kind]) -> str:
    names = list(kinds)
    rest = f" and {len(names) - _TOLD:,} more" if len(names) > _TOLD else ""
    return f"its columns are {', '.join(names[:_TOLD])}{rest}" if names else "it has none"
