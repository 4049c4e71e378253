"""Keeps decoded images in memory, shared by all processes; each is decoded once, by the process that needs it first."""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fastrm.data.augmentation import View
from fastrm.data.decode import BROKEN
from fastrm.data.encoded import EncodedImages
from fastrm.data.measuring import spread_over
from fastrm.data.sources import Images
from fastrm.data.stored import DTYPES, Values
from fastrm.data.workers import locks
from fastrm.errors import UsageError
from fastrm.machine.memory import capacity, size

SHARE = 0.5
"""Fraction of the memory for the images of all processes on a machine."""
FEW = 0.03
"""Fraction of the memory for a set that is kept by default."""
_SAMPLED = 64
_MARGIN = 1.1
"""Safety factor of the size estimate from a sample."""
_ALIGNED = 8


class Room(NamedTuple):
    """The memory that the images of a set take."""

    full: int
    """Bytes at full size."""
    shrunk: int
    """Bytes if their shorter side is at most ``side``."""
    side: int
    """Side in pixels at which even the smallest crop has as many pixels as its view."""


def room_for(images: Images, views: Sequence[View], image_size: int) -> Room:
    """Estimate the memory of a set from a sample that is spread evenly over it.

    Args:
        images: the images, with their format.
        views: views that are made of them.
        image_size: side of the views, in pixels.
    """
    side = max(int(np.ceil(view.side(image_size) / np.sqrt(view.crop_scale[0]))) for view in views)
    full = shrunk = read = 0
    for index in spread_over(len(images), _SAMPLED):
        with suppress(*BROKEN):  # reported when the image is read
            values = _values(images, index)
            read += 1
            full += values.nbytes
            scale = min(1.0, side / min(values.shape[:2]))
            shrunk += int(values.nbytes * scale * scale)
    each = _MARGIN * len(images) / max(1, read)
    return Room(int(full * each), int(shrunk * each), side)


def _values(images: Images, index: int) -> Values:
    """The values of an image to keep, [H, W, bands]."""
    if images.format.rgb:
        return images.pixels(index).permute(1, 2, 0).numpy()
    return images.values(index)


def keep(images: Images, views: Sequence[View], image_size: int, *, processes: int = 1) -> tuple[KeptImages, str]:
    """Return the images with a cache in memory, and a description of its size.

    Args:
        images: the images, with their format.
        views: views that are made of them.
        image_size: side of the views, in pixels.
        processes: number of processes on this machine; each keeps all images.

    Raises:
        UsageError: they do not fit, even when shrunk.
    """
    room, there = room_for(images, views, image_size), capacity(torch.device("cpu"))
    bound = int(SHARE * there / processes) if there is not None else room.full
    whose = f"half of the memory{f' of {processes} processes' if processes > 1 else ''}, {size(bound)}"
    if room.full <= bound:
        return KeptImages(images, room.full, None), f"about {size(room.full)} of decoded images are kept in memory"
    if room.shrunk <= bound:
        words = (
            f"the decoded images would take {size(room.full)}, more than {whose}: their shorter side is shrunk to "
            f"{room.side} pixels, which changes the views a little, and about {size(room.shrunk)} are kept"
        )
        return KeptImages(images, room.shrunk, room.side), words
    raise UsageError(
        f"--loader memory: the images take {size(room.shrunk)} even if their shorter side is shrunk to {room.side} "
        f"pixels, more than {whose}; give --loader torch or auto"
    )


def keep_few(images: EncodedImages, *, processes: int = 1) -> tuple[KeptImages, str] | None:
    """Return the images with a cache, and a description, if they are known to take little memory at full size.

    Args:
        images: the images, with their format.
        processes: number of processes on this machine; each keeps all images.

    Returns:
        None if they take more memory, or if their sizes are unknown.
    """
    looks, there = images.looks, capacity(torch.device("cpu"))
    if looks is None or there is None:
        return None
    each = looks.size.astype(np.int64).prod(axis=1)
    if images.format.rgb:
        each *= 3
    else:
        each *= np.array([np.dtype(name).itemsize for name in DTYPES])[looks.dtype] * looks.bands.astype(np.int64)
        each *= looks.pages if images.format.pages == "bands" else 1
    room = int((each + _ALIGNED).sum()) + _ALIGNED
    if room > FEW * there / processes:
        return None
    return KeptImages(images, room, None), f"the decoded images are kept in memory, {size(room)}, as they are few"


class KeptImages(Images):
    """Images that are decoded once.

    Forked loader processes share the memory; spawned ones share it through torch.

    Args:
        images: images to decode.
        most: limit in bytes; further images are decoded each time.
        side: side to which the shorter side is shrunk, or None.
    """

    def __init__(self, images: Images, most: int, side: int | None) -> None:
        super().__init__(None)
        self.images, self.side, self.format = images, side, images.format
        self._room = _shared(max(most, _ALIGNED))
        # One row per image: offset (0 for none), height, width, bands, dtype. The last row has the size in use.
        self._places = _shared(8 * 5 * (len(images) + 1)).view(torch.int64).view(-1, 5)
        self._places[-1, 0] = _ALIGNED
        with locks():
            self._lock = multiprocessing.Lock()

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels int64 [N], or None."""
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def values(self, index: int) -> Values:
        """The values of an image [H, W, bands], from the cache or newly decoded."""
        with self._lock:
            offset, height, width, bands, kind = self._places[index].tolist()
        if offset:
            dtype = np.dtype(DTYPES[kind])
            count = height * width * bands * dtype.itemsize
            kept: Values = self._room[offset : offset + count].numpy().view(dtype).reshape(height, width, bands)
            return kept
        values = np.ascontiguousarray(self._shrunk(_values(self.images, index)))
        with self._lock:
            offset = int(self._places[-1, 0])
            end = offset + -(-values.nbytes // _ALIGNED) * _ALIGNED
            if end <= len(self._room):
                self._places[-1, 0] = end
        if end <= len(self._room):
            self._room[offset : offset + values.nbytes].numpy()[:] = values.reshape(-1).view(np.uint8)
            row = torch.tensor([offset, *values.shape, DTYPES.index(values.dtype.name)], device="cpu")
            with self._lock:
                self._places[index] = row
        return values

    def _shrunk(self, values: Values) -> Values:
        if self.side is None or min(values.shape[:2]) <= self.side:
            return values
        scale = self.side / min(values.shape[:2])
        size = [max(self.side, round(length * scale)) for length in values.shape[:2]]
        planes = torch.from_numpy(values.transpose(2, 0, 1).copy())
        wide = planes if planes.dtype == torch.uint8 else planes.double()
        resized = functional.interpolate(wide[None], size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        if values.dtype.kind in "ui" and values.dtype != np.uint8:
            resized = resized.round()
        shrunk: Values = resized.astype(values.dtype)
        return shrunk

    def pixels(self, index: int) -> Tensor:
        """An image in the form that views are made from."""
        values = self.values(index)
        if self.format.rgb:
            return torch.from_numpy(values).permute(2, 0, 1)
        return self.format.fitted(values)

    def name(self, index: int) -> str:
        """The name of the image."""
        return self.images.name(index)

    def identities(self) -> Iterator[bytes]:
        """The identity of each image."""
        return self.images.identities()

    def subset(self, indices: NDArray[np.int64]) -> Images:
        """Return the images at ``indices``, without a cache."""
        return self.images.subset(indices)


def _shared(count: int) -> Tensor:
    """Zero bytes that loader processes share; memory is allocated when it is written."""
    if multiprocessing.get_start_method() == "fork":
        memory: Any = mmap.mmap(-1, count)
        return torch.frombuffer(memory, dtype=torch.uint8)
    return torch.zeros(count, dtype=torch.uint8, device="cpu").share_memory_()
