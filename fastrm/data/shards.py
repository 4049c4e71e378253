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
from numpy.typing import NDArray

from fastrm.data.encoded import EncodedImages
from fastrm.data.sources import LOOKED_FOR, Source, natural, passed_over, without_validation
from fastrm.data.tar import Member, Shard, read_shard
from fastrm.errors import UsageError
from fastrm.files import at_home
from fastrm.settings.config import check_path

MOST = 1_000_000  # shards in one pattern
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|dev|test)(?![a-z])", re.IGNORECASE)


class ShardImages(EncodedImages):
    """Images in tar files."""

    def __init__(self, members: Sequence[Member]) -> None:
        labels = [member.label for member in members]
        known = None if None in labels else np.array(labels, dtype=np.int64)
        super().__init__(known)
        self._members = members

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        """The shard's path, followed by the member's name."""
        member = self._members[index]
        return f"{member.shard}/{member.name}"

    def content(self, index: int) -> bytes:
        """The bytes of a member."""
        member = self._members[index]
        with open(member.shard, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def identities(self) -> Iterator[bytes]:
        """What tells each image from others: the names of its shard and itself, and its size in bytes."""
        return (os.fsencode(f"{m.shard.name}/{m.name}") + b"\0%d" % m.size for m in self._members)

    def stored_in(self) -> Sequence[Path]:
        """The shards."""
        return sorted({member.shard for member in self._members})

    def subset(self, indices: NDArray[np.int64]) -> ShardImages:
        """Return the images at ``indices``."""
        return ShardImages([self._members[i] for i in indices])


def open_shards(pattern: str) -> Source:
    """Open the images in shards.

    Args:
        pattern: a tar file, or several as in ``train-{0000..0146}.tar``, ``{a,b}.tar`` or ``train-*.tar``.

    Raises:
        UsageError: a shard is not there or no uncompressed tar file, there is no image in them, or two images or labels
            share a key.
    """
    return open_shard_files(_found(pattern), pattern)


def open_shard_files(shards: Sequence[Path], data: str, *, passed: Counter[str] | None = None) -> Source:
    """Open the images in these shards, which ``--data`` stands for; ``passed`` counts what lay beside them."""
    for shard in shards:
        check_path("data", shard)
        if not shard.is_file():
            raise UsageError(f"--data {data}: {shard} {'is a folder' if shard.is_dir() else 'does not exist'}")
    twice = [shard for shard, count in Counter(os.path.realpath(shard) for shard in shards).items() if count > 1]
    if twice:
        raise UsageError(f"--data {data} names {twice[0]} more than once")
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


def _found(pattern: str) -> list[Path]:
    """The files that a pattern stands for, in the order of the pattern and of the numbers in their names."""
    if "::" in pattern or "://" in pattern or pattern.startswith("pipe:"):
        raise UsageError(f"--data {pattern}: shards are read from local files; several are named as in '{{a,b}}.tar'")
    if os.path.isfile(at_home(pattern)):  # whatever signs are in its name
        return [Path(at_home(pattern))]
    shards: list[Path] = []
    for name in expand(pattern):
        path = Path(at_home(name))
        if not glob.has_magic(name) or os.path.exists(path):
            shards.append(path)
            continue
        matching = [Path(match) for match in sorted(glob.glob(str(path)), key=natural)]
        if not matching:
            raise UsageError(f"--data {pattern}: no file matches {name}")
        check_one_part(matching, pattern)
        check_one_part(matching, pattern)
        shards += matching
    return shards


def check_one_part(shards: Sequence[Path], data: str) -> None:
    """Raise a UsageError if by their names some of the shards, but not all, are for validation."""
    aside = [shard for shard in shards if _VALIDATION.search(shard.stem)]
    if aside and len(aside) < len(shards):
        first = next(shard for shard in shards if shard not in aside)
        wanted = first.with_name(first.stem.rstrip("0123456789") + "*.tar")
        raise UsageError(
            f"--data {data} stands for shards to train on, such as {first.name}, and by their names for others, such "
            f"as {aside[0].name}; give those to train on, as in '{wanted}'"
        )


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: a list ``{a,b}`` or numbers ``{08..11}``, which keep their zeros."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers.groups()
        if int(first) > int(last):
            raise UsageError(f"--data {pattern}: {found[0]} counts down; give {{{last}..{first}}}")
        if int(last) - int(first) >= MOST:
            raise UsageError(f"--data {pattern}: {found[0]} is more than {MOST:,} shards")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [name for choice in choices for name in expand(pattern[: found.start()] + choice + pattern[found.end() :])]
