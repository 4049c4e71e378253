"""The run folder: no file of others is touched, one run at a time has it, and a fresh run clears its own away."""

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
    """Have a run folder to oneself; to be entered in all processes, of which the first holds the lock.

    Raises:
        UsageError: the folder holds what fastrm would write over and did not write, another run has it, or it cannot
            be made. It is raised in all processes, and nothing was written.
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
    """Raise a UsageError if ``out`` has a file or folder of a name that fastrm writes and that it did not write."""
    if as_utf8(str(out)) != str(out):
        raise UsageError(f"--out {as_utf8(str(out))} is no UTF-8, which TensorBoard and the profiler ask of a path")
    with writing(out):
        if out.exists():
            for path, wrote in own.names(out):
                own.require("--out", out, wrote, holds=path)


def prepare(out: Path, settings: dict[str, Any], *, fresh: bool) -> None:
    """Write ``config.json`` into a folder that is held; a fresh run takes the place of an older one."""
    with writing(out):
        if fresh:
            board = out / own.TENSORBOARD
            old = [path for path, _ in own.names(out) if not path.is_dir()]
            old += [path for path in board.iterdir() if own.events(path)] if board.is_dir() else []
            for path in old:
                path.unlink()
            with contextlib.suppress(OSError):  # where something else is in it, it stays
                board.rmdir()
        written = ("checkpoint.pt", "backbone.safetensors", "summary.json", "metrics.jsonl", "skipped.txt")
        for name in (*written, own.BEST, own.BEST_SCORE):
            (out / f".{name}.partial").unlink(missing_ok=True)  # which a run that was killed left half written
        write_json(out / "config.json", settings)


def short_of_space(out: Path, method: nn.Module, keep: int) -> str | None:
    """What to tell the person at the start if the checkpoints that are kept will hardly fit on the disk.

    One more is written before the oldest goes. The optimizer's part is taken for one copy of the trained weights.
    """
    size = sum(value.numel() * value.element_size() for value in method.state_dict().values())
    size += sum(weight.numel() * weight.element_size() for weight in method.parameters() if weight.requires_grad)
    there = sum(path.name.startswith("checkpoint") for path, _ in own.names(out))
    needed, free = size * max(1, keep + 1 - there), shutil.disk_usage(out).free
    if needed <= free:
        return None
    return f"--out {out} has {free / 1e6:,.0f} MB left, and its checkpoints need about {needed / 1e6:,.0f} MB more"
