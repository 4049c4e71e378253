"""The base class of images, images in memory, and the data set."""

from __future__ import annotations

import copy
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor

from fastrm.data.decode import NOT_DECODED
from fastrm.data.formats import RGB, PixelFormat
from fastrm.data.index import Found, Table
from fastrm.data.stored import Values

Some = TypeVar("Some", bound="Images")
_KINDS_TOLD = 8
TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev", "eval", "test", "testing")
"""Names of validation folders, splits and files, in order of preference."""


class Images(ABC):
    """An ordered sequence of images, in files, in memory or elsewhere.

    Args:
        labels: labels int64 [N], or None.

    Attributes:
        format: the pixel format, which converts stored values to the input of a network.
        unreadable: the reasons for images that could not be read, by index.
        kept: the cached table with the hashes of the images; None if hashes are not cached.
    """

    NOUN: ClassVar[str] = "images"
    """The word for the elements in messages, in the plural."""

    def __init__(self, labels: NDArray[np.int64] | None) -> None:
        self._labels = labels
        self.format = RGB
        self.unreadable: dict[int, str] = {}
        self.kept: Found | None = None

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels int64 [N], or None."""
        return self._labels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def values(self, index: int) -> Values:
        """The stored values of an image, [H, W, bands]; raises one of ``BROKEN`` if it cannot be read."""

    def pixels(self, index: int) -> Tensor:
        """An image in the form that views are made from (:meth:`PixelFormat.fitted`); raises like :meth:`values`."""
        return self.format.fitted(self.values(index))

    def picture(self, index: int) -> Image.Image:
        """An image for display, 8-bit RGB, from the first three bands or from one; raises like :meth:`values`."""
        pixels = self.pixels(index)
        shown = (pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)).permute(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(shown.float().round().clamp(0, 255).byte().numpy()))

    def given(self, index: int) -> Any:
        """The argument of a user's augmentation: a PIL image for 8-bit gray or RGB.

        For other images, a tensor [bands, H, W] in their own dtype. Raises like :meth:`values`.
        """
        values = self.values(index)
        if values.dtype == np.uint8 and values.shape[2] in (1, 3):
            return Image.fromarray(values if values.shape[2] == 3 else values[..., 0]).convert("RGB")
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def formatted(self: Some, format: PixelFormat) -> Some:
        """The same images with another pixel format."""
        twin = copy.copy(self)
        twin.format = format
        return twin

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of an image in messages."""

    @abstractmethod
    def identities(self) -> Iterator[bytes]:
        """The identity of each image: bytes that differ between images."""

    def hashes(self) -> NDArray[np.int64]:
        """Hashes of the identities, int64 [N]."""
        if self.kept is not None and self.kept.table is not None:
            return self.kept.table["hash"]
        digests = (blake2b(one, digest_size=8).digest() for one in self.identities())
        numbers = (int.from_bytes(digest, "little", signed=True) for digest in digests)
        found = np.fromiter(numbers, np.int64, len(self))
        if self.kept is not None:
            self.kept.keep(Table({}, len(self)), {"hash": found})
        return found

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> Images:
        """Return the images at ``indices``."""

    def with_labels(self: Some, labels: NDArray[np.int64]) -> Some:
        """Return the same images with labels, int64 [N]."""
        twin = copy.copy(self)
        twin._labels, twin.unreadable = labels, {}
        return twin


class ArrayImages(Images):
    """Images in memory.

    Args:
        arrays: uint8 [N, H, W] (gray) or [N, H, W, 3] (RGB).
        labels: int64 [N], or None.
    """

    def __init__(self, arrays: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> None:
        super().__init__(labels)
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def values(self, index: int) -> Values:
        """uint8 [H, W, 1 or 3]."""
        values = self.arrays[index]
        return values[..., None] if values.ndim == 2 else values

    def name(self, index: int) -> str:
        """The index of the image."""
        return f"image {index}"

    def tensor(self) -> Tensor:
        """All images as uint8 [N, 1 or 3, H, W], in the same memory, unless colours become gray."""
        arrays = self.arrays
        if arrays.ndim == 4 and self.format.channels == 1:
            arrays = np.stack([self.pixels(index)[0].numpy() for index in range(len(self))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about read-only arrays; nothing writes to them
            pixels = torch.from_numpy(arrays)
        return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)

    def identities(self) -> Iterator[bytes]:
        """The identity of each image: its shape and pixels."""
        return map(self.identity, range(len(self)))

    def identity(self, index: int) -> bytes:
        """The identity of an image."""
        return repr(self.arrays.shape[1:]).encode() + self.arrays[index].tobytes()

    def subset(self, indices: NDArray[np.int64]) -> ArrayImages:
        """Return the images at ``indices``."""
        return ArrayImages(self.arrays[indices], None if self.labels is None else self.labels[indices])


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set: training images, and the images that a kNN classifier is built from and tested on."""

    name: str
    train: Images
    """The images for pre-training; their labels are not used."""
    bank: Images | None
    """Labelled images of the kNN bank; None without labels."""
    test: Images | None
    """Labelled images for testing; none of them is in ``bank``."""
    about: str
    """A description in one line."""
    format: PixelFormat | None = None
    """The format of the images; None until it is determined (:mod:`fastrm.data.settling`)."""

    @property
    def scored(self) -> dict[str, int]:
        """Number of images in ``bank`` and in ``test``; empty if there are none."""
        return {} if self.bank is None or self.test is None else {"bank": len(self.bank), "test": len(self.test)}

    def each(self, change: Callable[[Images], Images]) -> Source:
        """The set with a function applied to its images, once per object; the kNN images may be the training images."""
        changed: dict[int, Images] = {}

        def once(images: Images | None) -> Images | None:
            if images is None:
                return None
            if id(images) not in changed:
                changed[id(images)] = change(images)
            return changed[id(images)]

        train = once(self.train)
        assert train is not None
        return replace(self, train=train, bank=once(self.bank), test=once(self.test))

    def formatted(self, format: PixelFormat) -> Source:
        """The set with another pixel format."""
        return replace(self.each(lambda images: images.formatted(format)), format=format)

    def limited(self, most: int) -> Source:
        """The set with at most this many images in ``bank``, and in ``test``."""
        parts = [images and drawn(images, most) for images in (self.bank, self.test)]
        return replace(self, bank=parts[0], test=parts[1])


def drawn(images: Images, most: int) -> Images:
    """At most ``most`` images, drawn at random, in their order; the same ones each time."""
    if len(images) <= most:
        return images
    chosen = np.random.default_rng(0).permutation(len(images))[:most]
    return images.subset(np.sort(chosen)).formatted(images.format)


_FEATURES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}

LOOKED_FOR = "what Pillow reads here, such as .jpg, .png and .webp, or .npy"


def endings() -> frozenset[str]:
    """File name endings of the image formats that the installed Pillow decodes, such as ``.jpg``."""
    Image.init()
    absent = {kind for kind, feature in _FEATURES.items() if not features.check(feature)}
    decoded = (Image.OPEN.keys() | {"MPO"}) - NOT_DECODED - absent  # Pillow opens MPO as JPEG
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in decoded)


def natural(name: object) -> tuple[list[str | int], str]:
    """A sort key that puts ``9`` before ``10``."""
    parts = re.split(r"(\d+)", str(name))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(name)


def passed_over(kinds: Mapping[str, int]) -> str:
    """Describe the number of unused files by kind, largest first: ``"; skipped: 3 .txt, 1 hidden"``."""
    most = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    told = [f"{count:,} {kind}" for kind, count in most[:_KINDS_TOLD]]
    if rest := most[_KINDS_TOLD:]:
        told.append(f"{sum(count for _, count in rest):,} of {len(rest)} other kinds")
    return f"; skipped: {', '.join(told)}" if told else ""


def without_validation(
    name: str,
    train: Images,
    about: str,
    passed: Mapping[str, int],
    *,
    why: str = "there is no val folder",
    labelled: Images | None = None,
) -> Source:
    """A source whose labelled images, if it has labels, are split for kNN.

    Args:
        name: name of the set.
        train: training images.
        about: description of the set.
        passed: number of unused files by kind.
        why: why there are no validation images.
        labelled: images of ``train`` with labels; None means all, if any.
    """
    bank: Images | None = None
    test: Images | None = None
    labelled = train if labelled is None else labelled
    if labelled.labels is None:
        about += "; without labels"
    else:
        bank, test = held_out(labelled)
        tenth = "a tenth of the training images" if labelled is train else "a tenth of these"
        about += f"; {len(np.unique(labelled.labels))} classes; {why}: kNN is tested on {tenth}"
    return Source(name=name, train=train, bank=bank, test=test, about=about + passed_over(passed))


def held_out(images: Images) -> tuple[Images, Images]:
    """Split labelled images into nine tenths and a tenth, the same way every time."""
    order = np.random.default_rng(0).permutation(len(images))
    held = max(1, len(images) // 10)
    return images.subset(np.sort(order[held:])), images.subset(np.sort(order[:held]))
