"""Determines the pixel format of a set from its images, and reports it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from fastrm.data.decode import BROKEN
from fastrm.data.encoded import EncodedImages
from fastrm.data.formats import RGB, PixelFormat
from fastrm.data.items import ItemImages
from fastrm.data.looks import SOUND
from fastrm.data.measuring import Measured, measured, spread_over
from fastrm.data.pages import PageImages
from fastrm.data.pixels import values_in
from fastrm.data.scan import MOST
from fastrm.data.sources import ArrayImages, Images, Source
from fastrm.data.stored import DTYPES, examined
from fastrm.data.stored import pages as pages_in
from fastrm.errors import UsageError

_LOOKED_AT = 100
"""Number of images that are checked if there is no index."""


@dataclass(frozen=True, kw_only=True)
class PixelOptions:
    """The user's choices for the pixel format; None and ``"auto"`` are detected."""

    channels: int | None = None
    """Channels of the views."""
    value_range: tuple[float, float] | None = None
    """Values that become 0 and 1, in all dtypes; with several dtypes, in all but uint8."""
    mean: tuple[float, ...] | None = None
    """Mean to subtract per channel after scaling to [0, 1], or one number for all channels."""
    std: tuple[float, ...] | None = None
    """Standard deviation to divide by per channel, or one number for all channels."""
    pages: Literal["auto", "first", "bands", "images"] = "auto"
    """How files with several pages are read."""
    start: PixelFormat | None = None
    """The format that the weights at the start of the run were trained on."""

    @classmethod
    def of(cls, settings: Any, start: PixelFormat | None = None) -> PixelOptions:
        """The options in the settings of a run, or of a command with the same settings."""
        channels, limits = settings.channels, settings.value_range
        return cls(
            channels=None if channels == "auto" else channels,
            value_range=None if limits is None else (limits[0], limits[1]),
            mean=settings.mean,
            std=settings.std,
            pages=settings.pages,
            start=start,
        )


class _Kind(NamedTuple):
    """The properties of images that determine the pixel format."""

    dtype: str
    bands: int
    pages: int = 1


def settled(source: Source, options: PixelOptions | None = None, *, workers: int = 1) -> Source:
    """Return a source with a pixel format, and with a description of it; a source that has a format is returned as it
    is.

    - Channels are 3 for a set with any RGB image, or with 8-bit gray images only; otherwise the bands of the files.
    - uint8 has the range 0 to 255. One other dtype gets the 0.1 and 99.9 percentiles of each band. With several dtypes,
      each gets its own range: uint16 that of its bit depth, floats 0 to 1, and values beyond that their percentiles.
      Floats from 0 to 1 in Python objects always keep that range.
    - Mean and standard deviation are measured, but for RGB of uint8 they are those of the start weights, or ImageNet's.

    Args:
        source: the images.
        options: choices of the user.
        workers: threads that decode.

    Raises:
        UsageError: the images have numbers of bands that do not fit one number of channels, or an option does not fit
            them.
    """
    if source.format is not None:
        return source
    options = options or PixelOptions()
    kinds = _kinds(source.train, options.channels)
    if not kinds:  # the items are images only for the user's callable
        return source.formatted(RGB)
    source, pages, said = _paged(source, kinds, options.pages)
    if pages == "bands":
        kinds = Counter({kind._replace(bands=kind.bands * kind.pages): count for kind, count in kinds.items()})
    channels = options.channels or _channels(kinds)
    taken = PixelFormat(channels=channels, pages=pages)
    _check_bands(kinds, taken)
    dtypes = sorted({kind.dtype for kind in kinds if taken.takes(kind.bands)})  # images with other bands are left out
    notes = list(said)
    if dtypes != ["uint8"] or not taken.rgb or options.value_range is not None:
        found = measured(source.train.formatted(taken), dtypes, options.value_range, workers=workers)
        taken = replace(taken, limits=found.limits, mean=found.mean, std=found.std)
        notes.append(f"{channels} channel{'s' * (channels > 1)}")
        notes += _ranges(found, options)
        if channels not in (1, 3):
            notes.append("hue, saturation and grayscale need RGB and are left out")
    elif options.start is not None and options.start.bytes and options.start.channels == 3:
        taken = replace(taken, mean=options.start.mean, std=options.start.std)
        if (taken.mean, taken.std) != (RGB.mean, RGB.std) and (options.mean is None or options.std is None):
            notes.append("normalised as for the start weights")
    mean, std = (per_channel(name, getattr(options, name), channels) for name in ("mean", "std"))
    taken = replace(taken, mean=mean or taken.mean, std=std or taken.std)
    return replace(source.formatted(taken), about="; ".join([source.about, *notes]))


def formatted(source: Source, format: PixelFormat) -> Source:
    """The source with the pixel format of an earlier run."""
    return (_in_pages(source) if format.pages == "images" else source).formatted(format)


def _in_pages(source: Source) -> Source:
    def paged(images: Images) -> Images:
        return PageImages.of(images, _counts(images)) if isinstance(images, EncodedImages) else images

    return source.each(paged)


def _kinds(images: Images, channels: int | None) -> Counter[_Kind]:
    """Number of images of each kind, of all images if there is an index, otherwise of a sample."""
    if isinstance(images, ArrayImages):
        return Counter({_Kind("uint8", 1 if images.arrays.ndim == 3 else images.arrays.shape[3]): len(images)})
    if isinstance(images, EncodedImages) and (looks := images.looks) is not None:
        sound = looks.state == SOUND
        columns = np.stack([looks.dtype[sound], looks.bands[sound], looks.pages[sound]]).astype(np.int64)
        kinds, counts = np.unique(columns, axis=1, return_counts=True)
        told = zip(kinds.T.tolist(), counts.tolist(), strict=True)
        return Counter({_Kind(DTYPES[dtype], bands, pages): count for (dtype, bands, pages), count in told})
    found: Counter[_Kind] = Counter()
    for index in spread_over(len(images), _LOOKED_AT):
        try:
            if isinstance(images, EncodedImages):
                look = examined(images.content(index))
                found[_Kind(look.dtype, look.bands, look.pages)] += 1
            elif isinstance(images, ItemImages):
                values = values_in(images.items.item(index).image, channels)
                found[_Kind(values.dtype.name, values.shape[2])] += 1
        except BROKEN:  # reported when the image is read
            continue
    return found


def _paged(
    source: Source, kinds: Counter[_Kind], wish: str
) -> tuple[Source, Literal["first", "bands", "images"], list[str]]:
    """The source, how its files' pages are read, and messages about that."""
    several = sum(count for kind, count in kinds.items() if kind.pages > 1)
    if not several or not isinstance(source.train, EncodedImages):
        return source, "first", []
    if wish == "bands" or (wish == "auto" and len({kind.pages for kind in kinds}) == 1 and _alike(source.train, kinds)):
        return source, "bands", ["the pages of a file are the bands of one image"]
    if wish == "images":
        split = _in_pages(source)
        return split, "images", [f"each page is an image: {len(split.train):,} in {len(source.train):,} files"]
    looked_at = "" if kinds.total() == len(source.train) else f" of {kinds.total():,} that were checked"
    said = f"{several:,} files{looked_at} have several pages, of which only the first is read"
    return source, "first", [said + ("" if wish == "first" else "; --pages bands or images reads all")]


def _alike(images: EncodedImages, kinds: Counter[_Kind]) -> bool:
    """Whether the pages of a file can be the bands of one image, that is, gray and of one size."""
    if any(kind.bands != 1 for kind in kinds):
        return False
    try:
        images.formatted(PixelFormat(pages="bands")).values(0)
    except BROKEN:
        return False
    return True


def _counts(images: EncodedImages) -> Sequence[int]:
    """Number of pages of each file; 1 for an unreadable file, which is reported when it is read."""
    if (looks := images.looks) is not None:
        return np.maximum(looks.pages, 1).tolist()

    def count(index: int) -> int:
        try:
            return pages_in(images.content(index))
        except BROKEN:
            return 1

    return [count(index) for index in range(len(images))]


def _channels(kinds: Counter[_Kind]) -> int:
    """The number of channels of the views, if the user does not set it."""
    bands = {kind.bands for kind in kinds}
    if 3 in bands or all(kind.bands == 1 and kind.dtype == "uint8" for kind in kinds):
        return 3
    return max(bands, key=lambda band: sum(count for kind, count in kinds.items() if kind.bands == band))


def _check_bands(kinds: Counter[_Kind], taken: PixelFormat) -> None:
    """Raise a UsageError if too many images have bands that cannot be converted to the format's channels."""
    odd = {kind: count for kind, count in kinds.items() if not taken.takes(kind.bands)}
    if sum(odd.values()) > MOST * kinds.total():
        counts = Counter[int]()
        for kind, count in kinds.items():
            counts[kind.bands] += count
        told = ", ".join(f"{count:,} have {bands}" for bands, count in counts.most_common())
        raise UsageError(
            f"--channels {taken.channels} does not fit the bands of the images ({told}); images with 1 and 3 bands "
            "are converted into each other, others must match: give their number of bands, or a part of the data"
        )


def _ranges(found: Measured, options: PixelOptions) -> Iterator[str]:
    """Describe the values of black and white of each dtype."""
    for dtype, (low, high) in found.limits.items():
        if dtype == "uint8" and len(found.limits) == 1:
            continue
        ends = ", ".join(f"{a:.6g} to {b:.6g}" for a, b in zip(low[:4], high[:4], strict=True))
        more = ", …" if len(low) > 4 else ""
        how = (
            "" if options.value_range or dtype == "uint8" else f" (measured on {found.images:,} images; --value-range)"
        )
        yield f"{dtype} from {ends}{more}{how}"


def per_channel(name: str, values: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    """The values of a setting, of which one stands for all channels.

    Raises:
        UsageError: there are neither one nor ``channels`` values.
    """
    if values is None or len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    raise UsageError(
        f"--{name} has {len(values)} numbers; it must have 1, or {channels}, as many as there are channels"
    )
