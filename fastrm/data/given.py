"""Opens data that a script passes as an object: a Dataset, a list of paths, or an array."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastrm.data.encoded import FileImages
from fastrm.data.items import ItemImages, Items
from fastrm.data.list_index import by_index
from fastrm.data.mapped import MappedImages
from fastrm.data.paths import packed
from fastrm.data.pixels import array_of, whole_number
from fastrm.data.sources import ArrayImages, Images, Source, held_out, without_validation
from fastrm.errors import UsageError
from fastrm.files import at_home

TAKEN = (
    "a path, the name of a set, a map-style Dataset of images or (image, label), a list of paths, or an array "
    "[N, H, W, C]"
)


def open_given(data: Any, *, keep: bool = True) -> Source:
    """Open data that a script passes as an object.

    Args:
        data: the object.
        keep: whether to cache results about files for the next start.

    Raises:
        UsageError: it has another type, is empty, or its first items cannot be read.
    """
    _refuse(data)
    if isinstance(data, Tensor):
        data = array_of(data)
    if isinstance(data, np.ndarray) and data.dtype.kind not in "OUS":
        return open_array(data)
    if isinstance(data, np.ndarray | Sequence) and all(isinstance(path, str | Path) for path in data):
        return _open_paths(list(data), keep)
    return _open_items(Items(data))


def _refuse(data: Any) -> None:
    """Refuse objects that are not data, and say what to pass instead."""
    kind = type(data).__name__
    if isinstance(data, type):
        raise UsageError(f"data is the class {data.__name__}; give an object of it, as in {data.__name__}(…)")
    if isinstance(data, DataLoader):
        raise UsageError("data is a DataLoader; give its dataset: batches, order and workers are made here")
    # IterableDataset inherits a __getitem__ that raises; those of litdata and MosaicML have one of their own.
    indexed = getattr(type(data), "__getitem__", None) not in (None, Dataset.__getitem__)
    if isinstance(data, IterableDataset | Iterator) and not indexed:
        raise UsageError(
            f"data is a {kind}, whose items come in one order; give a map-style Dataset, with __len__ and "
            "__getitem__, or the path of its files, such as shards as in 'train-*.tar'"
        )
    if isinstance(data, Mapping):
        some = next(iter(data), "train")
        raise UsageError(f"data is a {kind}; give one part of it, as in data[{some!r:.40}]")
    if type(data).__module__.partition(".")[0] in ("pandas", "polars"):
        raise UsageError(
            f"data is a {kind} of {type(data).__module__.partition('.')[0]}; give a list of its paths, or write it to "
            "a .csv or .parquet file, and give its path"
        )
    if isinstance(data, AbstractSet):
        raise UsageError(f"data is a {kind}, which has no order; give a list, as in sorted(data)")
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        lacks = "is a Dataset without __len__" if isinstance(data, Dataset) else f"is a {kind}"
        raise UsageError(f"data {lacks}; it must be {TAKEN}")
    try:
        count = len(data)
    except (TypeError, NotImplementedError) as error:  # a tensor without dimensions; a Dataset that inherits __len__
        raise UsageError(f"data is a {kind} without a length ({error}); it must be {TAKEN}") from None
    if count == 0:
        raise UsageError(f"data is an empty {kind}; it must hold an image at least")


def _open_paths(paths: list[str | Path], keep: bool) -> Source:
    files = [Path(os.path.abspath(at_home(path))) for path in paths]
    if len(set(files)) < len(files):
        raise UsageError(f"data is a list of {len(files):,} paths, {len(files) - len(set(files)):,} of them twice")
    digest = blake2b(packed(map(str, files)), digest_size=16).hexdigest()

    def build() -> Source:
        return without_validation("paths", FileImages(files, None), f"{len(files):,} image files", {})

    return by_index([], digest, build, keep=keep)


class _Planes:
    """The images of an array [N, H, W, C], as tensors [C, H, W] with labels, if there are any."""

    def __init__(self, values: NDArray[Any], labels: NDArray[np.int64] | None) -> None:
        self.values, self.targets = values, labels

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        plane = self.values[index].transpose(2, 0, 1)
        image = torch.from_numpy(np.array(plane, dtype=plane.dtype.newbyteorder("="), order="C"))
        return image if self.targets is None else (image, int(self.targets[index]))


def open_array(
    values: NDArray[Any],
    *,
    name: str = "array",
    given: str = "data",
    labels: NDArray[np.int64] | None = None,
    notes: Sequence[str] = (),
) -> Source:
    """Open the images in an array.

    Args:
        values: [N, H, W, C] or [N, H, W].
        name: name of the set.
        given: description of the array as it was passed.
        labels: labels int64 [N], or None.
        notes: messages for the user.

    Raises:
        UsageError: the array has another shape.
    """
    shape = list(values.shape)
    if values.ndim == 3 and shape[-1] in (1, 3, 4):
        raise UsageError(f"{given} is an array of shape {shape}, which is one image; give [N, H, W, C]")
    if values.ndim not in (3, 4) or 0 in shape:
        raise UsageError(f"{given} is an array of shape {shape}; it must be [N, H, W, C], or [N, H, W] of gray images")
    if values.ndim == 4 and shape[3] > 4 and shape[1] < min(shape[2:]):
        raise UsageError(
            f"{given} is an array of shape {shape}, with channels before rows; it must be [N, H, W, C]: "
            "as an array by .transpose(0, 2, 3, 1), as a tensor by .permute(0, 2, 3, 1)"
        )
    if values.ndim == 4 and shape[3] == 1:
        values = values[..., 0]
    if values.dtype == np.uint8 and (values.ndim == 3 or values.shape[3] == 3):
        sides = "x".join(map(str, shape[1:3]))
        images = (MappedImages if isinstance(values, np.memmap) else ArrayImages)(values, labels)
        about = "; ".join([f"{name}: {len(images):,} images of {sides} pixels", *notes])
        return without_validation(name, images, about, {}, why="there are no validation images")
    planes = _Planes(values if values.ndim == 4 else values[..., None], labels)
    return _open_items(Items(planes, name=name, whole=True), notes)


def _open_items(items: Items, notes: Sequence[str] = ()) -> Source:
    train = ItemImages(items)
    about = [f"{len(items):,} items of {items.name}", *notes]
    if not items.same:
        about.append(
            "an item differs when it is read twice, so a resumed run is not exact: draw its random "
            "numbers from torch's, NumPy's or Python's global generators"
        )
    bank: Images | None = None
    test: Images | None = None
    if items.unseen is not None:
        about.append(f"there is no kNN, since {items.unseen}")
    elif not items.labelled or len(items) < 2:
        about.append(_unlabelled(items.first.label))
    else:
        bank, test = held_out(train)
        if items.known:
            about.append(f"{len(np.unique(items.labels())):,} classes")
        else:
            about.append("labels are read from each item when needed, since no attribute has them")
        about.append("kNN is tested on a tenth of the training images")
    return Source(name=items.name, train=train, bank=bank, test=test, about="; ".join(about))


def _unlabelled(label: Any) -> str:
    """Say that items are without labels, and what stands in the place of the first one's."""
    if getattr(label, "ndim", 0) >= 2 or isinstance(label, Image.Image):
        second = "the second part of an item is an image too, and is not used: views are made from the first"
        return f"without labels; {second}"
    if label is None or whole_number(label) is not None:  # below 0, it means that there is none
        return "without labels"
    met = " ".join(repr(label).split())[:40]
    return f"without labels: that of the first item is {met}, and labels are whole numbers from 0 up"
