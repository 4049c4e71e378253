"""What travels between a process that trains or evaluates and its loader processes."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastrm.errors import UsageError, first_line


class Loaded(NamedTuple):
    """What a loader process makes of a request."""

    indices: list[int]
    views: tuple[Tensor, ...]
    faults: dict[int, str]
    """What is wrong with images that could not be read, by index."""
    refusal: str = ""
    """Why there can be no batch: torch would give an exception's traceback for its message."""


class _Nowhere(io.RawIOBase):
    def write(self, content: Any) -> int:
        return len(content)


class _Dry(pickle.Pickler):
    """Writes nothing, and passes over what is large and known to travel."""

    def reducer_override(self, obj: Any) -> Any:
        return (int, ()) if isinstance(obj, Tensor | np.ndarray) else NotImplemented


def check_travels(workers: int, *parts: Any) -> None:
    """Refuse what cannot be sent to loader processes, where these are started afresh instead of forked."""
    if workers == 0 or multiprocessing.get_start_method() == "fork":
        return
    try:
        _Dry(_Nowhere()).dump(parts)
    except Exception as error:  # whatever objects raise that do not want to be sent
        raise UsageError(
            f"--workers {workers}: the Dataset or the augmentation cannot be sent to loader processes "
            f"({first_line(error)}); define its functions and classes at the top level of a module, without lambda, "
            "or give --workers 0"
        ) from None
