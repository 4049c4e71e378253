"""The named sets, which are small enough for memory; each is read in its published form, or generated."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastrm.data.patches import photo_patches
from fastrm.data.sources import ArrayImages, Source
from fastrm.errors import UsageError
from fastrm.settings.config import check_choice

NAMED = ("digits", "fashion-mnist", "cifar10", "cifar100", "stl10", "photo-patches", "synthetic")


def open_named(name: str, root: Path) -> Source:
    """Open the set ``name``, one of ``NAMED``, from the folder ``root``; it is downloaded there if missing.

    Raises:
        UsageError: there is no such set, it is missing and cannot be downloaded, or its files are damaged.
    """
    openers: dict[str, Callable[[], Source]] = {
        "digits": _digits,
        "synthetic": _synthetic,
        "photo-patches": lambda: _arrays("photo-patches", *photo_patches()),
        "fashion-mnist": lambda: _fashion_mnist(root),
        "cifar10": lambda: _cifar("CIFAR10", root),
        "cifar100": lambda: _cifar("CIFAR100", root),
        "stl10": lambda: _stl10(root),
    }
    check_choice("data", name, openers)
    return openers[name]()


def _arrays(name: str, train: ArrayImages, test: ArrayImages) -> Source:
    shape = "x".join(map(str, train.arrays.shape[1:3]))
    about = f"{name}: {len(train):,} images of {shape} pixels; {len(test):,} for validation"
    return Source(name=name, train=train, bank=train, test=test, about=about)


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    every = ArrayImages(pixels, bunch.target.astype(np.int64))
    return _arrays("digits", every.subset(order[360:]), every.subset(order[:360]))


def _synthetic() -> Source:
    """Generated coloured gratings of ten orientations, for tests of speed and set-up."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64]

    def make(count: int) -> ArrayImages:
        labels = rng.integers(0, 10, count)
        angle = labels * (np.pi / 10) + rng.normal(0, 0.05, count)
        phase, frequency = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.3, 0.6, count)
        across = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
        wave = np.sin(frequency[:, None, None] * across + phase[:, None, None])
        colour = rng.uniform(40, 120, (count, 1, 1, 3))
        pixels = 128 + wave[..., None] * colour + rng.normal(0, 8, (count, 64, 64, 3))
        return ArrayImages(np.clip(pixels, 0, 255).astype(np.uint8), labels.astype(np.int64))

    return _arrays("synthetic", make(2048), make(256))


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, plain or gzip (the format is described on the MNIST page of Y. LeCun)."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        zero, kind, ndim = struct.unpack(">HBB", file.read(4))
        if zero != 0 or kind != 8:
            raise UsageError(f"--data-root: {path} is not an IDX file of bytes")
        shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        return np.frombuffer(bytearray(file.read()), dtype=np.uint8).reshape(shape)


def _fashion_mnist(root: Path) -> Source:
    def locate() -> Path | None:
        for folder in (root, root / "FashionMNIST" / "raw"):
            if any((folder / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz")):
                return folder
        return None

    folder = locate()
    if folder is None:
        from torchvision.datasets import FashionMNIST

        _downloaded("fashion-mnist", root, lambda: FashionMNIST(str(root), download=True))
        folder = locate()
    assert folder is not None

    def part(prefix: str) -> ArrayImages:
        arrays = []
        for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
            found = [folder / f"{name}{end}" for end in ("", ".gz") if (folder / f"{name}{end}").is_file()]
            if not found:
                raise UsageError(f"--data-root: {folder} has no {name}, plain or .gz")
            try:
                arrays.append(_read_idx(found[0]))
            except (OSError, EOFError, struct.error, zlib.error, ValueError, OverflowError) as error:
                raise UsageError(f"--data-root: {found[0]} cannot be read ({error})") from None
        shapes = [array.shape for array in arrays]
        if len(shapes[0]) != 3 or 0 in shapes[0] or shapes[1] != shapes[0][:1]:
            raise UsageError(
                f"--data-root: the {prefix} images in {folder} have shape {shapes[0]} and their labels {shapes[1]}; "
                "they must be [N, height, width] and [N], not empty"
            )
        return ArrayImages(arrays[0], arrays[1].astype(np.int64))

    return _arrays("fashion-mnist", part("train"), part("t10k"))


def _downloaded(name: str, root: Path, get: Callable[[], object]) -> object:
    """Open a torchvision set, and download it if it is missing."""
    try:
        return get()
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--data {name} is not in {root} and cannot be downloaded ({type(error).__name__}); "
            "give the folder that holds it with --data-root"
        ) from None


def _cifar(kind: str, root: Path) -> Source:
    from torchvision import datasets

    def part(train: bool) -> ArrayImages:
        opened = _downloaded(kind.lower(), root, lambda: getattr(datasets, kind)(str(root), train=train, download=True))
        return ArrayImages(opened.data, np.asarray(opened.targets, dtype=np.int64))  # type: ignore[attr-defined]

    return _arrays(kind.lower(), part(True), part(False))


def _stl10(root: Path) -> Source:
    from torchvision.datasets import STL10

    def part(split: str) -> ArrayImages:
        opened = _downloaded("stl10", root, lambda: STL10(str(root), split=split, download=True))
        pixels = np.ascontiguousarray(opened.data.transpose(0, 2, 3, 1))  # type: ignore[attr-defined]
        return ArrayImages(pixels, opened.labels.astype(np.int64))  # type: ignore[attr-defined]

    labelled, test = part("train"), part("test")
    train = ArrayImages(part("train+unlabeled").arrays, None)
    about = f"stl10: {len(train):,} images of 96x96 pixels, {len(labelled):,} with labels; {len(test):,} for validation"
    return Source(name="stl10", train=train, bank=labelled, test=test, about=about)
