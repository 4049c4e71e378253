"""Lets processes wait for each other without a time limit, and reports the failure of one to all.

A collective fails if a process is later than the time limit of the process group. Here the processes wait on the
store of the group, and exchange data only once all have arrived.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastrm.errors import Stopped, TrainingError, UsageError, first_line
from fastrm.machine.distributed import gather_objects, store, world

T = TypeVar("T")
_LEAST, _MOST = 0.001, 0.1
"""Seconds between two checks of the store."""
_CHUNK = 2**26
"""Bytes that are sent at a time."""
_TOLD = "_told_to_all"
_meetings = 0
"""Number of meetings so far; it is the same in all processes."""


def meet() -> None:
    """Wait for all processes, without a time limit.

    Raises:
        UsageError, TrainingError: the error of another process inside :func:`together`.
    """
    size = world().size
    if size == 1:
        return
    shared, gate, before = store(), _next_gate(), f"fastrm/{_meetings - 1}"
    if shared.add(f"{gate}/arrived", 1) == size:
        shared.set(gate, "")
        for key in (before, f"{before}/arrived"):  # all have left it
            shared.delete_key(key)
    begin = time.monotonic()
    while not shared.check([gate]):  # the store's own wait has a time limit
        time.sleep(min(_MOST, _LEAST + (time.monotonic() - begin) / 10))
    if said := shared.get(gate):
        raise _heard(json.loads(said))


@contextmanager
def together() -> Iterator[None]:
    """Let an error of one process end this block in all processes, and meet at the end.

    The other processes raise the same error in one line at their next meeting.
    """
    try:
        yield
    except BaseException as error:
        if world().size > 1 and not hasattr(error, _TOLD):
            setattr(error, _TOLD, True)
            store().set(_next_gate(), json.dumps(_spoken(error)))
        raise
    meet()


def everyone(value: T) -> list[T]:
    """Plain values of all processes, in order of rank, once all have arrived."""
    meet()
    return gather_objects(value)


def from_first(content: bytes) -> bytes:
    """Send bytes from the first process to all, in parts of bounded size, once all have arrived."""
    rank, size = world()
    if size == 1:
        return content
    count = everyone(len(content))[0]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    held = np.empty(count, dtype=np.uint8) if rank else np.frombuffer(content, dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        part = torch.tensor(held[start : start + _CHUNK], device=device)
        dist.broadcast(part, 0)
        if rank:
            held[start : start + _CHUNK] = part.cpu().numpy()
    return held.tobytes() if rank else content


def total(values: Tensor) -> Tensor:
    """Sum over all processes, once all have arrived; unchanged with one process."""
    if world().size == 1:
        return values
    meet()
    values = values.clone()
    dist.all_reduce(values)
    return values


def swapped(parts: Tensor) -> Tensor:
    """Send part r of [processes, …] to process r, and return the parts from all processes, in order of rank."""
    if world().size == 1:
        return parts
    received = parts.new_empty(parts.shape)
    dist.all_to_all_single(received, parts.contiguous())
    return received


def _next_gate() -> str:
    global _meetings
    _meetings += 1
    return f"fastrm/{_meetings}"


def _spoken(error: BaseException) -> dict[str, Any]:
    if isinstance(error, Stopped):
        return {"stopped": str(error), "status": error.status}
    if isinstance(error, UsageError):
        return {"usage": str(error)}
    words = str(error) if isinstance(error, TrainingError) else f"process {world().rank} failed: {first_line(error)}"
    return {"training": words}


def _heard(said: dict[str, Any]) -> Exception:
    error: Exception
    if "stopped" in said:
        error = Stopped(said["stopped"], said["status"])
    else:
        error = UsageError(said["usage"]) if "usage" in said else TrainingError(said["training"])
    setattr(error, _TOLD, True)
    return error
