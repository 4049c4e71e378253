"""Arrays of images in .npy and HDF5 files, mapped into memory, which all processes share.

A contiguous HDF5 array is mapped in its file. A chunked or compressed one has no random access, and is copied into the
cache once, as .npy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastrm.data.columns import Wanted
from fastrm.data.copies import copied, folder_of, said, state
from fastrm.data.given import open_array
from fastrm.data.index import TICK, look_up
from fastrm.data.mapped import Mapped, order
from fastrm.data.rows import as_label, numbered
from fastrm.data.sources import Source
from fastrm.errors import UsageError, first_line
from fastrm.machine.memory import size as in_words
from fastrm.packages import optional
from fastrm.terminal.progress import bar

_IMAGES = ("images", "image", "x", "data")
_LABELS = ("labels", "label", "y")
_AT_ONCE = 2**25
"""Bytes to copy at a time."""


def open_array_file(files: Sequence[Path], data: str, wanted: Wanted, keep: bool) -> Source:
    """Open the images in an array [N, H, W] or [N, H, W, C].

    In an HDF5 file, it is the array ``images``, ``x`` or ``data``, or the only one with 3 or 4 dimensions; labels are
    in ``labels`` or ``y``. The labels of ``x.npy`` are in ``x_labels.npy`` or ``labels.npy``.

    Args:
        files: a single file.
        data: value of ``--data``.
        wanted: requested arrays in an HDF5 file.
        keep: whether to cache the result for the next start.

    Raises:
        UsageError: the file cannot be read, the array is ambiguous, or it is not an array of images.
    """
    if len(files) > 1:
        raise UsageError(f"--data {data} names {len(files):,} files of arrays; give one")
    path = files[0]
    about = os.stat(path)
    if path.suffix.lower() == ".npy":
        wanted.refuse(data)
        values, labels, notes = _npy(path, data)
    else:
        values, labels, notes = _hdf5(path, data, wanted)
    numbers = None
    if labels is not None:
        try:
            numbers = numbered([as_label(value) for value in labels.reshape(-1).tolist()])
        except UsageError as error:
            if wanted.label is not None:
                raise UsageError(f"--data {data}: the labels hold {error}") from None
            notes.append(f"labels are not used, since they hold {error}")
    source = open_array(values, name=path.stem, given=f"--data {data}", labels=numbers, notes=notes)
    if keep and about.st_mtime_ns <= time.time_ns() - TICK:  # otherwise it may change again with the same time
        where = "array", os.path.realpath(path), notes[0]
        source.train.kept = look_up(where, (*where, about.st_size, about.st_mtime_ns), lambda table: True)
    return source


def _npy(path: Path, data: str) -> tuple[NDArray[Any], NDArray[Any] | None, list[str]]:
    values = _mapped(path, data)
    count = values.shape[0] if values.ndim else 0
    stem, notes = path.stem, [str(path)]
    own = [f"{stem}_labels.npy", *([f"{stem.replace('images', 'labels')}.npy"] if "images" in stem else [])]
    for name in (*own, "labels.npy"):
        beside = path.with_name(name)
        if beside == path or not beside.is_file():
            continue
        labels = _mapped(beside, data)
        if labels.shape[:1] == (count,) and labels.size == count:
            return values, labels, [*notes, f"labels in {beside}"]
        if name in own:
            raise UsageError(f"--data {data}: {beside} has the shape {list(labels.shape)}; it must be [{count}]")
        notes.append(f"{beside} has the shape {list(labels.shape)}, and is not used")
    return values, None, notes


def _mapped(path: Path, data: str) -> NDArray[Any]:
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"--data {data}: {path} cannot be read as an array: {first_line(error)}") from None
    if not isinstance(held, np.memmap):
        raise UsageError(f"--data {data}: {path} holds no array, or several")
    return Mapped(str(path), held.dtype, "r", held.offset, held.shape, order(held))


def _hdf5(path: Path, data: str, wanted: Wanted) -> tuple[NDArray[Any], NDArray[Any] | None, list[str]]:
    h5py = optional("h5py", extra="hdf5", wanted_by=f"--data {data}")
    try:
        with h5py.File(path, "r") as file:
            held: dict[str, Any] = {}
            file.visititems(lambda name, item: held.update({name: item} if isinstance(item, h5py.Dataset) else {}))
            image = _chosen(held, wanted.image, "image", [n for n in held if held[n].ndim in (3, 4)], _IMAGES, data)
            count = len(held[image])
            fitting = [n for n in held if n != image and held[n].ndim and held[n].size == len(held[n]) == count]
            named = [n for n in fitting if _last(n) in _LABELS]
            near = [n for n in named if n.rpartition("/")[0] == image.rpartition("/")[0]]
            label = wanted.label
            if label is not None or named:
                label = _chosen(held, label, "label", near or named, _LABELS, data)
                if label not in fitting:
                    raise UsageError(
                        f"--label-column {label}: it has the shape {list(held[label].shape)}; it must be [{count}]"
                    )
            values, notes = _values(held[image], path, data)
            labels = None if label is None else np.asarray(held[label])
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--data {data}: {path} cannot be read as HDF5: {first_line(error)}") from None
    about = f"{image} in {path}" + (f", labels in {label}" if label else "")
    return values, labels, [about, *notes]


def _last(name: str) -> str:
    return name.rpartition("/")[2].casefold()


def _chosen(
    held: dict[str, Any], wanted: str | None, what: str, fitting: list[str], names: Sequence[str], data: str
) -> str:
    """The requested array, or the only one that fits, or the only one of these with a usual name."""
    listed = ", ".join(f"{name} {list(array.shape)}" for name, array in list(held.items())[:20]) or "none"
    if wanted is not None:
        if wanted.strip("/") in held:
            return wanted.strip("/")
        raise UsageError(f"--{what}-column {wanted}: --data {data} has no such array; it has {listed}")
    named = [name for name in fitting if _last(name) in names]
    if len(found := fitting if len(fitting) == 1 else named) == 1:
        return found[0]
    raise UsageError(
        f"--data {data} has {'several arrays' if fitting else 'no array'} that may be meant; it has {listed}: give "
        f"--{what}-column"
    )


def _values(array: Any, path: Path, data: str) -> tuple[NDArray[Any], list[str]]:
    """An array in an HDF5 file, mapped in the file or as a copy, with messages for the user."""
    if array.dtype.kind not in "uif" or 0 in array.shape:
        raise UsageError(
            f"--data {data}: {array.name} holds {array.dtype} {list(array.shape)}, which is no array of images"
        )
    offset = array.id.get_offset()
    if array.chunks is None and offset is not None and not array.is_virtual and not array.external:
        held = Mapped(str(path), array.dtype, "r", offset, array.shape)
        if np.array_equal(held[0], array[0]) and np.array_equal(held[-1], array[-1]):
            return held, []

    def write(partial: Path) -> None:
        out = np.lib.format.open_memmap(partial, mode="w+", dtype=array.dtype, shape=array.shape)
        step = max(1, _AT_ONCE // max(1, array.nbytes // len(array)))
        with bar(f"copy of {array.name} in {path.name}, {in_words(array.nbytes)}", len(array)) as task:
            for start in range(0, len(array), step):
                out[start : start + step] = array[start : start + step]
                task.advance(min(step, len(array) - start))
        out.flush()

    copy = copied(data, folder_of("hdf5", state(path), array.name) / "array.npy", array.nbytes, write)
    return _mapped(copy, data), [said(array.nbytes)]
