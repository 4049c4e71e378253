"""Files at a URL, through fsspec: each is copied into the cache once, and read from there.

Images are read in a new order in each epoch. Without copies, each image would be one request per epoch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fastrm.data.copies import check_room, copied, folder_of
from fastrm.data.patterns import expand
from fastrm.data.sources import natural
from fastrm.errors import UsageError, first_line
from fastrm.files import cache_root
from fastrm.machine.memory import exhausted
from fastrm.machine.memory import size as in_words
from fastrm.packages import optional
from fastrm.terminal.progress import tracked

_AT_ONCE = 4
_STATE = ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "checksum", "md5Hash")
"""Fields by which file systems report that a file has changed."""


class _File(NamedTuple):
    """A file at a URL."""

    system: Any
    name: str
    """Name in the file system; empty if it could not be queried."""
    size: int
    """Size in bytes; 0 if unknown."""
    copy: Path
    """Path of the copy, or of the file itself if it is local."""


def is_url(data: str) -> bool:
    """Whether ``--data`` is a URL."""
    scheme, found, _ = data.partition("://")
    return bool(found) and scheme.replace("+", "").replace("-", "").isalnum()


def fetched(data: str, endings: Iterable[str]) -> tuple[list[Path], str]:
    """The files at a URL, copied if they are not local, and a message for the user.

    Args:
        data: URL of a file or a folder, optionally with braces or ``*`` as in :mod:`fastrm.data.patterns`.
        endings: endings of the files to take from a folder; the first one that exists is used.

    Raises:
        UsageError: fsspec or the package for this kind of URL is missing, or a file cannot be reached or copied.
    """
    core = optional("fsspec.core", extra="remote", wanted_by=f"--data {data}")
    files = [file for url in expand(data) for file in _files(core, url, data, tuple(endings))]
    missing = [file for file in files if not file.copy.is_file()]
    total = sum(file.size for file in missing)
    if missing:
        check_room(data, total)
        text = f"copy of {len(missing):,} files, {in_words(total) if total else 'of unknown size'}, to {cache_root()}"
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            for _ in tracked(threads.map(lambda file: _fetch(data, file), missing), text, len(missing)):
                pass
    remote = [file for file in files if file.system is not None]
    held = sum(file.copy.stat().st_size for file in remote)
    notes = [f"{in_words(held)} copied to {cache_root()}"] if remote else []
    if unasked := sum(not file.name for file in files):
        notes.append(f"{unasked:,} files cannot be reached; their earlier copies are used")
    return [file.copy for file in files], "; ".join(notes)


def _files(core: Any, url: str, data: str, endings: tuple[str, ...]) -> list[_File]:
    kept: Path | None = None
    try:
        system, path = core.url_to_fs(url)
        kept = _kept(system, path)
        if "*" in path:
            names = sorted(system.glob(path), key=natural)
        elif path.lower().partition("?")[0].endswith(endings) or not system.isdir(path):
            names = [path]
        else:
            inside = [str(name) for name in system.ls(path, detail=False)]
            by_kind = ([name for name in inside if name.lower().endswith(ending)] for ending in endings)
            names = sorted(next(filter(None, by_kind), []), key=natural)
        if not names:
            raise UsageError(f"--data {data}: no file is at {url}")
        protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
        if "file" in protocols:
            return [_File(None, name, 0, Path(name)) for name in names]
        return [_remote(system, name) for name in names]
    except UsageError:
        raise
    except Exception as error:  # each file system has its own types of errors
        if exhausted(error):
            raise
        if kept and (copies := sorted(kept.glob("*/*"), key=lambda copy: copy.stat().st_mtime)):
            return [_File(core, "", 0, copies[-1])]
        why = "there is no such file" if isinstance(error, FileNotFoundError) else first_line(error)
        raise UsageError(f"--data {data}: {url} cannot be read: {why}") from None


def _kept(system: Any, name: str) -> Path:
    """The folder in the cache for copies of a file."""
    return folder_of("url", system.protocol, name)


def _remote(system: Any, name: str) -> _File:
    info = system.info(name)
    if info.get("type") == "directory":
        raise IsADirectoryError("it is a folder")
    state = repr([info.get(key) for key in _STATE])
    folder = _kept(system, name) / blake2b(state.encode(), digest_size=8).hexdigest()
    return _File(system, name, int(info.get("size") or 0), folder / os.path.basename(urlsplit(name).path))


def _fetch(data: str, file: _File) -> None:
    def write(partial: Path) -> None:
        try:
            file.system.get_file(file.name, str(partial))
        except Exception as error:
            if exhausted(error):
                raise
            raise UsageError(f"--data {data}: {file.name} cannot be copied: {first_line(error)}") from None
        if file.size not in (0, partial.stat().st_size):
            raise UsageError(f"--data {data}: {file.name} was cut off while it was copied; start again")

    copied(data, file.copy, file.size, write)
