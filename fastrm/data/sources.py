"""Images that are trained on, in memory or in files."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor

from fastrm.data.decode import BROKEN, NOT_DECODED, BrokenImage, decode, reason, stored
from fastrm.errors import UsageError

T = TypeVar("T")
_KINDS_TOLD = 8
_AT_ONCE = 1024


class Images(ABC):
    """Images in an order, as RGB pictures; wherever they are.

    Args:
        labels: int64 [N], or None.

    Attributes:
        unreadable: what is wrong with the images that could not be read, by index.
    """

    NOUN: ClassVar[str] = "images"
    """What each of them is, in the plural."""

    def __init__(self, labels: NDArray[np.int64] | None) -> None:
        self._labels = labels
        self.unreadable: dict[int, str] = {}

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """int64 [N], or None."""
        return self._labels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Image.Image:
        """An image as RGB of 8 bits per channel; one of ``BROKEN`` is raised where it cannot be read."""

    def given(self, index: int) -> Any:
        """What a callable of the user's is given to make views of; raises as ``[index]``."""
        return self[index]

    @abstractmethod
    def name(self, index: int) -> str:
        """What the user knows an image by."""

    @abstractmethod
    def identities(self) -> Iterator[bytes]:
        """What tells each image from others."""

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> Images:
        """Return the images at ``indices``."""


class ArrayImages(Images):
    """Images held in memory.

    Args:
        pixels: uint8 [N, H, W] (gray) or [N, H, W, 3] (RGB).
        labels: int64 [N], or None.
    """

    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        super().__init__(labels)
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def name(self, index: int) -> str:
        """Its number."""
        return f"image {index}"

    def tensor(self) -> Tensor:
        """The same memory as uint8 [N, 1 or 3, H, W]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an array that cannot be written, which nothing does
            pixels = torch.from_numpy(self.pixels)
        return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)

    def identities(self) -> Iterator[bytes]:
        """What tells each image from others: its shape and pixels."""
        shape = repr(self.pixels.shape[1:]).encode()
        return (shape + image.tobytes() for image in self.pixels)

    def subset(self, indices: NDArray[np.int64]) -> ArrayImages:
        """Return the images at ``indices``."""
        return ArrayImages(self.pixels[indices], None if self.labels is None else self.labels[indices])


class FileImages(Images):
    """Images in files, decoded when they are asked for.

    Args:
        paths: N files.
        labels: int64 [N], or None.
        root: the folder of the data, which the names of the images start from; None is what the paths have in common.
    """

    NOUN = "files"

    def __init__(self, paths: Sequence[Path], labels: NDArray[np.int64] | None, root: Path | None = None) -> None:
        super().__init__(labels)
        self.paths = paths
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return decode(self.content(index))

    def given(self, index: int) -> Image.Image | Tensor:
        """The picture; gray of 16 bits as a tensor, uint16 [1, H, W]."""
        picture = stored(self.content(index))
        return picture if isinstance(picture, Image.Image) else torch.from_numpy(picture)[None]

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        """The bytes of a file.

        Raises:
            OSError, BrokenImage: it cannot be read, or is no file; reading a pipe would wait for ever.
        """
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

    def stored_in(self) -> list[Path]:
        """The files on disk that hold the images."""
        return list(self.paths)

    def read(self, index: int, read: Callable[[bytes], T]) -> tuple[int, T]:
        """Apply ``read`` to the bytes of a file, or where that fails to those of the next one that it can read.

        Returns:
            The index of the file that was read, and what ``read`` made of it.
        """
        for step in range(len(self.paths)):
            at = (index + step) % len(self.paths)
            if at in self.unreadable:
                continue
            try:
                return at, read(self.content(at))
            except BROKEN as error:
                self.unreadable[at] = reason(error)
        raise UsageError(f"none of the {len(self.paths)} image files can be read; the first is {self.paths[0]}")

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


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: what is trained on, and what a kNN classifier is built from and tried on."""

    name: str
    train: Images
    """The images for pre-training; their labels are not used."""
    bank: Images | None
    """Labelled images that a kNN classifier looks its neighbours up in; None where there are no labels."""
    test: Images | None
    """Labelled images that it is tried on; none of them is in ``bank``."""
    about: str
    """One line for the person who starts the run."""


_FEATURES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}

LOOKED_FOR = "what Pillow reads here, such as .jpg, .png and .webp"


def endings() -> frozenset[str]:
    """How the names of pictures end that Pillow, as it is installed and extended here, decodes: ``.jpg`` and so on."""
    Image.init()
    absent = {kind for kind, feature in _FEATURES.items() if not features.check(feature)}
    decoded = Image.OPEN.keys() - NOT_DECODED - absent
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in decoded)


def natural(name: object) -> tuple[list[str | int], str]:
    """A key to sort by that puts ``9`` before ``10``."""
    parts = re.split(r"(\d+)", str(name))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(name)


def passed_over(kinds: Mapping[str, int]) -> str:
    """Say how many files of which kinds are not used, the most first: ``"; passed over: 3 .txt, 1 hidden"``."""
    most = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    told = [f"{count:,} {kind}" for kind, count in most[:_KINDS_TOLD]]
    if rest := most[_KINDS_TOLD:]:
        told.append(f"{sum(count for _, count in rest):,} of {len(rest)} other kinds")
    return f"; passed over: {', '.join(told)}" if told else ""


def without_validation(
    name: str, train: FileImages, about: str, passed: Mapping[str, int], *, why: str = "there is no val folder"
) -> Source:
    """A source whose labelled images, if it has labels, are split for kNN; ``why`` says why there are no others."""
    bank: Images | None = None
    test: Images | None = None
    if train.labels is None:
        about += "; without labels"
    else:
        bank, test = held_out(train)
        about += f"; {len(np.unique(train.labels))} classes; {why}: kNN is tried on a tenth of those trained on"
    return Source(name=name, train=train, bank=bank, test=test, about=about + passed_over(passed))


def held_out(images: Images) -> tuple[Images, Images]:
    """Split labelled images into nine tenths and a tenth, the same way every time."""
    order = np.random.default_rng(0).permutation(len(images))
    held = max(1, len(images) // 10)
    return images.subset(np.sort(order[held:])), images.subset(np.sort(order[:held]))
