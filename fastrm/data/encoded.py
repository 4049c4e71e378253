"""Images that are stored encoded, in files or in parts of them, and decoded when they are asked for."""

from __future__ import annotations

import contextlib
import copy
import os
import stat
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrm.data.decode import BROKEN, BrokenImage, reason
from fastrm.data.index import Table, place
from fastrm.data.looks import Looks, looks
from fastrm.data.paths import Paths, Rows, chosen, count, row_at, stated
from fastrm.data.sources import Images
from fastrm.data.stored import Values, as_rgb, header, stored
from fastrm.errors import UsageError
from fastrm.files import insistent

try:  # a third faster than Pillow, but torchvision 0.29 announces that it will go
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # type: ignore[assignment, unused-ignore]

T = TypeVar("T")
Some = TypeVar("Some", bound="EncodedImages")


def decoded(content: bytes) -> Tensor:
    """A picture as uint8 [3, H, W], by the rules of :func:`fastrm.data.stored.as_rgb`; raises as that."""
    if decode_jpeg is not None and header(content).plain == "JPEG":
        with contextlib.suppress(RuntimeError):  # Pillow says what is wrong, or reads it nevertheless
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return torch.from_numpy(np.array(as_rgb(content))).permute(2, 0, 1)


class EncodedImages(Images):
    """Images whose encoded bytes can be had one by one, wherever they lie.

    Args:
        labels: int64 [N], or None for those in the table, if it has any.
        rows: which N of a set these are.
        table: what is known of all images of the set; its subsets share it.
    """

    NOUN = "files"

    def __init__(self, labels: NDArray[np.int64] | None, rows: Rows, table: Table | None = None) -> None:
        super().__init__(labels)
        self.rows, self.table = rows, Table({}, count(rows)) if table is None else table

    def __len__(self) -> int:
        return count(self.rows)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """int64 [N], or None."""
        if self._labels is not None:
            return self._labels
        kept = self._told("label")
        return None if kept is None else np.array(kept)  # that can be written to, as torch wants it

    @property
    def looks(self) -> Looks | None:
        """What the search for broken files found out of each of the N images; None where it was not made."""
        found = looks(self.table)
        return None if found is None else found.at(self.rows)

    def _told(self, name: str) -> NDArray[Any] | None:
        """What the table says of each of the N images."""
        return self.table[name][self.rows] if name in self.table else None

    def hashes(self) -> NDArray[np.int64]:
        """int64 [N]: of what tells each image from others."""
        known = self._told("hash")
        return super().hashes() if known is None else known

    def row(self, index: int) -> int:
        """Where an image is among all of the set, and in the table."""
        return row_at(self.rows, index)

    def renew(self) -> None:
        """Take over what was found out of the images before, as far as they are the same; else it is forgotten.

        This is called on the images of a set that are looked at first: these stand for all.
        """
        digest = blake2b(digest_size=16)
        files = self.stored_in()
        for column in stated(map(os.fspath, files), len(files)):
            digest.update(column.tobytes())
        for index in range(len(self)):
            digest.update(os.fsencode(os.path.abspath(self.name(index))) + b"\0")
        self.table.keep_at(place(f"set-{digest.hexdigest()}"))

    def subset(self: Some, indices: NDArray[np.int64]) -> Some:
        """Return the images at ``indices``: what tells them from others is where they are among all of the set."""
        part = copy.copy(self)
        part.rows = chosen(self.rows, indices)
        part._labels = None if self._labels is None else self._labels[indices]
        part.unreadable = {}
        return part

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            OSError, BrokenImage: they cannot be read.
        """

    @abstractmethod
    def stored_in(self) -> Sequence[Path]:
        """The files on disk that hold the images: when one of them changes, the images are looked at again."""

    def values(self, index: int) -> Values:
        """What is stored of an image, [H, W, bands]."""
        return stored(self.content(index), "all" if self.format.pages == "bands" else 0)

    def pixels(self, index: int) -> Tensor:
        """An image as its views are made of it."""
        return decoded(self.content(index)) if self.format.rgb else super().pixels(index)

    def read(self, index: int, read: Callable[[bytes], T]) -> tuple[int, T]:
        """Apply ``read`` to the bytes of an image, or where that fails to those of the next one that it can read.

        Returns:
            The index of the image that was read, and what ``read`` made of it.
        """
        for step in range(len(self)):
            at = (index + step) % len(self)
            if at in self.unreadable:
                continue
            try:
                return at, read(self.content(at))
            except BROKEN as error:
                self.unreadable[at] = reason(error)
        raise UsageError(f"none of the {len(self)} image {self.NOUN} can be read; the first is {self.name(0)}")


def _whole(path: str) -> tuple[bytes, int]:
    """What a file holds, and its time of change in nanoseconds."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise BrokenImage("it is not a regular file")
    with open(path, "rb") as file:
        return file.read(), state.st_mtime_ns


class FileImages(EncodedImages):
    """Images in files of their own.

    Args:
        paths: N files.
        labels: int64 [N], or None.
        root: the folder of the data, which the names of the images start from; None is what the paths have in common.
    """

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.int64] | None, root: str | Path | None = None) -> None:
        held = paths if isinstance(paths, Paths) else Paths.of(paths)
        super().__init__(labels, held.rows, held.table)
        self.root, self._above = root, held.root

    @property
    def paths(self) -> Paths:
        """Where the files are; each path is made when it is asked for."""
        return Paths(self.table, self._above, self.rows)

    def name(self, index: int) -> str:
        """Its path."""
        return self.paths.text(index)

    def content(self, index: int) -> bytes:
        """The bytes of a file; a pipe, where reading would wait for ever, is broken."""
        content, changed = insistent(lambda: _whole(self.name(index)))
        self.compare(index, len(content), changed)
        return content

    def compare(self, index: int, size: int, changed: int) -> None:
        """Is told the length of a file that was read, and its time of change in nanoseconds."""

    def identities(self) -> Iterator[bytes]:
        """What tells each image from others: its path from the root on, and its size in bytes."""
        paths = self.paths
        root = str(self.root or os.path.commonpath({os.path.dirname(path) for path in paths.texts()}))
        begin = 0 if root == os.curdir else len(root.rstrip(os.sep)) + 1
        sizes = self._told("bytes")
        if sizes is None:
            sizes, _ = stated(paths.texts(), len(paths))
        for path, size in zip(paths.texts(), sizes.tolist(), strict=True):
            yield os.fsencode(path[begin:].replace(os.sep, "/")) + b"\0%d" % size

    def stored_in(self) -> Sequence[Path]:
        """The files themselves."""
        return self.paths
