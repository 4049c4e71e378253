"""Images in WebDataset shards: uncompressed tar files whose members ``key.jpg`` and ``key.cls`` belong together.

The members are indexed once and then read by their offsets, so shards behave like single files: any order, an exact
position after a resume, every image once per epoch, and no process bound to a shard.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastrm.data.index import Table
from fastrm.data.paths import string
from fastrm.data.shard_index import counts, found_in, label_column
from fastrm.data.sources import LOOKED_FOR, Source, passed_over, without_validation
from fastrm.errors import UsageError

COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|dev|test)(?![a-z])", re.IGNORECASE)


def open_shards(shards: Sequence[Path], data: str, *, passed: Counter[str] | None = None, keep: bool = True) -> Source:
    """Open the images in shards.

    Args:
        shards: tar files.
        data: value of ``--data``.
        passed: number of skipped files in the folder of the shards, by kind.
        keep: whether to cache the index for the next start.

    Raises:
        UsageError: a shard is not an uncompressed tar file, the shards hold no image, two images or labels share a key,
            or a pattern or a folder has both training and validation shards.
    """
    if passed is not None or glob.has_magic(data):
        _check_one_part(shards, data)
    images = found_in(shards, data, keep=keep)
    inside = sum(map(Counter, images.table.about["passed"]), Counter[str]())
    if not len(images):
        raise UsageError(f"--data {data} holds no image{passed_over(inside)}; looked for {LOOKED_FOR}")
    about = [f"{len(images):,} images in {len(shards)} shards", *_notes(images.table, shards)]
    all_passed = Counter(passed or {}) + inside
    return without_validation("shards", images, "; ".join(about), all_passed, why="shards have no val folder")


def _notes(table: Table, shards: Sequence[Path]) -> list[str]:
    """Messages for the user about the shards."""
    notes = []
    without = np.flatnonzero(table[label_column(table)] < 0)
    if 0 < len(without) < table.rows:
        first = os.fsdecode(string(table, "name", int(without[0])))
        notes.append(f"{len(without):,} of them have no .cls (first {first}), so no label is used")
    if len(empty := np.flatnonzero(counts(table) == 0)):
        notes.append(f"{len(empty)} shards hold no image (first {shards[empty[0]]})")
    if len(unended := np.flatnonzero(~table["shard_ended"])):
        notes.append(f"{len(unended)} shards have no end mark and may be cut off (first {shards[unended[0]]})")
    return notes


def _check_one_part(shards: Sequence[Path], data: str) -> None:
    """Raise a UsageError if the names of some shards, but not all, say that they are for validation."""
    aside = [shard for shard in shards if _VALIDATION.search(shard.stem)]
    if aside and len(aside) < len(shards):
        first = next(shard for shard in shards if shard not in aside)
        wanted = first.with_name(first.stem.rstrip("0123456789") + "*.tar")
        raise UsageError(
            f"--data {data} matches training shards, such as {first.name}, and by its name a validation shard, "
            f"{aside[0].name}; give the training shards, as in '{wanted}'"
        )
