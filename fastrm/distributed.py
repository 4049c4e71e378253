"""What this process is among all that train together."""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import Tensor

from fastrm.errors import UsageError


class World(NamedTuple):
    """This process among all."""

    rank: int = 0
    size: int = 1


def world() -> World:
    """Read what torchrun put into the environment.

    Raises:
        UsageError: there are several processes, which the trainer does not support yet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise UsageError(f"torchrun started {size} processes, but training in several is not supported yet; start one")
    return World()


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, without gradient, and where this process's own begin among them."""
    return rows, 0
