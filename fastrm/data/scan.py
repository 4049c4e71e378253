"""Find files that are no pictures, or broken ones, before a run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from fastrm.data.sources import FileImages
from fastrm.errors import UsageError

SKIPPED = "skipped.txt"
MOST = 0.1  # share of broken files with which a run may start


def fault(path: Path) -> str | None:
    """Why a file cannot be read as a picture; None where it can. JPEGs are decoded at an eighth of their size."""
    try:
        with Image.open(path) as image:
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error) or type(error).__name__
    return None


def scan(images: FileImages, *, workers: int) -> tuple[FileImages, dict[Path, str]]:
    """Read every file, and return the sound ones with what is wrong with each of the others.

    Raises:
        UsageError: more than a tenth of the files are broken.
    """
    from rich.progress import track

    with ThreadPoolExecutor(max(1, workers)) as threads:  # Pillow decodes without holding the interpreter
        found: Iterable[str | None] = threads.map(fault, images.paths)
        faults = list(track(found, "looking for broken files", total=len(images), transient=True))
    broken = {path: why for path, why in zip(images.paths, faults, strict=True) if why is not None}
    if len(broken) > MOST * len(images):
        first, why = next(iter(broken.items()))
        raise UsageError(
            f"--data: {len(broken)} of {len(images)} files are broken, more than a tenth; "
            f"the first is {first} ({why}); repair or remove them"
        )
    return images.subset(np.array([i for i, why in enumerate(faults) if why is None], dtype=np.int64)), broken


def write_skipped(out: Path, broken: dict[Path, str]) -> None:
    """List broken files, a path and what is wrong with it a line, in ``skipped.txt`` under ``out``."""
    partial = out / f"{SKIPPED}.partial"
    partial.write_text("".join(f"{path}\t{why}\n" for path, why in broken.items()), encoding="utf-8")
    os.replace(partial, out / SKIPPED)
