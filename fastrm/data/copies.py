"""Copies in the cache of what cannot be read at random where it lies: made once, and found by what they are of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from fastrm.errors import UsageError
from fastrm.files import cache_root, write_whole
from fastrm.machine.memory import size as in_words

_SAMPLE = 2**16


def state(path: Path) -> str:
    """What tells a file from others and from itself before it was changed: size, time, and its first and last bytes."""
    about = os.stat(path)
    digest = blake2b(f"{about.st_size} {about.st_mtime_ns} ".encode(), digest_size=16)
    with open(path, "rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, about.st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def root() -> Path:
    """The folder in the cache that all copies are in. What is in it may be deleted between runs, and is made again."""
    return cache_root() / "copies"


def held() -> int:
    """How many bytes the copies take."""
    return sum(file.stat().st_size for file in root().rglob("*") if file.is_file())


def folder_of(*of: object) -> Path:
    """The folder in the cache that holds the copy of what these tell."""
    return root() / blake2b(repr(of).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


_OTHER = "set XDG_CACHE_HOME to a folder on another disk"


def check_room(data: str, size: int) -> None:
    """Raise a UsageError if ``size`` bytes do not fit where the cache is, or that cannot be written."""
    try:
        cache_root().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache_root()).free
    except OSError as error:
        raise UsageError(
            f"--data {data} cannot be copied to {cache_root()}: {error.strerror or error}; {_OTHER}"
        ) from None
    if free < size:
        old = f"delete {root()}, which holds {in_words(before)} of earlier copies, or " if (before := held()) else ""
        raise UsageError(
            f"--data {data} is copied to {cache_root()}, which takes {in_words(size)}, and {in_words(free)} are free; "
            f"{old}{_OTHER}"
        )


def copied(data: str, path: Path, size: int, write: Callable[[Path], object]) -> Path:
    """Return the copy at ``path``; where it is not there yet, let ``write`` make it.

    Args:
        data: what ``--data`` says.
        path: below :func:`folder_of`.
        size: how many bytes it takes.
        write: fills the file that it is given.

    Raises:
        UsageError: there is no room for it, or it cannot be written.
    """
    if path.is_file():
        return path
    check_room(data, size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{os.getpid()}-{path.name}")  # another run may copy the same
        write_whole(mine, write)
        os.replace(mine, path)
    except OSError as error:
        raise UsageError(
            f"--data {data} cannot be copied to {path.parent}: {error.strerror or error}; {_OTHER}"
        ) from None
    return path


def said(size: int) -> str:
    """How much is kept where, for the line about a data set."""
    return f"{in_words(size)} of it copied to {cache_root()}"
