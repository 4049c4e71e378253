"""Files that are no pictures, or broken ones: found before a run or while reading, named, and left out."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL
from PIL import features

from fastrm.data import decode, stored
from fastrm.data.decode import BROKEN, BrokenImage, reason
from fastrm.data.encoded import EncodedImages
from fastrm.data.sources import Images, Source
from fastrm.data.stored import examined
from fastrm.errors import UsageError
from fastrm.files import cache_root, write_text
from fastrm.terminal.progress import tracked

T = TypeVar("T")
SKIPPED = "skipped.txt"
MOST = 0.1  # share of broken files with which a run goes on
_IN_A_ROW = 100


class _Found(NamedTuple):
    """What a look at a file gave."""

    why: str | None = None
    """What is wrong with it."""
    passing: bool = False
    """Whether the disk failed, which may be over the next time."""
    several: bool = False
    """Whether it holds more pictures than the one that is read."""


def scan(source: Source, *, workers: int) -> tuple[Source, dict[str, str]]:
    """Read every file, and return the source without the broken ones, and what is wrong with each of these.

    What was found is kept in the cache folder, and taken from there as long as no file's size or time has changed.

    Raises:
        UsageError: more than a tenth of the files are broken.
    """
    broken: dict[str, str] = {}
    looked: set[str] = set()
    further = 0
    sound: dict[int, Images] = {}

    def without_broken(images: Images | None) -> Images | None:
        nonlocal further
        if not isinstance(images, EncodedImages):
            return images
        if id(images) not in sound:  # the images for kNN may be those for training, or a part of them
            names = [images.name(index) for index in range(len(images))]
            if not looked.issuperset(names):
                found = _looked_at(images, workers)
                faults = {name: look.why for name, look in zip(names, found, strict=True) if look.why}
                further += sum(look.several for look in found)
                check_share(len(faults), images, faults)
                broken.update(faults)
                looked.update(names)
            kept = [i for i, name in enumerate(names) if name not in broken]
            sound[id(images)] = images if len(kept) == len(images) else images.subset(np.array(kept, dtype=np.int64))
        return sound[id(images)]

    train = without_broken(source.train)
    assert train is not None
    kept = replace(source, train=train, bank=without_broken(source.bank), test=without_broken(source.test))
    if further:
        kept = replace(kept, about=f"{kept.about}; {further:,} files hold several pictures, of which the first is read")
    return kept, broken


def _looked_at(images: EncodedImages, workers: int) -> list[_Found]:
    found: dict[int, _Found] = {}
    kept = cache_root() / "scans" / f"{_state(images)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        read = {int(index): _Found(*look) for index, look in json.loads(kept.read_text(encoding="utf-8")).items()}
        found = {index: read.get(index, _Found()) for index in range(len(images))}
    left = [index for index in range(len(images)) if index not in found or found[index].passing]

    def look(index: int) -> _Found:
        try:
            content = images.content(index)
        except OSError as error:
            return _Found(reason(error), passing=True)
        except BrokenImage as error:
            return _Found(str(error))
        try:
            return _Found(several=examined(content).pages > 1)
        except BrokenImage as error:
            return _Found(str(error))

    if left:
        with ThreadPoolExecutor(max(1, workers)) as threads:  # Pillow decodes without holding the interpreter
            looks: Iterable[_Found] = threads.map(look, left)
            shown = tracked(looks, f"search for broken files among {len(left):,}", len(left))
            found |= zip(left, shown, strict=True)
        told = {index: look for index, look in found.items() if look != _Found()}
        with contextlib.suppress(OSError, ValueError):  # where it cannot be kept, the next run looks again
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(told))
    return [found[index] for index in range(len(images))]


def _state(images: EncodedImages) -> str:
    """A digest of the files, of what they are read with and of the rules; when it changes they are looked at again."""
    digest = hashlib.sha256(f"{PIL.__version__}\0{sorted(features.get_supported())}\0".encode())
    for rules in (decode, stored):
        digest.update(inspect.getsource(rules).encode())
    for path in images.stored_in():
        try:
            state = path.stat()
            about = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0"
        except (OSError, RuntimeError) as error:  # a link that leads nowhere, or round in a circle
            about = f"{path}\0{reason(error)}\0"
        digest.update(about.encode(errors="surrogateescape"))
    for index in range(len(images)):
        digest.update(os.fsencode(images.name(index)) + b"\0")
    return digest.hexdigest()[:32]


def report(broken: dict[str, str], images: Images, faults: Mapping[int, str]) -> None:
    """Add to ``broken`` what was met while reading, by index, with a warning for each file that is new.

    Raises:
        UsageError: more than a tenth of the files are broken.
    """
    for index, why in faults.items():
        name = images.name(index)
        if name not in broken:
            broken[name] = why
            warnings.warn(f"left out, since it cannot be read: {name} ({why})", stacklevel=2)
    check_share(len(broken), images, broken)


def readable(images: Images, index: int, read: Callable[[int], T], faults: dict[int, str]) -> tuple[int, T]:
    """Apply ``read`` to an index, or where that raises one of ``BROKEN`` to the next one where it does not.

    Args:
        images: that the indices are of.
        index: of the image that is wanted.
        read: what is done.
        faults: gets what is wrong with the others, by index.

    Raises:
        UsageError: more than a tenth of the images cannot be read, or a hundred in a row.
    """
    found: dict[str, str] = {}
    for step in range(len(images)):
        at = (index + step) % len(images)
        try:
            return at, read(at)
        except BROKEN as error:
            faults[at] = found[images.name(at)] = reason(error)
        check_share(len(found), images, found)
        if step + 1 == _IN_A_ROW:
            break
    first, why = next(iter(found.items()))
    raise UsageError(f"--data: {len(found)} {images.NOUN} in a row cannot be read; the first is {first} ({why})")


def unreadable(source: Source) -> dict[str, str]:
    """What could not be read of any of a source's images since the scan, in this process."""
    every = (images for images in (source.train, source.bank, source.test) if images is not None)
    return {images.name(index): why for images in every for index, why in images.unreadable.items()}


def check_share(count: int, images: Images, broken: Mapping[str, str]) -> None:
    """Raise a UsageError if more than a tenth of the images are broken."""
    if count > MOST * len(images):
        first, why = next(iter(broken.items()))
        raise UsageError(
            f"--data: {count} of {len(images)} {images.NOUN} are broken, more than a tenth; "
            f"the first is {first} ({why}); repair or remove them"
        )


def list_further(out: Path, broken: dict[str, str], met: Mapping[str, str]) -> None:
    """Add what was met while reading to ``broken``, and to the list of it under ``out``."""
    if not met.keys() <= broken.keys():
        broken.update(met)
        write_skipped(out, broken)


def write_skipped(out: Path, broken: Mapping[str, str]) -> None:
    """List broken images, a name and what is wrong with it a line, in ``skipped.txt`` under ``out``."""
    write_text(out / SKIPPED, "".join(f"{name}\t{why}\n" for name, why in broken.items()))
