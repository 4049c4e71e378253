"""The run folder: one run at a time uses it, foreign files are not touched, and a fresh run removes old results."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from fastrm import own
from fastrm.errors import UsageError
from fastrm.files import as_utf8, write_json, writing
from fastrm.machine.distributed import gather_objects, world
from fastrm.machine.lock import Lock


@contextmanager
def held(out: Path) -> Iterator[Lock]:
    """Hold a run folder exclusively. Enter this in all processes; the first one holds the lock.

    Raises:
        UsageError: the folder has files that fastrm would overwrite but did not write, another run holds it, or it
            cannot be created. All processes raise it, and nothing was written.
    """
    lock, problem = Lock(out), None
    if world().rank == 0:
        try:
            claim(out)
            with writing(out):
                lock.acquire()
        except UsageError as error:
            problem = str(error)
    try:
        if (problem := gather_objects(problem)[0]) is not None:
            raise UsageError(problem)
        yield lock
    finally:
        lock.release()


def claim(out: Path) -> None:
    """Raise a UsageError if ``out`` has a file or folder with a name that fastrm uses but that fastrm did not write."""
    if as_utf8(str(out)) != str(out):
        raise UsageError(f"--out {as_utf8(str(out))} is not valid UTF-8, which TensorBoard and the profiler need")
    with writing(out):
        if out.exists():
            for path, wrote in own.names(out):
                own.require("--out", out, wrote, holds=path)


def prepare(out: Path, settings: dict[str, Any], *, fresh: bool) -> None:
    """Write ``config.json`` into a folder that is held; a fresh run replaces an older one."""
    with writing(out):
        if fresh:
            board = out / own.TENSORBOARD
            old = [path for path, _ in own.names(out) if not path.is_dir()]
            old += [path for path in board.iterdir() if own.events(path)] if board.is_dir() else []
            exports = list((out / own.EXPORTS).rglob("*"))
            old += [path for path in exports if path.is_file() and own.safely(own.of_export, path)]
            for path in old:
                path.unlink()
            for folder in (board, *(path for path in exports if path.is_dir()), out / own.EXPORTS):
                with contextlib.suppress(OSError):  # it stays if it has other content
                    folder.rmdir()
        written = ("checkpoint.pt", "backbone.safetensors", "summary.json", "metrics.jsonl", "skipped.txt")
        for name in (*written, own.BEST, own.BEST_SCORE):
            (out / f".{name}.partial").unlink(missing_ok=True)  # left incomplete by a killed run
        write_json(out / "config.json", settings)


def short_of_space(out: Path, method: nn.Module, keep: int) -> str | None:
    """A warning for the start of the run if its checkpoints may not fit on the disk.

    One more checkpoint is written before the oldest is removed. The optimizer state is estimated as one copy of the
    trained weights.
    """
    size = sum(value.numel() * value.element_size() for value in method.state_dict().values())
    size += sum(weight.numel() * weight.element_size() for weight in method.parameters() if weight.requires_grad)
    there = sum(path.name.startswith("checkpoint") for path, _ in own.names(out))
    needed, free = size * max(1, keep + 1 - there), shutil.disk_usage(out).free
    if needed <= free:
        return None
    return f"--out {out} has {free / 1e6:,.0f} MB left, and its checkpoints need about {needed / 1e6:,.0f} MB more"
