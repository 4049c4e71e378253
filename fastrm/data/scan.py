"""Finds files that are broken or not images, before a run or while reading, and leaves them out."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import features

from fastrm.data import decode, stored
from fastrm.data.decode import BROKEN, BrokenImage, reason
from fastrm.data.encoded import EncodedImages
from fastrm.data.looks import FAULTY, LOST, SOUND, UNKNOWN, Looks, empty, looks, views
from fastrm.data.sources import Images, Source
from fastrm.data.stored import DTYPES, Look, examined
from fastrm.errors import UsageError
from fastrm.files import write_text
from fastrm.packages import failure
from fastrm.terminal.progress import bar

T = TypeVar("T")
SKIPPED = "skipped.txt"
MOST = 0.1  # largest fraction of broken files with which a run continues
_IN_A_ROW = 100
_AT_ONCE = 4  # files per task of a thread: little overhead for small images, and few to wait for at the end


class _Found(NamedTuple):
    """The result of checking a file."""

    row: int
    state: int
    why: str = ""
    """What is wrong with the file."""
    look: Look | None = None


def scan(source: Source, *, workers: int) -> tuple[Source, dict[str, str]]:
    """Read every file, and return the source without the broken ones, with the reason for each of these.

    Results are cached, and reused as long as the size and time of the files are unchanged.

    Raises:
        UsageError: more than a tenth of the files are broken.
    """
    broken: dict[str, str] = {}
    sound: dict[int, Images] = {}
    searches: dict[int, _Search] = {}

    def without_broken(images: Images | None) -> Images | None:
        if not isinstance(images, EncodedImages):
            return images
        if id(images) not in sound:  # the images for kNN may be those for training, or a part of them
            search = searches.get(id(images.table)) or _Search(images)
            searches[id(images.table)] = search
            fresh = search.look(images, workers)
            state = search.looks.state[images.rows]
            faults = {images.name(i): search.why[images.row(i)] for i in np.flatnonzero(state != SOUND).tolist()}
            if fresh:
                check_share(len(faults), images, faults)
            broken.update(faults)
            sound[id(images)] = images.subset(np.flatnonzero(state == SOUND)) if faults else images
        return sound[id(images)]

    try:
        train = without_broken(source.train)
        assert train is not None
        kept = replace(source, train=train, bank=without_broken(source.bank), test=without_broken(source.test))
    finally:
        for search in searches.values():
            search.keep()
    return kept, broken


class _Search:
    """New and earlier results about the files of a set.

    Args:
        images: the images of the set that are checked first.
    """

    def __init__(self, images: EncodedImages) -> None:
        images.renew()
        self._table, self._rules = images.table, _rules()
        known = looks(self._table, self._rules) is not None
        self._column = self._table["looks"] if known else empty(self._table.rows)
        self.why = {int(row): why for row, why in self._table.about["faults"].items()} if known else {}
        self._seen = np.zeros(self._table.rows, dtype=bool)
        self._new = False

    @property
    def looks(self) -> Looks:
        """Results for all images of the set."""
        return views(self._column)

    def look(self, images: EncodedImages, workers: int) -> bool:
        """Check images without a result; return whether some of these images are new here."""
        fresh = not bool(self._seen[images.rows].all())
        state = self.looks.state[images.rows]
        left = np.flatnonzero(((state == UNKNOWN) | (state == LOST)) & ~self._seen[images.rows])
        self._seen[images.rows] = True
        if len(left):
            if not self._new:
                self._column, self._new = self._column.copy(), True
            with bar(f"search for broken files among {len(left):,}", len(left)) as task:
                looks = self.looks
                for some in _together(images, left, workers):
                    for found in some:
                        self._note(found, looks)
                    task.advance(len(some))
        return fresh

    def _note(self, found: _Found, looks: Looks) -> None:
        row, look = found.row, found.look
        looks.state[row] = found.state
        if look is not None:
            looks.size[row], looks.bands[row], looks.pages[row] = look.size, look.bands, look.pages
            looks.dtype[row] = DTYPES.index(look.dtype)
        self.why.pop(row, None)
        if found.why:
            self.why[row] = found.why

    def keep(self) -> None:
        """Store new results for the next start."""
        if self._new:
            why = {str(row): why for row, why in self.why.items()}  # as JSON has it
            self._table.keep({"looks": self._column}, {"rules": self._rules, "faults": why})


def _together(images: EncodedImages, indices: NDArray[np.int64], workers: int) -> Iterator[list[_Found]]:
    """Check images in threads, with a bounded number of waiting results."""

    def look(some: NDArray[np.int64]) -> list[_Found]:
        return [_looked_at(images, index) for index in some.tolist()]

    parts = (indices[at : at + _AT_ONCE] for at in range(0, len(indices), _AT_ONCE))
    with ThreadPoolExecutor(max(1, workers)) as threads:  # Pillow decodes without holding the interpreter
        waiting = deque(threads.submit(look, some) for some in itertools.islice(parts, 4 * max(1, workers)))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(threads.submit(look, some) for some in itertools.islice(parts, 1))


def _looked_at(images: EncodedImages, index: int) -> _Found:
    row = images.row(index)
    try:
        content = images.content(index)
    except OSError as error:
        return _Found(row, LOST, reason(error))
    except BrokenImage as error:
        return _Found(row, FAULTY, str(error))
    try:
        return _Found(row, SOUND, look=examined(content))
    except BrokenImage as error:
        return _Found(row, FAULTY, str(error))


def _rules() -> str:
    """A digest of the decoders and rules; if it changes, files are checked again."""
    digest = hashlib.sha256(f"{PIL.__version__}\0{sorted(features.get_supported())}\0".encode())
    digest.update(str([failure(name) is None for name in ("tifffile", "imagecodecs")]).encode())
    for rules in (decode, stored):
        digest.update(inspect.getsource(rules).encode())
    return digest.hexdigest()[:32]


def report(broken: dict[str, str], images: Images, faults: Mapping[int, str]) -> None:
    """Add the faults found while reading to ``broken``, with a warning for each new file.

    Raises:
        UsageError: more than a tenth of the files are broken.
    """
    for index, why in faults.items():
        name = images.name(index)
        if name not in broken:
            broken[name] = why
            warnings.warn(f"left out, since it cannot be read: {name} ({why})", stacklevel=2)
    check_share(len(broken), images, broken)


def require_readable(flag: str, images: Images, indices: Iterable[int]) -> None:
    """Raise a UsageError that names the first of some images that cannot be read.

    Args:
        flag: the setting that they are from.
        images: all images.
        indices: the indices of those.
    """
    for index in indices:
        try:
            images.pixels(index)
        except BROKEN as error:
            raise UsageError(f"{flag} {images.name(index)} cannot be used: {reason(error)}") from None


def readable(images: Images, index: int, read: Callable[[int], T], faults: dict[int, str]) -> tuple[int, T]:
    """Apply ``read`` to an index or, if that raises one of ``BROKEN``, to the next index that works.

    Args:
        images: images of the indices.
        index: index of the requested image.
        read: function to apply.
        faults: gets the reasons for the skipped images, by index.

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


def counted(broken: Mapping[str, str]) -> str:
    """The number of broken files and the first of them, in words."""
    first, why = next(iter(broken.items()))
    return f"{len(broken)} broken files; the first is {first} ({why})"


def unreadable(source: Source) -> dict[str, str]:
    """Images of a source that could not be read since the scan, in this process, with the reason."""
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
    """Add the faults found while reading to ``broken``, and to the list under ``out``."""
    if not met.keys() <= broken.keys():
        broken.update(met)
        write_skipped(out, broken)


def write_skipped(out: Path, broken: Mapping[str, str]) -> None:
    """Write broken images to ``skipped.txt`` under ``out``, one line with name and reason per image."""
    write_text(out / SKIPPED, "".join(f"{name}\t{why}\n" for name, why in broken.items()))
