"""The data that a process exchanges with its loader processes."""

from __future__ import annotations

import errno
import gc
import io
import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from fastrm.errors import TrainingError, UsageError, first_line
from fastrm.machine.memory import SHARED_FULL, exhausted

T = TypeVar("T")
Sent = Tensor | bytes
"""Views in shared memory, or their bytes for a pipe."""


class Loaded(NamedTuple):
    """The result of a request to a loader process."""

    indices: list[int]
    views: tuple[Sent, ...]
    faults: dict[int, str]
    """The reasons for unreadable images, by index."""
    refusal: str = ""
    """Why there is no batch; with an exception, torch would show a traceback."""


_full = False  # whether this process has found the shared memory full


def sent(views: Tensor) -> Sent:
    """Prepare views for the way to the training process: shared memory or, once that is full, a pipe.

    Without this, torch moves them when it sends them, and a failure there leaves the training process waiting forever.
    """
    global _full
    if get_worker_info() is None:
        return views
    if not _full:
        try:
            return views.share_memory_()
        except RuntimeError as error:
            if not exhausted(error):
                raise
            _full = True  # for good: each failure leaves an empty file behind
    return pickle.dumps(views)


def received(views: Sent) -> Tensor:
    """The views that :func:`sent` prepared."""
    if isinstance(views, Tensor):
        return views
    warnings.warn(f"batches come through pipes, which is slower, since {SHARED_FULL}", stacklevel=2)
    whole: Tensor = pickle.loads(views)
    return whole


@contextmanager
def locks() -> Iterator[None]:
    """Raise a TrainingError if the shared memory has no space for the locks that processes share."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TrainingError(SHARED_FULL) from None
        raise


def started(batches: Iterable[T]) -> Iterator[T]:
    """Start the loader processes, if there are any; raises like :func:`locks`."""
    count = getattr(batches, "num_workers", 0)
    with locks():
        # About as many as torch makes. If it fails on the way, it prints a traceback.
        _ = [multiprocessing.Lock() for _ in range(4 * (count + 2) if count else 0)]
        if count:
            # A forked process that freed this one's garbage, such as a DALI pipeline, would wait for threads it lacks.
            gc.collect()
        return iter(batches)


def _main_is_a_module() -> bool:
    """Whether a spawned process can import what ``__main__`` defines: that of a script or of ``python -m``."""
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is not None or os.path.isfile(getattr(main, "__file__", None) or "")


class _Nowhere(io.RawIOBase):
    def write(self, content: Any) -> int:
        return len(content)


class _Dry(pickle.Pickler):
    """Writes nothing, and skips large objects that can be pickled."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__" and not _main_is_a_module():
            raise pickle.PicklingError(
                f"{obj.__qualname__} is defined in a notebook or prompt, which they cannot import"
            )
        return (int, ()) if isinstance(obj, Tensor | np.ndarray) else NotImplemented


def check_travels(workers: int, *parts: Any) -> None:
    """Refuse objects that cannot be sent to loader processes, if these are spawned instead of forked."""
    if workers == 0 or multiprocessing.get_start_method() == "fork":
        return
    try:
        _Dry(_Nowhere()).dump(parts)
    except Exception as error:  # objects that cannot be pickled raise errors of any type
        raise UsageError(
            f"--workers {workers}: the Dataset or the augmentation cannot be sent to loader processes "
            f"({first_line(error)}); define its functions and classes at the top level of a module, without lambda, "
            "or give --workers 0"
        ) from None
