"""Reports faults of the machine in one line."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch.distributed as dist

from fastrm.errors import Stopped, TrainingError
from fastrm.machine.distributed import World
from fastrm.machine.memory import exhausted
from fastrm.machine.signals import Deaths

P = ParamSpec("P")
T = TypeVar("T")

LOWER = (
    "Lower --batch-size, or raise --accumulate, which takes fewer images at a time, or lower --image-size; on the host "
    "--workers too. What was saved before is kept"
)
"""Advice if memory does not suffice."""


def released(run: Callable[P, T]) -> Callable[P, T]:
    """Make a run raise :class:`Stopped` without the frames in it, so that a stopped run is freed.

    A notebook keeps the frames of the last error, and with them the network on the device and the loader processes.
    """

    @functools.wraps(run)
    def freed(*args: P.args, **named: P.kwargs) -> T:
        try:
            return run(*args, **named)
        except Stopped as stop:
            stop.__context__ = None
            raise stop.with_traceback(None) from None

    return freed


@contextmanager
def faults(out: Path, world: World, deaths: Deaths, *, resumes: bool) -> Iterator[None]:
    """Report in one line a fault of the machine that ended the run.

    Args:
        out: the run folder.
        world: the processes of the run.
        deaths: muted after a fault, since torch reports a loader process that ended a second time, at any later point.
        resumes: whether the same command continues from the saved state.

    Raises:
        TrainingError: instead of errors of the disk, of loader processes and of other processes.
    """
    kept = "what was saved before is kept, and " + again(resumes)
    why = "for lack of memory if it printed no error"
    loader_ended = f"a loader process ended unexpectedly, {why}; {kept}, or with fewer --workers"
    try:
        try:
            yield
        except BaseException:
            deaths.mute()
            raise
    except (ConnectionError, EOFError):  # the pipe from a loader process may break before torch notices its death
        raise TrainingError(loader_ended) from None
    except OSError as error:
        if exhausted(error):
            raise
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise TrainingError(
                f"too many files are open; raise their limit (ulimit -n), or give fewer --workers; {kept}"
            ) from None
        raise TrainingError(f"{error.filename or out}: {error.strerror or error}; {kept}") from None
    except RuntimeError as error:
        if exhausted(error):
            raise
        if world.size > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise TrainingError(f"another process ended or can no longer be reached; {kept}") from None
        if "DataLoader worker (pid" in str(error):  # torch's signal handler raises it anywhere in the run
            raise TrainingError(loader_ended) from None
        raise


def again(resumes: bool) -> str:
    """The command that continues from the saved state."""
    return "the same command continues from there" if resumes else "the same command without --resume never continues"
