"""Images of a map-style Dataset of the user."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, get_worker_info

from fastrm.data.decode import BrokenImage, told
from fastrm.data.pixels import LABEL_KEY, Item, digest, parted, values_in, whole_number
from fastrm.data.scan import MOST
from fastrm.data.seeding import seeded
from fastrm.data.sources import Images
from fastrm.data.stored import Values
from fastrm.errors import UsageError
from fastrm.terminal.progress import tracked

_LOOKED_AT = 16
"""Smallest number of items that identify a large data set."""
_LABELS = ("targets", "labels", "_labels")  # torchvision's Food101 and others have the last


class Items:
    """A map-style Dataset: an object with ``len`` and ``[index]``; its parts share the information about it.

    Args:
        data: Dataset whose items are an image, (image, label), (image, label, more), or a dict with ``image`` and
            ``label``.
        whole: identify it by all of its items instead of some.

    The training process reads items from a copy: files that a Dataset opens on first access must be opened again in
    each loader process, because processes that share an open file move each other's position in it.

    Attributes:
        name: name of its class.
        first: the first item that can be read.
        unseen: why the first item is not an image for the built-in augmentations and the evaluations; None if it is
            one.
        same: whether an item is the same when it is read twice under the same random numbers.
        labelled: whether its items have labels that are whole numbers.
        known: whether the labels are known without reading each item.
    """

    def __init__(self, data: Any, *, name: str | None = None, whole: bool = False) -> None:
        self.data, self._here = data, apart(data)
        self.name = name or type(data).__name__
        self._count = len(data)
        place, self.first = self._first()
        self.same = whole or self._same(place)
        self.unseen = _problem(self.first.image, f"item {place} of {self.name}")
        labels = told_labels(data)
        number = whole_number(self.first.label)  # below 0, as -1 in torchvision's STL10, it means that there is none
        self.labelled = number is not None and number >= 0 and (labels is None or labels.min() >= 0)
        self._labels = labels if labels is not None and self.labelled and self._agree(labels) else None
        self.known = self._labels is not None
        self._mark = fingerprint(data)
        # A power of two, so that a Dataset that has grown keeps most of these items.
        self._apart = 1 if whole else 2 ** max(0, (self._count // _LOOKED_AT).bit_length() - 1)

    def __len__(self) -> int:
        return self._count

    def item(self, place: int) -> Item:
        """An item under its own random numbers, which are the same each time.

        Raises:
            BrokenImage: the Dataset raises, or its item has no image.
        """
        with seeded(0, 0, place):
            return self.drawn(place)

    def drawn(self, place: int) -> Item:
        """An item under the current random numbers; raises like :meth:`item`."""
        data = self._here if get_worker_info() is None else self.data
        with told():
            return parted(data[place])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_here": None}  # to a loader process

    def labels(self) -> NDArray[np.int64]:
        """All labels. Unless they are known, each item is read once, which takes as long as an epoch in one process.

        Raises:
            UsageError: an item has none, or a negative one.
        """
        if self._labels is None:
            shown = tracked(range(len(self)), f"labels of {len(self):,} items of {self.name}", len(self))
            self._labels = np.array([self._label(place) for place in shown], dtype=np.int64)
        return self._labels

    def _label(self, place: int) -> int:
        try:
            label = self.item(place).label
        except BrokenImage:  # it is left out, and its label never used
            return 0
        number = whole_number(label)
        if number is None or number < 0:
            raise UsageError(f"data: the label of item {place} of {self.name} is {label!r:.40}; it must be from 0 up")
        return number

    def _first(self) -> tuple[int, Item]:
        """The first readable item, and its index."""
        why = ""
        for place in range(self._count):
            try:
                return place, self.item(place)
            except BrokenImage as error:
                why = why or str(error)
            if place >= MOST * self._count:
                break
        raise UsageError(f"data: item 0 of {self.name} cannot be read: {why}")

    def _same(self, place: int) -> bool:
        try:
            return digest(self.item(place).image) == digest(self.first.image)
        except BrokenImage:
            return False

    def fixed(self) -> bool:
        """Whether some items are independent of the random numbers."""
        for place in {0, self._count // 2, self._count - 1}:
            try:
                found = set()
                for epoch in range(2):
                    with seeded(0, epoch, place):
                        found.add(digest(self.drawn(place).image))
            except BrokenImage:
                continue
            if len(found) > 1:
                return False
        return True

    def _agree(self, labels: NDArray[np.int64]) -> bool:
        """Whether some items have these labels; a Dataset may change its labels when it returns items."""
        for place in {0, self._count // 2, self._count - 1}:
            try:
                if whole_number(self.item(place).label) != labels[place]:
                    return False
            except BrokenImage:
                continue
        return True

    def identity(self, place: int) -> bytes:
        """The identity of an item: its index, and the fingerprint of the Dataset.

        Without a fingerprint, the content of some items is used: the first, the last, and evenly spaced ones.
        """
        identity = f"{place}\0{self._mark or ''}".encode()
        if self._mark is None and self.same and (place % self._apart == 0 or place == self._count - 1):
            try:
                identity += digest(self.item(place).image)
            except BrokenImage:
                identity += b"broken"
        return identity


class ItemImages(Images):
    """Images of a Dataset, or of some of its places.

    Args:
        items: the Dataset.
        places: int64 [N], or None for all.
    """

    NOUN = "items"

    def __init__(self, items: Items, places: NDArray[np.int64] | None = None) -> None:
        super().__init__(None)
        self.items = items
        self._places = np.arange(len(items)) if places is None else places

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels int64 [N], or None; :meth:`Items.labels` describes their cost."""
        return self.items.labels()[self._places] if self.items.labelled else None

    def __len__(self) -> int:
        return len(self._places)

    def values(self, index: int) -> Values:
        """The values of an item under its own random numbers, which are the same each time."""
        return values_in(self.items.item(int(self._places[index])).image, self.format.channels)

    def drawn(self, index: int) -> Tensor:
        """The pixels of an item under the current random numbers."""
        return self.format.fitted(values_in(self.given(index), self.format.channels))

    def given(self, index: int) -> Any:
        """The image as the Dataset returns it, under the current random numbers."""
        return self.items.drawn(int(self._places[index])).image

    def name(self, index: int) -> str:
        """The index in the Dataset."""
        return f"item {self._places[index]} of {self.items.name}"

    def identities(self) -> Iterator[bytes]:
        """The identity of each image, see :meth:`Items.identity`."""
        return (self.items.identity(int(place)) for place in self._places)

    def subset(self, indices: NDArray[np.int64]) -> ItemImages:
        """Return the images at ``indices``."""
        return ItemImages(self.items, self._places[indices])


def _problem(image: Any, name: str) -> str | None:
    try:
        values_in(image)
    except BrokenImage as error:
        return f"{name} cannot be seen as an image: {error}"
    return None


def apart(data: Any) -> Any:
    """A shallow copy of a Dataset and of the Datasets in it, which opens its own files."""
    try:
        twin = copy.copy(data)
    except Exception:  # whatever objects raise that do not want to be copied
        return data
    for name, value in getattr(twin, "__dict__", {}).items():
        if isinstance(value, Dataset):
            twin.__dict__[name] = apart(value)
        elif isinstance(value, list | tuple) and any(isinstance(part, Dataset) for part in value[:1]):
            twin.__dict__[name] = [apart(part) for part in value]
        elif type(value) is dict:
            twin.__dict__[name] = dict(value)
    return twin


def told_labels(data: Any) -> NDArray[np.int64] | None:
    """Labels int64 [N] that a Dataset has without reading its images: in an attribute, a column, or its parts."""
    if isinstance(data, Subset):
        inner = told_labels(data.dataset)
        return None if inner is None else inner[np.asarray(data.indices)]
    if isinstance(data, ConcatDataset):
        parts = [part for part in map(told_labels, data.datasets) if part is not None]
        return np.concatenate(parts) if len(parts) == len(data.datasets) else None
    if isinstance(data, TensorDataset):
        return _integers(data.tensors[1], len(data)) if len(data.tensors) > 1 else None
    if LABEL_KEY in (getattr(data, "column_names", None) or ()):  # HuggingFace's
        return _integers(data[LABEL_KEY], len(data))
    found = (_integers(getattr(data, name, None), len(data)) for name in _LABELS)
    return next((labels for labels in found if labels is not None), None)


def _integers(labels: Any, count: int) -> NDArray[np.int64] | None:
    """Whole numbers, int64 [N]; None if it is something else."""
    if isinstance(labels, Tensor):
        labels = labels.cpu()
    try:
        values = np.asarray(labels)
    except (ValueError, TypeError, RuntimeError):  # a list of lists of several lengths
        return None
    right = values.shape == (count,) and np.issubdtype(values.dtype, np.integer)
    return values.astype(np.int64) if right else None


def fingerprint(data: Any) -> str | None:
    """The fingerprint of a Dataset: its ``fingerprint``, a str or a method, if it has one."""
    for name in ("fingerprint", "_fingerprint"):
        found = getattr(data, name, None)
        found = found() if callable(found) else found
        if isinstance(found, str) and found:
            return found
    return None
