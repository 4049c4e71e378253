"""Writes files atomically, and finds the folders for fastrm's own files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fastrm.errors import UsageError
from fastrm.machine.memory import exhausted

T = TypeVar("T")
_PASSING = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH} | {
    getattr(errno, name) for name in ("ESTALE", "EHOSTDOWN", "ENETDOWN", "EREMOTEIO") if hasattr(errno, name)
}
_PAUSES = (0.1, 0.5, 2.5)  # seconds


def write_whole(path: Path, write: Callable[[Path], object], *, before: Callable[[], object] = lambda: None) -> None:
    """Let ``write`` write a temporary file, and rename it to ``path`` once it is on the disk.

    ``before`` is called before the renaming, and may move an existing file away.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        before()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(out: Path, flag: str = "--out") -> Iterator[None]:
    """Report in one line why the path of ``--out``, or of another flag, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{flag} {out} cannot be written: {error.strerror or error}") from None


def check_folder(flag: str, out: Path) -> None:
    """Raise a UsageError if a file cannot be written because of its folder."""
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{flag} {out} cannot be written: the folder {out.parent} does not exist or is not writable")


def insistent(read: Callable[[], T]) -> T:
    """Call ``read``, and retry after a pause if the error is temporary, as on network file systems.

    Raises:
        OSError: the error is not temporary, or did not pass.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(pause)
    return read()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that :func:`write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


class _Patient:
    """A file that keeps the first error of a write, and accepts what follows."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        if self.error is None:
            try:
                rest = memoryview(content).cast("B")
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Do nothing: the file is not buffered."""


def save_tensors(content: Any, path: Path) -> None:
    """Write a file with torch.save, whose own writer hides why a write fails ("unexpected pos 64 vs 0").

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    import torch

    with open(path, "wb", buffering=0) as file:
        patient = _Patient(file)
        torch.save(content, patient)  # type: ignore[arg-type]
        if patient.error is not None:
            raise patient.error


class NotRead(list[Any]):
    """An object in a file that is not plain data, and whose class has been replaced by a subclass of this one."""

    kind = ""
    """The full name of its class."""

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


def load_tensors(path: Path, *, other_objects: bool = False) -> Any:
    """Read a file that torch.save wrote, to the CPU. Only plain data is read; no code in the file can run.

    Args:
        path: the file.
        other_objects: whether it may hold other objects too, each of which becomes a :class:`NotRead`.

    Raises:
        UsageError: there is no such file, or it is damaged or holds other objects that it may not.
    """
    import torch

    kinds: list[Any] = [(_plain_dict, "collections.defaultdict")] if other_objects else []
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(kinds):
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            if exhausted(error):
                raise
            why = error.strerror or str(error)
        except Exception as error:  # the unpickler raises errors of any type for damaged bytes
            if exhausted(error):
                raise
            # Not torch's own message, which suggests to let the file run its code.
            foreign = re.search(r"nsupported (global: )?GLOBAL (\S+)", str(error))
            why = "it has another format or is damaged"
            if foreign:
                name = foreign[2] if "." in foreign[2] else f"builtins.{foreign[2]}"
                if other_objects and foreign[1] and all(name != known for _, known in kinds):
                    kinds.append((type("NotRead", (NotRead,), {"kind": name}), name))
                    continue
                why = only_plain(name)
        raise UsageError(f"{path} cannot be read as a checkpoint: {why}")


def _plain_dict(*_: object) -> dict[Any, Any]:
    return {}


def only_plain(kind: str) -> str:
    """The message about an object of another class in a file."""
    return f"it holds {kind}, and only plain data is read"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; undecodable bytes in file names are preserved."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="surrogateescape"))


def as_utf8(text: str) -> str:
    """The text with undecodable bytes of file names escaped (``\\xff``), so that UTF-8 can encode it."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def at_home(value: T) -> T:
    """Expand ``~`` or ``~user`` in a path or its text, which a shell does not do in ``--flag=~/x``.

    Other values are returned unchanged; a tuple is expanded element by element.

    Raises:
        UsageError: there is no such user, or no home folder.
    """
    kept: Any = value
    if isinstance(value, tuple):
        kept = tuple(at_home(inner) for inner in value)
    elif isinstance(value, str | Path) and str(value).startswith("~"):
        try:
            kept = type(value)(Path(value).expanduser())
        except RuntimeError:
            raise UsageError(
                f"{value} cannot be found: there is no such user, or no home folder; ./{value} is the name itself"
            ) from None
    result: T = kept
    return result


def absent(path: Path) -> str:
    """Say that there is no file at a path, or that it is a URL, of which a path has one slash."""
    url = re.match(r"[a-z][a-z0-9+.-]+:/", str(path))
    return f"{path} is a URL; download the file, and give its path" if url else f"{path} does not exist"


def published_name(data: str) -> str:
    """The value of ``--data`` as files for others name it.

    It has no folder of this machine, and of a URL neither user and password nor the query, which may hold a key.
    """
    if "://" in data:
        return re.sub(r"(?<=://)[^/]*@", "", data.partition("?")[0])
    place = data.removeprefix("@").removeprefix("hf:")
    return Path(place).name if os.path.isabs(place) else data


def cache_root() -> Path:
    """The cache folder, for named sets and information about folders; also for users without a home folder."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the XDG Base Directory Specification ignores relative paths
        return Path(cache, "fastrm")
    return Path(home() or temporary(), ".cache", "fastrm")


def home() -> Path | None:
    """The user's home folder; None for a user without one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def temporary() -> Path:
    """A private folder of this user among the temporary files, the same one in each call if possible."""
    try:
        if hasattr(os, "getuid"):
            path = Path(tempfile.gettempdir(), f"fastrm-{os.getuid()}")
            with contextlib.suppress(OSError):
                path.mkdir(mode=0o700, exist_ok=True)
                state = path.lstat()  # another user may have created it, or a link, to inject files
                if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid():
                    return path
        return Path(tempfile.mkdtemp(prefix="fastrm-"))
    except OSError as error:
        raise UsageError(f"TMPDIR names no folder for temporary files: {error.strerror}") from None
