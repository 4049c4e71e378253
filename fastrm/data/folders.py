"""Folders of images: which files are images, what their labels are, and which are for validation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastrm.data.sources import FileImages, Source, endings, without_validation
from fastrm.errors import UsageError


def _files_below(folder: Path) -> list[Path]:
    """Image files at any depth, in a fixed order; hidden files and folders are passed over."""
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(base, name)
            for name in sorted(files)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in endings()
        ]
    return found


def _labelled(folder: Path, classes: Sequence[str] | None = None) -> tuple[FileImages, list[str]]:
    """Images below ``folder``, labelled by its subfolders if they are two or more that hold all the images."""
    paths = _files_below(folder)
    tops = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in paths]
    found = sorted(set(tops))
    if len(found) < 2 or "" in found:
        return FileImages(paths, None), []
    known = list(classes or found)
    if unknown := set(found) - set(known):
        raise UsageError(
            f"--data: {folder} has classes that the training images have not: {', '.join(sorted(unknown))}"
        )
    return FileImages(paths, np.array([known.index(top) for top in tops], dtype=np.int64)), known


def open_folder(folder: Path) -> Source:
    """Open a folder in one of the three layouts."""
    base = folder / "train" if (folder / "train").is_dir() else folder
    train, classes = _labelled(base)
    if len(train) == 0:
        raise UsageError(f"--data {folder} holds no image; looked below {base} for {', '.join(sorted(endings()))}")
    name = folder.resolve().name or "data"
    about = f"{len(train):,} images in {base}"
    if classes and base != folder and (folder / "val").is_dir():
        test, _ = _labelled(folder / "val", classes)
        if test.labels is not None:
            about += f", {len(classes)} classes; {len(test):,} for validation"
            return Source(name=name, train=train, bank=train, test=test, about=about)
    return without_validation(name, train, about, {})
