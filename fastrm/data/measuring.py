"""Measures range, mean and standard deviation of a set on a sample that is spread evenly over it.

Results are kept in the cache folder, and reused as long as the sampled images are the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from fastrm.data.decode import BROKEN
from fastrm.data.encoded import EncodedImages
from fastrm.data.formats import BYTES, Limits
from fastrm.data.items import ItemImages
from fastrm.data.sources import Images
from fastrm.data.stored import Values
from fastrm.errors import UsageError
from fastrm.files import cache_root, write_text

_IMAGES = 256
_RARE = 8
_PIXELS = 2**21
"""Pixels of all sampled images together, per band."""
_PERCENTILES = (0.1, 99.9)
_DEPTHS = (8, 10, 12, 14)
"""Bit depths of cameras and scanners that are stored in 16 bits."""
_UNIT: Limits = ((0.0,), (1.0,))
_BEYOND = 1e-3
"""Tolerance of floats beyond 0 and 1, for rounding."""


class Measured(NamedTuple):
    """The measured values."""

    limits: Mapping[str, Limits]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    """Number of images that were measured."""


def spread_over(length: int, count: int) -> list[int]:
    """At most ``count`` places from 0 to ``length``, evenly spaced."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(int)).tolist()


def measured(
    images: Images, dtypes: Sequence[str], value_range: tuple[float, float] | None, *, workers: int
) -> Measured:
    """Measure a set.

    Args:
        images: images, whose format has channels and pages.
        dtypes: dtypes of the images.
        value_range: values for 0 and 1 instead of measured ones; with several dtypes, for all but uint8.
        workers: threads that decode.

    Raises:
        UsageError: none of the sampled images can be read, or none of their values is a number.
    """
    places = _sample(images)
    about = json.dumps([len(images), images.format.plain(), sorted(dtypes), value_range, _PIXELS, 1])
    digest = blake2b(about.encode(), digest_size=16)
    for identity in images.subset(np.array(places)).identities():
        digest.update(identity)
    kept = cache_root() / "measured" / f"{digest.hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        limits = {name: (tuple(low), tuple(high)) for name, (low, high) in found["limits"].items()}
        return Measured(limits, tuple(found["mean"]), tuple(found["std"]), found["images"])
    result = _measure(images, places, dtypes, value_range, workers)
    with contextlib.suppress(OSError):  # if it cannot be stored, the next run measures again
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(result._asdict()))
    return result


def _sample(images: Images) -> list[int]:
    """Evenly spaced indices, and some more for rare dtypes."""
    places = spread_over(len(images), _IMAGES)
    if not isinstance(images, EncodedImages) or (looks := images.looks) is None:
        return places
    for dtype in set(np.unique(looks.dtype).tolist()) - set(looks.dtype[places].tolist()):
        rare = np.flatnonzero(looks.dtype == dtype)
        places += rare[spread_over(len(rare), _RARE)].tolist()
    return sorted(set(places))


def _measure(
    images: Images, places: Sequence[int], dtypes: Sequence[str], wish: tuple[float, float] | None, workers: int
) -> Measured:
    most = max(64, _PIXELS // len(places))

    def read(index: int) -> Values | None:
        """Evenly spaced pixels of an image, [1, N, bands]."""
        try:
            values = images.values(index)
        except BROKEN:  # reported when the image is read
            return None
        flat = values.reshape(1, -1, values.shape[2])
        return flat[:, :: -(-flat.shape[1] // most)]

    with ThreadPoolExecutor(max(1, workers)) as threads:
        read_ones = [values for values in threads.map(read, places) if values is not None]
    if not read_ones:
        raise UsageError(
            f"--data: none of {len(places)} {images.NOUN} can be read; the first is {images.name(places[0])}"
        )
    given = isinstance(images, ItemImages)
    limits = {
        name: _limits(
            name, [one for one in read_ones if one.dtype.name == name], mixed=len(dtypes) > 1, unit=given, wish=wish
        )
        for name in dtypes
    }
    channels = images.format.channels
    if given and channels == 3 and set(limits.values()) <= {BYTES, _UNIT}:
        return Measured(limits, IMAGENET_MEAN, IMAGENET_STD, len(read_ones))
    taken = replace(images.format, limits=limits)
    scaled = []
    for one in read_ones:
        with contextlib.suppress(*BROKEN):  # other bands; reported when the image is read
            scaled.append(taken.fitted(one).double().expand(channels, -1, -1).flatten(1).numpy() / 255)
    every = np.concatenate(scaled, axis=1)
    std = every.std(axis=1)
    return Measured(limits, _rounded(every.mean(axis=1)), _rounded(np.where(std > 1e-6, std, 1)), len(read_ones))


def _limits(name: str, read: Sequence[Values], *, mixed: bool, unit: bool, wish: tuple[float, float] | None) -> Limits:
    """The values that become 0 and 1 for a dtype.

    ``mixed``: it is one of several dtypes, each with its own range. ``unit``: floats from 0 to 1 keep that range.
    """
    if wish is not None and (name != "uint8" or not mixed):
        return (wish[0],), (wish[1],)
    if name == "uint8":
        return BYTES
    bands = max((one.shape[2] for one in read), default=1)
    values = [one[0].astype(np.float64) for one in read if one.shape[2] == bands]
    every = np.concatenate(values) if values else np.zeros((1, 1))
    finite = np.isfinite(every)
    if not finite.any():
        raise UsageError(f"--data: none of the {name} values of {len(read)} images is a number")
    low, high = every[finite].min(), every[finite].max()
    if mixed and name == "uint16":
        return (0.0,), (float(2 ** next((bits for bits in _DEPTHS if high < 2**bits), 16) - 1),)
    if (mixed or unit) and np.dtype(name).kind == "f" and low >= -_BEYOND and high <= 1 + _BEYOND:
        return _UNIT
    ends = np.array(
        [
            np.percentile(band[kept] if kept.any() else [0, 1], _PERCENTILES)
            for band, kept in zip(every.T, finite.T, strict=True)
        ]
    )
    low_ends, high_ends = ends.T
    return _rounded(low_ends), _rounded(np.where(high_ends > low_ends, high_ends, low_ends + 1))


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Nine digits: more than float32 has, and the same on every machine."""
    return tuple(float(f"{value:.9g}") for value in values)
