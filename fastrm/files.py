"""Files that appear whole or not at all, and where fastrm keeps its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastrm.errors import UsageError


def write_whole(path: Path, write: Callable[[Path], object], *, before: Callable[[], object] = lambda: None) -> None:
    """Let ``write`` fill a file beside ``path``, and give it that name once it is safely on the disk.

    ``before`` is called when it is, and may move what has the name.
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
def writing(out: Path) -> Iterator[None]:
    """Say in one line why what ``--out`` names cannot be written."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}") from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def load_tensors(path: Path) -> Any:
    """Read what torch.save wrote, onto the CPU. Only plain data is read: no code in the file can run.

    Raises:
        UsageError: there is no such file, or it is damaged or holds more than plain data.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead the reader of pickles to errors of every kind
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} cannot be read as a checkpoint: {first_line[:200]}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole; file names that are no text keep their bytes."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="surrogateescape"))


def as_utf8(text: str) -> str:
    """The same text, where bytes of a file's name that are no text are spelled out (``\\xff``): what UTF-8 can hold."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def cache_root() -> Path:
    """Where named sets and what was found out about folders are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastrm"
