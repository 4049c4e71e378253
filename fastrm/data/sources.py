"""Images that are trained on, wherever they are, and the data set that they make up."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torch import Tensor

from fastrm.data.decode import NOT_DECODED

_KINDS_TOLD = 8


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
    name: str, train: Images, about: str, passed: Mapping[str, int], *, why: str = "there is no val folder"
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
