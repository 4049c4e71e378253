"""The tiles of the contrastive sweep: the usual ones, and those that ``tune_losses`` found to be faster on a GPU."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ._push import block_d

MANY = 1024  # queries from which the tiles are chosen, and measured, as for many


class Tile(NamedTuple):
    """Sizes of the tiles that a program of the sweep multiplies, and options of its launch."""

    block_n: int
    """Queries per program."""
    block_k: int
    """Bank rows per tile."""
    warps: int
    stages: int


# By kind of product and BLOCK_D. All fit the shared memory of any GPU from sm_80 on, and all but those of "tf32x3" its
# registers (benchmarks/kernel_report.py).
TILES = {
    "half": {64: Tile(64, 64, 4, 3), 128: Tile(64, 128, 4, 3), 256: Tile(64, 64, 8, 2), 512: Tile(32, 32, 8, 2)},
    "tf32": {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2), 512: Tile(16, 16, 8, 2)},
    "tf32x3": {64: Tile(32, 32, 4, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
}
# Where the rows that are averaged are others than those that are multiplied, and have tiles of their own.
TILES_OF_TWO = {
    "half": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2), 512: Tile(32, 16, 8, 2)},
    "tf32": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 4, 2), 512: Tile(16, 16, 8, 1)},
    "tf32x3": {64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 8, 2), 256: Tile(16, 16, 8, 2)},
}
# For many queries on sm_90 and sm_100, which have the shared memory. Measured on an H200: docs/benchmarks.md.
WIDE_TILES = {128: Tile(64, 128, 4, 2), 256: Tile(128, 64, 8, 3)}


def width(dim: int) -> int:
    """The columns that a program holds of rows of ``dim``."""
    return max(64, block_d(dim))


def usual(n: int, dim: int, kind: str, major: int, two: bool) -> Tile | None:
    """The tile for ``n`` queries, or None if rows of ``dim`` are too wide for the registers.

    Args:
        n, dim: number of queries, and their width.
        kind: kind of product.
        major: major version of the compute capability.
        two: whether other rows are averaged than those that are multiplied.
    """
    if not two and kind == "half" and n >= MANY and major in (9, 10) and width(dim) in WIDE_TILES:
        return WIDE_TILES[width(dim)]
    return (TILES_OF_TWO if two else TILES)[kind].get(width(dim))


def candidates(n: int, dim: int, kind: str, major: int) -> list[Tile]:
    """The tiles among which a search chooses, first the usual one; none if rows of ``dim`` are too wide."""
    first = usual(n, dim, kind, major, two=False)
    if first is None:
        return []
    narrow, wide = TILES_OF_TWO[kind].get(width(dim)), WIDE_TILES.get(width(dim)) if kind == "half" else None
    deeper = first._replace(stages=first.stages + 1)
    every = (first, TILES[kind][width(dim)], narrow, wide, deeper)
    return list(dict.fromkeys(tile for tile in every if tile is not None))


def key(gpu: str, n: int, dim: int, kind: str) -> str:
    """The name of a case, for the tiles that were measured."""
    return f"{gpu}, {kind}, width {width(dim)}, {'many' if n >= MANY else 'few'} queries"


def stored() -> Path:
    """The file with the tiles that were measured, in the user's folder of caches."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"), "fastrm", "tiles.json")


@functools.cache
def measured() -> dict[str, Tile]:
    """The tiles that were measured, by :func:`key`, as they were stored when this process first asked."""
    try:
        content = json.loads(stored().read_text(encoding="utf-8"))
        return {name: Tile(*map(int, tile)) for name, tile in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{stored()} is not used, since it cannot be read: {error}", stacklevel=2)
        return {}


def store(tiles: Mapping[str, Tile]) -> None:
    """Write :func:`stored`, whole or not at all."""
    path = stored()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(tiles, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
