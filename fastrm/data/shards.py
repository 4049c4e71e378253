"""Images in WebDataset shards: uncompressed tar files whose members ``key.jpg`` and ``key.cls`` belong together.

The members are found once and then read by their offsets, so that shards give what files give: any order, an exact
position, every image once an epoch, and no process that is bound to a shard.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrm.config import check_path
from fastrm.data.sources import ENDINGS, FileImages, expanded
from fastrm.errors import UsageError

MOST = 1_000_000  # shards in one pattern


class Member(NamedTuple):
    """Where an image lies."""

    shard: Path
    offset: int
    size: int
    name: str
    label: int | None


class ShardImages(FileImages):
    """Images in tar files; their paths are the shard's followed by the member's name."""

    def __init__(self, members: Sequence[Member]) -> None:
        labels = [member.label for member in members]
        known = None if None in labels else np.array(labels, dtype=np.int64)
        super().__init__([Path(f"{member.shard}/{member.name}") for member in members], known)
        self._members = members

    def content(self, index: int) -> bytes:
        """The bytes of a member."""
        member = self._members[index]
        with open(member.shard, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    def stored_in(self) -> list[Path]:
        """The shards."""
        return sorted({member.shard for member in self._members})

    def subset(self, indices: NDArray[np.int64]) -> ShardImages:
        """Return the images at ``indices``."""
        return ShardImages([self._members[i] for i in indices])


def open_shards(pattern: str) -> ShardImages:
    """Find the images in shards.

    Args:
        pattern: a tar file, or several as in ``train-{0000..0146}.tar`` or ``{a,b}.tar``.

    Raises:
        UsageError: a shard is not there or no uncompressed tar file, or there is no image in them.
    """
    shards = [expanded(name) for name in expand(pattern)]
    for shard in shards:
        check_path("data", shard)
        if not shard.is_file():
            raise UsageError(f"--data {pattern}: {shard} does not exist")
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as threads:  # waiting for the disk, mostly
        members = list(itertools.chain.from_iterable(threads.map(_members, shards)))
    if not members:
        raise UsageError(f"--data {pattern} holds no image; looked for {', '.join(sorted(ENDINGS))}")
    return ShardImages(members)


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


def _label(text: bytes) -> int:
    label = int(text) if text.strip().isdigit() else -1
    if not 0 <= label < 2**31:
        raise ValueError(f"a label is {text!r}; it must be a whole number from 0 to {2**31 - 1}")
    return label


def _members(shard: Path) -> list[Member]:
    images: list[tuple[str, tarfile.TarInfo]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                key = f"{folder}/{base.partition('.')[0]}"  # WebDataset's: up to the first dot of the last part
                if not info.isreg() or base.startswith("."):
                    continue
                if base.endswith(".cls"):
                    text = tar.extractfile(info)
                    assert text is not None
                    labels[key] = _label(text.read(32))
                elif os.path.splitext(base)[1].lower() in ENDINGS:
                    images.append((key, info))
    except (OSError, tarfile.TarError) as error:
        raise UsageError(f"--data: {shard} is not a whole, uncompressed tar file ({error})") from None
    except ValueError as error:
        raise UsageError(f"--data: {shard} cannot be read: {error}") from None
    return [Member(shard, info.offset_data, info.size, info.name, labels.get(key)) for key, info in images]
