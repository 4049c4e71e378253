"""Files that are no pictures, or broken ones: found before a run or while reading, named, and left out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastrm.data.sources import BROKEN, FileImages, Images, Source, reason
from fastrm.errors import UsageError
from fastrm.files import cache_root, write_text

SKIPPED = "skipped.txt"
MOST = 0.1  # share of broken files with which a run goes on


def fault(content: bytes) -> str | None:
    """Why a file cannot be read as a picture; None where it can. JPEGs are decoded at an eighth of their size."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except BROKEN as error:
        return reason(error)
    return None


def scan(source: Source, *, workers: int) -> tuple[Source, dict[Path, str]]:
    """Read every file, and return the source without the broken ones, and what is wrong with each of these.

    What was found is kept in the cache folder, and taken from there as long as no file's size or time has changed.

    Raises:
        UsageError: more than a tenth of the files are broken.
    """
    broken: dict[Path, str] = {}
    looked: set[Path] = set()
    sound: dict[int, Images] = {}

    def without_broken(images: Images | None) -> Images | None:
        if not isinstance(images, FileImages):
            return images
        if id(images) not in sound:  # the images for kNN may be those for training, or a part of them
            if not looked.issuperset(images.paths):
                faults = _faults(images, workers)
                check_share(len(faults), images, faults)
                broken.update(faults)
                looked.update(images.paths)
            kept = [i for i, path in enumerate(images.paths) if path not in broken]
            sound[id(images)] = images if len(kept) == len(images) else images.subset(np.array(kept, dtype=np.int64))
        return sound[id(images)]

    train = without_broken(source.train)
    assert train is not None
    return replace(source, train=train, bank=without_broken(source.bank), test=without_broken(source.test)), broken


def _faults(images: FileImages, workers: int) -> dict[Path, str]:
    from rich.progress import track

    digest = hashlib.sha256()
    for path in images.stored_in():
        state = path.stat()
        digest.update(f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    for path in images.paths:
        digest.update(os.fsencode(path))
    kept = cache_root() / "scans" / f"{digest.hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return {Path(path): str(why) for path, why in json.loads(kept.read_text(encoding="utf-8")).items()}

    def look(index: int) -> str | None:
        try:
            return fault(images.content(index))
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(max(1, workers)) as threads:  # Pillow decodes without holding the interpreter
        found: Iterable[str | None] = threads.map(look, range(len(images)))
        whys = list(track(found, "looking for broken files", total=len(images), transient=True))
    faults = {path: why for path, why in zip(images.paths, whys, strict=True) if why is not None}
    with contextlib.suppress(OSError, ValueError):  # where it cannot be kept, the next run looks again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps({str(path): why for path, why in faults.items()}))
    return faults


def report(broken: dict[Path, str], images: FileImages, faults: Mapping[int, str]) -> None:
    """Add to ``broken`` what was met while reading, by index, with a warning for each file that is new.

    Raises:
        UsageError: more than a tenth of the files are broken.
    """
    for index, why in faults.items():
        path = images.paths[index]
        if path not in broken:
            broken[path] = why
            warnings.warn(f"left out, since it cannot be read: {path} ({why})", stacklevel=2)
    check_share(len(broken), images, broken)


def check_share(count: int, images: FileImages, broken: Mapping[Path, str]) -> None:
    """Raise a UsageError if more than a tenth of the files are broken."""
    if count > MOST * len(images):
        first, why = next(iter(broken.items()))
        raise UsageError(
            f"--data: {count} of {len(images)} files are broken, more than a tenth; "
            f"the first is {first} ({why}); repair or remove them"
        )


def write_skipped(out: Path, broken: Mapping[Path, str]) -> None:
    """List broken files, a path and what is wrong with it a line, in ``skipped.txt`` under ``out``."""
    write_text(out / SKIPPED, "".join(f"{path}\t{why}\n" for path, why in broken.items()))
