"""Which image files are below a folder, and what else is: found once, each folder once, nothing dropped unsaid."""

from __future__ import annotations

import bisect
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastrm import own
from fastrm.data.sources import endings
from fastrm.errors import UsageError

_SYSTEM = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}
    | {"Thumbs.db", "desktop.ini"}
)
ARRAY = ".npy"
_SHEETS = (".png", ".jpg", ".jpeg")


@dataclass(eq=False)
class Folder:
    """What is directly in a folder."""

    path: Path
    images: list[Path] = field(default_factory=list)
    folders: list[Folder] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    """What is passed over, by kind."""
    is_run: bool = False
    is_report: bool = False

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name

    def __iter__(self) -> Iterator[Folder]:
        """This folder and all below it, in the order of their names."""
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            yield folder
            waiting += reversed(folder.folders)

    @property
    def holds_images(self) -> bool:
        """Whether there is an image at any depth."""
        return any(folder.images for folder in self)

    def below(self) -> list[Path]:
        """Images at any depth."""
        return [path for folder in self for path in folder.images]

    def all_passed(self) -> Counter[str]:
        """What is passed over at any depth."""
        return sum((folder.passed for folder in self), Counter())


def listed(root: Path) -> Folder:
    """List a folder, with all that is below it.

    A folder that several paths lead to is listed once, at a path without links if there is one. Left out are hidden
    and system files, and runs of fastrm.

    Raises:
        UsageError: a folder cannot be read.
    """
    top, real = Folder(root), os.path.realpath(root)
    seen = {_identity(root)}
    links: deque[tuple[Folder, Path]] = deque()
    reading = _Reading(links, seen)
    reading.fill(top)
    while links:
        parent, path = links.popleft()
        target = os.path.realpath(path)
        if real.startswith(target.rstrip(os.sep) + os.sep) or _identity(path) in seen:
            parent.passed["links to folders that are in it already"] += 1
            continue
        seen.add(_identity(path))
        folder = Folder(path)
        bisect.insort(parent.folders, folder, key=lambda folder: folder.name)
        reading.fill(folder)
    _leave_out_runs(top)
    _leave_out_arrays(top)
    return top


class _Reading:
    """Reads folders without following links, which it collects."""

    def __init__(self, links: deque[tuple[Folder, Path]], seen: set[tuple[int, int]]) -> None:
        self.links, self.seen, self.endings = links, seen, endings()

    def fill(self, top: Folder) -> None:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(folder.path) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
                names = {entry.name for entry in found}
                folder.is_run = "config.json" in names and own.run(folder.path)
                folder.is_report = "index.html" in names and own.safely(own.page, folder.path / "index.html")
                if "pyvenv.cfg" in names:
                    folder.passed["Python environments"] += 1
                    continue
                for entry in found:
                    self._sort_in(folder, entry, waiting)
            except OSError as error:
                raise UsageError(f"--data: {folder.path} cannot be read: {error.strerror or error}") from None

    def _sort_in(self, folder: Folder, entry: os.DirEntry[str], waiting: list[Folder]) -> None:
        path = folder.path / entry.name
        if entry.name.startswith("."):
            folder.passed["hidden"] += 1
        elif entry.name in _SYSTEM:
            folder.passed["of the system"] += 1
        elif entry.is_dir(follow_symlinks=False):
            if _identity(path) in self.seen:  # a mount of what is there already, or a junction
                folder.passed["links to folders that are in it already"] += 1
                return
            self.seen.add(_identity(path))
            folder.folders.append(Folder(path))
            waiting.append(folder.folders[-1])
        elif entry.is_symlink() and os.path.isdir(path):
            self.links.append((folder, path))
        else:
            ending = os.path.splitext(entry.name)[1].lower()
            nowhere = entry.is_symlink() and not os.path.exists(path)
            if nowhere and ending not in self.endings:  # such an image is found to be broken by the scan
                folder.passed["links that lead nowhere"] += 1
            elif not nowhere and not entry.is_file():
                folder.passed["special files"] += 1
            elif ending == ".tar":
                folder.shards.append(path)
            elif ending not in self.endings and ending != ARRAY:
                folder.passed[ending or "without an ending"] += 1
            else:
                folder.images.append(path)


def _identity(path: Path) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_dev, state.st_ino


def _leave_out_runs(top: Folder) -> None:
    """Take out runs of fastrm, with the folder ``runs`` that they lie in, reports and contact sheets: no data."""
    for folder in top:
        for inner in list(folder.folders):
            runs = [below for below in inner if below.is_run] if inner.name == "runs" else []
            if inner.is_run or runs:
                folder.folders.remove(inner)
                folder.passed["runs of fastrm"] += max(1, len(runs))
            elif inner.is_report:
                folder.folders.remove(inner)
                folder.passed["reports of fastrm"] += 1
    for sheet in [path for path in top.images if is_sheet(path)]:
        top.images.remove(sheet)
        top.passed["contact sheets of fastrm"] += 1


def _leave_out_arrays(top: Folder) -> None:
    """Beside pictures, arrays are labels, features and the like; alone they are the pictures."""
    if all(path.suffix.lower() == ARRAY for folder in top for path in folder.images):
        return
    for folder in top:
        kept = [path for path in folder.images if path.suffix.lower() != ARRAY]
        if len(kept) < len(folder.images):
            folder.passed[ARRAY] += len(folder.images) - len(kept)
            folder.images = kept


def is_sheet(path: Path) -> bool:
    """Whether a picture is a contact sheet of fastrm.data; before they were marked, it was called views.png."""
    return path.name == "views.png" or (path.suffix.lower() in _SHEETS and own.safely(own.sheet, path))
