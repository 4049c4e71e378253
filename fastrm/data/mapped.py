"""Arrays of images in files, mapped into memory, which all processes share."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastrm.data.sources import ArrayImages, Images
from fastrm.data.stored import Values


class Mapped(np.memmap):
    """An array in a file; pickled, it is only the path, which a spawned process maps again."""

    def __reduce__(self) -> str | tuple[Any, ...]:
        if not isinstance(self.base, mmap.mmap):  # a part of one
            return np.asarray(self).__reduce__()
        return Mapped, (str(self.filename), self.dtype, "r", self.offset, self.shape, order(self))


def order(values: NDArray[Any]) -> Literal["C", "F"]:
    """The memory order of an array."""
    return "F" if values.flags.f_contiguous and not values.flags.c_contiguous else "C"


class MappedImages(ArrayImages):
    """Images of an array in a file; subsets are not copied."""

    def subset(self, indices: NDArray[np.int64]) -> PlacedImages:  # type: ignore[override]
        """Return the images at ``indices``."""
        return PlacedImages(self, indices, None if self.labels is None else self.labels[indices])


class PlacedImages(Images):
    """Some of the images of an array.

    Args:
        whole: the array.
        places: indices in the array, int64 [N].
        labels: int64 [N], or None.
    """

    def __init__(self, whole: MappedImages, places: NDArray[np.int64], labels: NDArray[np.int64] | None) -> None:
        super().__init__(labels)
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def values(self, index: int) -> Values:
        """uint8 [H, W, 1 or 3]."""
        return self._whole.values(int(self._places[index]))

    def name(self, index: int) -> str:
        """The index in the array."""
        return self._whole.name(int(self._places[index]))

    def identities(self) -> Iterator[bytes]:
        """The identities of the images, as in the array."""
        return (self._whole.identity(int(place)) for place in self._places)

    def subset(self, indices: NDArray[np.int64]) -> PlacedImages:
        """Return the images at ``indices``."""
        labels = None if self.labels is None else self.labels[indices]
        return PlacedImages(self._whole, self._places[indices], labels)
