"""Cached copies of data without random access; they are made once, and found by the identity of the original."""

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
    """Identifies a file and its version: size, time, and its first and last bytes."""
    about = os.stat(path)
    digest = blake2b(f"{about.st_size} {about.st_mtime_ns} ".encode(), digest_size=16)
    with open(path, "rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, about.st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def root() -> Path:
    """The cache folder of all copies. Its content may be deleted between runs, and is made again."""
    return cache_root() / "copies"


def held() -> int:
    """Total size of the copies in bytes."""
    return sum(file.stat().st_size for file in root().rglob("*") if file.is_file())


def folder_of(*of: object) -> Path:
    """The cache folder for the copy with this identity."""
    return root() / blake2b(repr(of).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


_OTHER = "set XDG_CACHE_HOME to a folder on another disk"


def check_room(data: str, size: int) -> None:
    """Raise a UsageError if ``size`` bytes do not fit into the cache, or if it cannot be written."""
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
    """Return the copy at ``path``; ``write`` makes it if it does not exist.

    Args:
        data: value of ``--data``.
        path: path below :func:`folder_of`.
        size: size of the copy in bytes.
        write: function that writes the file at the given path.

    Raises:
        UsageError: there is not enough space, or it cannot be written.
    """
    if path.is_file():
        return path
    check_room(data, size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{os.getpid()}-{path.name}")  # another run may make the same copy
        write_whole(mine, write)
        os.replace(mine, path)
    except OSError as error:
        raise UsageError(
            f"--data {data} cannot be copied to {path.parent}: {error.strerror or error}; {_OTHER}"
        ) from None
    return path


def said(size: int) -> str:
    """Size and place of the copies, for the line about a data set."""
    return f"{in_words(size)} of it copied to {cache_root()}"
