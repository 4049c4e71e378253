"""Lists the images below a folder. Each folder is listed once, and everything that is skipped is counted."""

from __future__ import annotations

import bisect
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fastrm import own
from fastrm.data.paths import packed
from fastrm.data.sources import endings
from fastrm.errors import UsageError

_SYSTEM = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}
    | {"Thumbs.db", "desktop.ini"}
)
ARRAY = ".npy"
_SHEETS = (".png", ".jpg", ".jpeg")


@dataclass(eq=False, slots=True)
class Folder:
    """The content of one folder, without its subfolders' content."""

    path: Path
    inside: str
    """Path relative to the data folder; empty for the data folder."""
    changed: int
    """Modification time in nanoseconds, taken before the folder was listed."""
    names: bytes = b""
    """Names of its images in order, each followed by a NUL byte; a list would take five times the memory."""
    entries: int = 0
    """CRC-32 of the names of all its entries."""
    folders: list[Folder] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    """Number of skipped entries by kind."""
    is_run: bool = False
    is_report: bool = False

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    @property
    def shown(self) -> str:
        """Path as it is cached, with a NUL character in place of the data folder."""
        return "\0" + (os.sep + self.inside if self.inside else "")

    def __iter__(self) -> Iterator[Folder]:
        """Yield this folder and all folders below it, in the order of their names."""
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            yield folder
            waiting += reversed(folder.folders)

    @property
    def count(self) -> int:
        """Number of images in the folder itself."""
        return self.names.count(b"\0")

    @property
    def first(self) -> str:
        """Name of the first image in the folder itself."""
        return os.fsdecode(self.names.partition(b"\0")[0])

    @property
    def holds_images(self) -> bool:
        """Whether there is an image at any depth."""
        return any(folder.names for folder in self)

    @property
    def total(self) -> int:
        """Number of images at any depth."""
        return sum(folder.count for folder in self)

    def all_passed(self) -> Counter[str]:
        """Number of skipped entries by kind, at any depth."""
        return sum((folder.passed for folder in self), Counter())


class Listing(NamedTuple):
    """The content of a data folder."""

    top: Folder
    left_out: list[Folder]
    """Folders that are skipped with everything below them: runs and reports of fastrm."""
    nowhere: list[str]
    """Broken links without an image's ending, as paths relative to the folder."""
    sheets: list[str]
    """Names of skipped contact sheets of fastrm in the folder itself."""


def listed(root: Path) -> Listing:
    """List a folder and everything below it.

    A folder with several paths is listed once, at a path without links if there is one. Hidden files, system files and
    runs of fastrm are skipped.

    Raises:
        UsageError: a folder cannot be read.
    """
    state, real = os.stat(root), os.path.realpath(root)
    top = Folder(root, "", state.st_mtime_ns)
    reading = _Reading({(state.st_dev, state.st_ino)})
    reading.fill(top)
    while reading.links:
        parent, name = reading.links.popleft()
        path = parent.path / name
        target = os.path.realpath(path)
        if real.startswith(target.rstrip(os.sep) + os.sep) or (folder := reading.unseen(parent, name)) is None:
            parent.passed["links to folders listed already"] += 1
            continue
        bisect.insort(parent.folders, folder, key=lambda folder: folder.name)
        reading.fill(folder)
    left_out, sheets = _leave_out_runs(top), _leave_out_sheets(top)
    _leave_out_arrays(top)
    return Listing(top, left_out, reading.nowhere, sheets)


class _Reading:
    """Lists folders without following links to folders, which it collects."""

    def __init__(self, seen: set[tuple[int, int]]) -> None:
        self.seen, self.endings = seen, endings()
        self.links: deque[tuple[Folder, str]] = deque()
        self.nowhere: list[str] = []

    def fill(self, top: Folder) -> None:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder.path) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
                names = [entry.name for entry in found]
                folder.entries = checksum(names)
                held = set(names)
                folder.is_run = "config.json" in held and own.run(folder.path)
                folder.is_report = "index.html" in held and own.safely(own.page, folder.path / "index.html")
                if "pyvenv.cfg" in held:
                    folder.passed["Python environments"] += 1
                    continue
                folder.names = packed(entry.name for entry in found if self._is_image(folder, entry, waiting))
            except OSError as error:
                raise UsageError(f"--data: {folder.path} cannot be read: {error.strerror or error}") from None

    def unseen(self, parent: Folder, name: str) -> Folder | None:
        """The folder of this name; None if it was listed by another path."""
        path = parent.path / name
        state = os.stat(path)
        if (state.st_dev, state.st_ino) in self.seen:
            return None
        self.seen.add((state.st_dev, state.st_ino))
        return Folder(path, os.path.join(parent.inside, name), state.st_mtime_ns)

    def _is_image(self, folder: Folder, entry: os.DirEntry[str], waiting: list[Folder]) -> bool:
        """Whether an entry is an image; other entries are counted, or added to folders, links or shards."""
        if entry.name.startswith("."):
            folder.passed["hidden"] += 1
        elif entry.name in _SYSTEM:
            folder.passed["system files"] += 1
        elif entry.is_dir(follow_symlinks=False):
            inner = self.unseen(folder, entry.name)
            if inner is None:  # a second mount of a folder, or a junction
                folder.passed["links to folders listed already"] += 1
            else:
                folder.folders.append(inner)
                waiting.append(inner)
        elif entry.is_symlink() and os.path.isdir(entry.path):
            self.links.append((folder, entry.name))
        else:
            ending = os.path.splitext(entry.name)[1].lower()
            nowhere = entry.is_symlink() and not os.path.exists(entry.path)
            if nowhere and ending not in self.endings:  # the scan reports broken links to images
                folder.passed["broken links"] += 1
                self.nowhere.append(os.path.join(folder.inside, entry.name))
            elif not nowhere and not entry.is_file():
                folder.passed["special files"] += 1
            elif ending == ".tar":
                folder.shards.append(folder.path / entry.name)
            elif ending not in self.endings and ending != ARRAY:
                folder.passed[ending or "without an ending"] += 1
            else:
                return True
        return False


def checksum(names: list[str]) -> int:
    """CRC-32 of the sorted names of a folder's entries."""
    return zlib.crc32(packed(names))


def _leave_out_runs(top: Folder) -> list[Folder]:
    """Remove run folders, folders called ``runs`` that hold some, and reports, because they are not data."""
    left_out = []
    for folder in top:
        for inner in list(folder.folders):
            runs = [below for below in inner if below.is_run] if inner.name == "runs" else []
            if inner.is_run or runs:
                folder.passed["runs of fastrm"] += max(1, len(runs))
            elif inner.is_report:
                folder.passed["reports of fastrm"] += 1
            else:
                continue
            folder.folders.remove(inner)
            left_out.append(inner)
    return left_out


def _leave_out_sheets(top: Folder) -> list[str]:
    """Remove contact sheets, which are often written into the data folder itself."""
    names = [os.fsdecode(name) for name in top.names.split(b"\0")[:-1]]
    sheets = [name for name in names if is_sheet(top.path / name)]
    if sheets:
        top.names = packed(name for name in names if name not in sheets)
        top.passed["contact sheets of fastrm"] += len(sheets)
    return sheets


def _leave_out_arrays(top: Folder) -> None:
    """Remove arrays if there are other images: then arrays hold labels or features. Otherwise they are the images."""
    mark = f"{ARRAY}\0".encode()
    counts = [folder.names.lower().count(mark) for folder in top]
    if sum(counts) == top.total:
        return
    for folder, count in zip(top, counts, strict=True):
        if count:
            folder.passed[ARRAY] += count
            names = [os.fsdecode(name) for name in folder.names.split(b"\0")[:-1]]
            folder.names = packed(name for name in names if not name.lower().endswith(ARRAY))


def is_sheet(path: Path) -> bool:
    """Whether an image is a contact sheet of fastrm.data. Old sheets have no mark; their name is views.png."""
    return path.name == "views.png" or (path.suffix.lower() in _SHEETS and own.safely(own.sheet, path))
