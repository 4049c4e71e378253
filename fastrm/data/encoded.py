"""Images that are stored encoded, in files or in parts of files, and decoded on access."""

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
    """Decode an image to uint8 [3, H, W] with the rules of :func:`fastrm.data.stored.as_rgb`; raises like it."""
    if decode_jpeg is not None and header(content).plain == "JPEG":
        with contextlib.suppress(RuntimeError):  # Pillow reads it, or reports what is wrong
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return torch.from_numpy(np.array(as_rgb(content))).permute(2, 0, 1)


class EncodedImages(Images):
    """Images whose encoded bytes can be read one by one.

    Args:
        labels: labels int64 [N], or None for those in the table, if it has any.
        rows: indices of these N images in the whole set.
        table: information about all images of the set, which its subsets share.
    """

    NOUN = "files"

    def __init__(self, labels: NDArray[np.int64] | None, rows: Rows, table: Table | None = None) -> None:
        super().__init__(labels)
        self.rows, self.table = rows, Table({}, count(rows)) if table is None else table

    def __len__(self) -> int:
        return count(self.rows)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels int64 [N], or None."""
        if self._labels is not None:
            return self._labels
        kept = self._told("label")
        return None if kept is None else np.array(kept)  # writable, as torch requires

    @property
    def looks(self) -> Looks | None:
        """Results of the search for broken files for each of the N images; None if there was none."""
        found = looks(self.table)
        return None if found is None else found.at(self.rows)

    def _told(self, name: str) -> NDArray[Any] | None:
        """A column of the table for the N images."""
        return self.table[name][self.rows] if name in self.table else None

    def hashes(self) -> NDArray[np.int64]:
        """Hashes of the identities of the images, int64 [N]."""
        known = self._told("hash")
        return super().hashes() if known is None else known

    def row(self, index: int) -> int:
        """The row of an image in the whole set and in the table."""
        return row_at(self.rows, index)

    def renew(self) -> None:
        """Reuse earlier results for images that are the same, and drop the others.

        This is called on the images of a set that are read first.
        """
        digest = blake2b(digest_size=16)
        files = self.stored_in()
        for column in stated(map(os.fspath, files), len(files)):
            digest.update(column.tobytes())
        for index in range(len(self)):
            digest.update(os.fsencode(os.path.abspath(self.name(index))) + b"\0")
        self.table.keep_at(place(f"set-{digest.hexdigest()}"))

    def subset(self: Some, indices: NDArray[np.int64]) -> Some:
        """Return the images at ``indices``, identified by their rows in the whole set."""
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
        """The files on disk that hold the images; if one of them changes, the images are checked again."""

    def values(self, index: int) -> Values:
        """The stored values of an image, [H, W, bands]."""
        return stored(self.content(index), "all" if self.format.pages == "bands" else 0)

    def pixels(self, index: int) -> Tensor:
        """An image in the form that views are made from."""
        return decoded(self.content(index)) if self.format.rgb else super().pixels(index)

    def read(self, index: int, read: Callable[[bytes], T]) -> tuple[int, T]:
        """Apply ``read`` to the bytes of an image or, if that fails, of the next readable image.

        Returns:
            The index of the image that was read, and the result of ``read``.
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
    """The content of a file, and its modification time in nanoseconds."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise BrokenImage("it is not a regular file")
    with open(path, "rb") as file:
        return file.read(), state.st_mtime_ns


class FileImages(EncodedImages):
    """Images in one file each.

    Args:
        paths: N files.
        labels: labels int64 [N], or None.
        root: folder from which the names of the images start; None means the common folder of the paths.
    """

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.int64] | None, root: str | Path | None = None) -> None:
        held = paths if isinstance(paths, Paths) else Paths.of(paths)
        super().__init__(labels, held.rows, held.table)
        self.root, self._above = root, held.root

    @property
    def paths(self) -> Paths:
        """The paths of the files; each is built on access."""
        return Paths(self.table, self._above, self.rows)

    def name(self, index: int) -> str:
        """The path of an image."""
        return self.paths.text(index)

    def content(self, index: int) -> bytes:
        """The bytes of a file; a pipe, on which reading would block, is broken."""
        content, changed = insistent(lambda: _whole(self.name(index)))
        self.compare(index, len(content), changed)
        return content

    def compare(self, index: int, size: int, changed: int) -> None:
        """Compare the size and modification time (in nanoseconds) of a file that was read."""

    def identities(self) -> Iterator[bytes]:
        """The identity of each image: its path from the root, and its size in bytes."""
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
