"""Images in WebDataset shards: uncompressed tar files whose members ``key.jpg`` and ``key.cls`` belong together.

The members are found once and then read by their offsets, so that shards give what files give: any order, an exact
position, every image once an epoch, and no process that is bound to a shard.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastrm.data.encoded import EncodedImages
from fastrm.data.sources import LOOKED_FOR, Source, passed_over, without_validation
from fastrm.data.tar import Member, Shard, read_shard
from fastrm.errors import UsageError

COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|dev|test)(?![a-z])", re.IGNORECASE)


class ShardImages(EncodedImages):
    """Images in tar files."""

    def __init__(self, members: Sequence[Member]) -> None:
        labels = [member.label for member in members]
        known = None if None in labels else np.array(labels, dtype=np.int64)
        super().__init__(known, slice(0, len(members)))
        self._members = members

    def name(self, index: int) -> str:
        """The shard's path, followed by the member's name."""
        member = self._members[self.row(index)]
        return f"{member.shard}/{member.name}"

    def content(self, index: int) -> bytes:
        """The bytes of a member."""
        member = self._members[self.row(index)]
        with open(member.shard, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def identities(self) -> Iterator[bytes]:
        """What tells each image from others: the names of its shard and itself, and its size in bytes."""
        members = (self._members[self.row(index)] for index in range(len(self)))
        return (os.fsencode(f"{m.shard.name}/{m.name}") + b"\0%d" % m.size for m in members)

    def stored_in(self) -> Sequence[Path]:
        """The shards."""
        return sorted({member.shard for member in self._members})


def open_shards(shards: Sequence[Path], data: str, *, passed: Counter[str] | None = None) -> Source:
    """Open the images in shards.

    Args:
        shards: tar files.
        data: what ``--data`` says.
        passed: counts what lay beside them.

    Raises:
        UsageError: a shard is no uncompressed tar file, there is no image in them, two images or labels share a key, or
            a pattern or a folder stands for shards to train on and for others.
    """
    if passed is not None or glob.has_magic(data):
        _check_one_part(shards, data)
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:  # waiting for the disk, mostly
        read = list(threads.map(read_shard, shards))
    images = ShardImages([member for shard in read for member in shard.members])
    if not len(images):
        said = passed_over(sum((shard.passed for shard in read), Counter()))
        raise UsageError(f"--data {data} holds no image{said}; looked for {LOOKED_FOR}")
    about = [f"{len(images):,} images in {len(shards)} shards", *_notes(read, images)]
    passed = sum((shard.passed for shard in read), Counter(passed or {}))
    return without_validation("shards", images, "; ".join(about), passed, why="shards have no val folder")


def _notes(read: Sequence[Shard], images: ShardImages) -> list[str]:
    """What a user should know of the shards besides."""
    members = [member for shard in read for member in shard.members]
    without = [member for member in members if member.label is None]
    notes = []
    if images.labels is None and len(without) < len(members):
        notes.append(f"{len(without):,} of them have no .cls (first {without[0].name}), so no label is used")
    if empty := [shard.path for shard in read if not shard.members]:
        notes.append(f"{len(empty)} shards hold no image (first {empty[0]})")
    if unended := [shard.path for shard in read if not shard.ended]:
        notes.append(f"{len(unended)} shards have no end mark and may be cut off (first {unended[0]})")
    return notes


def _check_one_part(shards: Sequence[Path], data: str) -> None:
    """Raise a UsageError if by their names some of the shards, but not all, are for validation."""
    aside = [shard for shard in shards if _VALIDATION.search(shard.stem)]
    if aside and len(aside) < len(shards):
        first = next(shard for shard in shards if shard not in aside)
        wanted = first.with_name(first.stem.rstrip("0123456789") + "*.tar")
        raise UsageError(
            f"--data {data} stands for shards to train on, such as {first.name}, and by their names for others, such "
            f"as {aside[0].name}; give those to train on, as in '{wanted}'"
        )
