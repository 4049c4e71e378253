"""Images that are stored encoded, in files or in parts of them, and decoded when they are asked for."""

from __future__ import annotations

import contextlib
import itertools
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrm.data.decode import BROKEN, BrokenImage, decode, inspect, reason
from fastrm.data.sources import Images
from fastrm.data.stored import Values, stored
from fastrm.errors import UsageError

try:  # a third faster than Pillow, but torchvision 0.29 announces that it will go
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # type: ignore[assignment, unused-ignore]

T = TypeVar("T")
_AT_ONCE = 1024


def decoded(content: bytes) -> Tensor:
    """A picture as uint8 [3, H, W], by the rules of :func:`fastrm.data.decode.decode`; raises as that."""
    if decode_jpeg is not None and inspect(content).plain == "JPEG":
        with contextlib.suppress(RuntimeError):  # Pillow says what is wrong, or reads it nevertheless
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return torch.from_numpy(np.array(decode(content))).permute(2, 0, 1)


class EncodedImages(Images):
    """Images whose encoded bytes can be had one by one, wherever they lie."""

    NOUN = "files"

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            OSError, BrokenImage: they cannot be read.
        """

    @abstractmethod
    def stored_in(self) -> Sequence[Path]:
        """The files on disk that hold the images: when one of them changes, the images are looked at again."""

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> EncodedImages:
        """Return the images at ``indices``."""

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


class FileImages(EncodedImages):
    """Images in files of their own.

    Args:
        paths: N files.
        labels: int64 [N], or None.
        root: the folder of the data, which the names of the images start from; None is what the paths have in common.
    """

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.int64] | None, root: Path | None = None) -> None:
        super().__init__(labels)
        self.paths = paths
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        """The bytes of a file; a pipe, where reading would wait for ever, is broken."""
        path = self.paths[index]
        if not path.is_file() and path.exists():
            raise BrokenImage("it is not a regular file")
        return path.read_bytes()

    def identities(self) -> Iterator[bytes]:
        """What tells each image from others: its path from the root on, and its size in bytes."""
        root = str(self.root or os.path.commonpath([path.parent for path in self.paths]))
        begin = 0 if root == os.curdir else len(root.rstrip(os.sep)) + 1
        starts = range(0, len(self.paths), _AT_ONCE)
        with ThreadPoolExecutor(_AT_ONCE // 64) as threads:  # waiting for the disk, mostly
            sizes = threads.map(lambda at: [_size(path) for path in self.paths[at : at + _AT_ONCE]], starts)
            for path, size in zip(self.paths, itertools.chain.from_iterable(sizes), strict=True):
                yield os.fsencode(str(path)[begin:].replace(os.sep, "/")) + b"\0%d" % size

    def stored_in(self) -> Sequence[Path]:
        """The files themselves."""
        return list(self.paths)

    def subset(self, indices: NDArray[np.int64]) -> FileImages:
        """Return the images at ``indices``."""
        labels = None if self.labels is None else self.labels[indices]
        return FileImages([self.paths[i] for i in indices], labels, self.root)


def _size(path: Path) -> int:
    """Bytes of a file; -1 where it cannot be looked at."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
