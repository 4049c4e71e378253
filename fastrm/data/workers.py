"""The data that a process exchanges with its loader processes."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastrm.errors import UsageError, first_line


class Loaded(NamedTuple):
    """The result of a request to a loader process."""

    indices: list[int]
    views: tuple[Tensor, ...]
    faults: dict[int, str]
    """The reasons for unreadable images, by index."""
    refusal: str = ""
    """Why there is no batch; with an exception, torch would show a traceback."""


class _Nowhere(io.RawIOBase):
    def write(self, content: Any) -> int:
        return len(content)


class _Dry(pickle.Pickler):
    """Writes nothing, and skips large objects that can be pickled."""

    def reducer_override(self, obj: Any) -> Any:
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
