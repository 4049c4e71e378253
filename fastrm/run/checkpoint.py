"""The checkpoints that a run resumes from.

``checkpoint.pt`` is the newest, and ``checkpoint-STEP.pt`` are earlier ones. A new checkpoint is written beside them,
and renamed once it is safely on the disk; at any time a complete one exists.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrm.data.formats import PixelFormat
from fastrm.errors import UsageError, first_line
from fastrm.files import absent, load_tensors
from fastrm.machine.memory import exhausted

NAME = "checkpoint.pt"
FORMAT = 3
CONTENT = {"config": dict, "step": int, "random": list, "method": dict}


def older(out: Path) -> list[tuple[int, Path]]:
    """(step, file) of the earlier checkpoints, latest first."""
    found = ((re.fullmatch(r"checkpoint-(\d+)\.pt", path.name), path) for path in out.glob("checkpoint-*.pt"))
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def own(out: Path) -> list[Path]:
    """The checkpoints in a run folder, newest first."""
    return [file for file in (out / NAME, *(file for _, file in older(out))) if file.is_file()]


def locate(path: Path) -> Path:
    """Return the checkpoint of a path: the newest of a run folder, or the file itself.

    Raises:
        UsageError: there is none.
    """
    if path.is_dir():
        if not (found := own(path)):
            raise UsageError(f"{path} has no {NAME}")
        return found[0]
    if not path.is_file():
        raise UsageError(absent(path))
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU. Only plain data is read; no code in the file can run.

    Raises:
        UsageError: there is no such file, or it is damaged or not a checkpoint of fastrm.
    """
    found = locate(path)
    hint = "weights of other programs need --arch, timm's name of the network"
    try:
        state = load_tensors(found)
    except UsageError as error:
        raise UsageError(f"{error}; {hint}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"{found} is not a checkpoint of this version of fastrm; {hint}")
    wrong = [name for name, kind in CONTENT.items() if not isinstance(state.get(name), kind)]
    if wrong or state["step"] < 0:
        raise UsageError(f"{found} is damaged: it has no valid {wrong[0] if wrong else 'step'!r}")
    if state.pop("checksum", None) != checksum(state):
        raise UsageError(f"{found} is damaged: its checksum does not match its content")
    return state


class Glance(NamedTuple):
    """Information in a checkpoint that can be read without its tensors."""

    format: PixelFormat | None
    """The format of the run's images; None if a callable makes the views."""
    batch: int | None
    """Images per optimizer step over all processes."""


def glanced(path: Path) -> Glance | None:
    """Read this information from a checkpoint; None if it cannot be read, which is reported when it is loaded."""
    try:
        state = torch.load(locate(path), mmap=True, weights_only=True, map_location="cpu")
        format, batch = PixelFormat.of(state.get("pixels")), state["config"].get("batch_size")
    except Exception:  # torch raises various errors for damaged or foreign files
        return None
    return Glance(format if format.limits else None, batch if isinstance(batch, int) else None)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Report in one line that the content of a checkpoint does not fit what its settings build."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if exhausted(error):
            raise
        raise UsageError(f"{path} does not fit its own settings: {first_line(error)}") from None


def checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 of the whole content of a checkpoint, by name, in order."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                digest.update(repr(name).encode())
                add(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()
