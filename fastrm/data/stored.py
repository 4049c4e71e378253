"""Decodes files to the stored values: all bands in their own dtype, without rounding.

:mod:`fastrm.data.decode` reads the same files as RGB of 8 bits per channel.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastrm.data.decode import (
    TOO_LARGE,
    BrokenImage,
    Header,
    UnknownLayout,
    check_kind,
    colours,
    decode,
    inspect,
    opened,
    orientation,
    sixteen_bits,
    told,
)
from fastrm.packages import failure, lack

Values = NDArray[Any]
"""Values [H, W, bands], upright."""
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
"""Dtypes of images, by NumPy's names."""
_NPY = b"\x93NUMPY"
_JPEG = b"\xff\xd8"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_CONVERT = "convert it to PNG or TIFF"
# Pillow logs this for each TIFF with more than four bands, which tifffile then reads.
logging.getLogger("PIL.TiffImagePlugin").addFilter(lambda record: "More samples per pixel" not in str(record.msg))


class Look(NamedTuple):
    """The content of a valid file."""

    size: tuple[int, int]
    """Height and width of its first page, upright."""
    dtype: str
    """NumPy's name of the dtype."""
    bands: int
    """Bands of its first page, 1 for gray and 3 for RGB; transparency does not count."""
    pages: int


def examined(content: bytes) -> Look:
    """Check a file in the way that training reads it: its first page is decoded.

    Raises:
        BrokenImage: it is not an image, is damaged, or cannot be read without loss.
    """
    if content.startswith(_JPEG):  # at an eighth of its size, which finds the same faults sooner
        with opened(content) as image:
            width, height = image.size
            values = _picture(image, content, reduced=True)
            size = (width, height) if orientation(image) >= 5 else (height, width)
        return Look(size, values.dtype.name, 1 if values.ndim == 2 else values.shape[2], 1)
    values = stored(content)
    height, width, bands = values.shape
    return Look((height, width), values.dtype.name, bands, pages(content))


def stored(content: bytes, page: int | Literal["all"] = 0) -> Values:
    """Read the values of an image.

    Args:
        content: bytes of the file: a format of Pillow, TIFF with any number of bands, or NPY.
        page: page to read, or ``"all"`` for the bands of all pages, one page after the other.

    Returns:
        Values [H, W, bands] of one of ``DTYPES``. Gray images have 1 band, coloured images 3, however they are stored;
        others have their own number of bands. Transparency is dropped, and colour profiles are not applied. Raises like
        :func:`examined`.
    """
    if not content.startswith(_NPY) and page == "all" and (count := pages(content)) > 1:
        found = [stored(content, number) for number in range(count)]
        if len({(values.shape[:2], values.dtype) for values in found}) > 1:
            raise BrokenImage(f"its {count} pages are of several sizes or dtypes, and cannot be bands of one image")
        return np.concatenate(found, axis=2)
    first = 0 if page == "all" else page
    with told():
        if content.startswith(_NPY):
            values = _array(content)
        elif content.startswith(_TIFF):
            values = _tiff(content, first)
        else:
            with opened(content) as image:
                image.seek(first)
                values = _picture(image, content)
        return checked(values)


def header(content: bytes) -> Header:
    """Read the header of an image like :func:`fastrm.data.decode.inspect`, also of a TIFF that Pillow cannot read."""
    try:
        return inspect(content)
    except UnknownLayout:
        height, width = stored(content).shape[:2]
        return Header((height, width), None)


def as_rgb(content: bytes) -> Image.Image:
    """Read an image like :func:`fastrm.data.decode.decode`, also an 8-bit TIFF that Pillow cannot read."""
    try:
        return decode(content)
    except UnknownLayout:
        values = stored(content)
        if values.dtype != np.uint8 or values.shape[2] not in (1, 3):
            raise
        return Image.fromarray(values if values.shape[2] == 3 else values[..., 0]).convert("RGB")


def checked(values: NDArray[Any]) -> Values:
    """Values [H, W] or [H, W, bands] in the machine's byte order, as [H, W, bands]; raises as :func:`stored`."""
    values = values[..., None] if values.ndim == 2 else values
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.name not in DTYPES:
        raise BrokenImage(f"its values are {values.dtype.name}; they must be integers of 8 to 32 bits, or floats")
    if values.ndim != 3 or 0 in values.shape:
        raise BrokenImage(f"it has the shape {list(values.shape)}; it must be [height, width, bands], not empty")
    return values


def pages(content: bytes) -> int:
    """Number of images in a file; 1 if the further ones are damaged."""
    if content.startswith((_NPY, _JPEG)):  # further images in a phone's JPEG only support the first one
        return 1
    with contextlib.suppress(Exception):  # decoders raise errors of any type; read what can be read
        if content.startswith(_TIFF):
            with _pages(content) as found:
                return len(found)
        with opened(content) as image:
            return int(getattr(image, "n_frames", 1))
    return 1


def values_of(image: Image.Image) -> Values:
    """The values of an image that Pillow has opened, not rotated; raises like :func:`stored`."""
    with told():
        return checked(_picture(image, b""))


def _picture(image: Image.Image, content: bytes, *, reduced: bool = False) -> NDArray[Any]:
    """Values of the current page of an opened image; ``content`` is used if Pillow reads only the upper bits."""
    check_kind(image)
    wide, tiles = sixteen_bits(image), list(getattr(image, "tile", ()))
    gray = image.mode in ("1", "L", "LA", "La")
    if reduced:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    turn = orientation(image)  # in a PNG it may follow the pixels
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow converts their 16 bits to 32
            values = values.astype(np.uint16)
    elif wide:
        values = _wide_colours(image, content, tiles)
    else:
        picture = colours(image, wide=False)
        values = np.asarray(picture.getchannel(0) if gray else picture)
    return _upright(values, turn)


def _wide_colours(image: Image.Image, content: bytes, tiles: list[Any]) -> NDArray[Any]:
    """Several bands of 16 bits, of which Pillow reads the upper 8."""
    if image.format == "PNG" and content:
        try:
            import torch
            from torchvision.io import ImageReadMode, decode_png
        except ImportError:
            raise BrokenImage("its 16 bits per channel need torchvision.io.decode_png, which is missing here") from None
        read = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        values = read.permute(1, 2, 0).numpy()
        return _without_transparency(values) if values.shape[2] in (2, 4) else values
    if image.format == "PPM" and content:
        _, _, offset, arguments = tiles[0]
        most = arguments[1] if isinstance(arguments, tuple) else 65535
        shape = (image.height, image.width, 3)
        values = np.frombuffer(content, ">u2", int(np.prod(shape)), offset).reshape(shape)
        return ((values.astype(np.uint32) * 65535 + most // 2) // most).astype(np.uint16)
    raise BrokenImage(f"its 16 bits per channel can be read as 8 only in {image.format}; {_CONVERT}")


def _without_transparency(values: Values) -> Values:
    return values[..., : values.shape[2] - 1]


def _array(content: bytes) -> NDArray[Any]:
    """An NPY file: [H, W], [H, W, bands], or [bands, H, W] if there are fewer bands than rows and columns."""
    values: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    if values.ndim == 3 and values.shape[0] < min(values.shape[1:]):
        values = values.transpose(1, 2, 0)
    return values


@contextlib.contextmanager
def _pages(content: bytes) -> Iterator[Any]:
    """The pages of a TIFF, with tifffile."""
    if (error := failure("tifffile")) is not None:
        raise BrokenImage(f"this TIFF needs {lack('tifffile', 'tiff', error)}")
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        yield file.pages


def _tiff(content: bytes, page: int) -> NDArray[Any]:
    """A page of a TIFF, read with Pillow if it returns every value, otherwise with tifffile."""
    try:
        with opened(content) as image:
            image.seek(page)
            if _by_pillow(image):
                return _picture(image, content)
    except UnknownLayout:
        pass
    with _pages(content) as found:
        if page >= len(found):
            raise BrokenImage(f"it has {len(found)} pages")
        read = found[page]
        _check_whole(read, len(content))
        values = _unpacked(read)
        layout = read.axes
        if layout == "SYX":
            values = np.moveaxis(values, 0, 2)
        elif layout not in ("YX", "YXS"):
            raise BrokenImage(f"its axes are {layout}; they must be rows and columns, with or without bands")
        if read.photometric == 0:  # white is 0
            values = (np.iinfo(values.dtype).max if values.dtype.kind == "u" else 0) - values
        if values.ndim == 3 and read.extrasamples and read.extrasamples[-1] in (1, 2) and read.photometric in (1, 2):
            values = _without_transparency(values)
        turn = read.tags.get("Orientation")
        return _upright(values, int(turn.value) if turn is not None else 1)


def _unpacked(page: Any) -> NDArray[Any]:
    try:
        values: NDArray[Any] = page.asarray()
    except ValueError as error:
        if "requires the 'imagecodecs' package" not in str(error):
            raise
        packed = getattr(page.compression, "name", page.compression)
        why = failure("imagecodecs") or _first(error)
        raise BrokenImage(f"this TIFF is packed by {packed}, which needs {lack('imagecodecs', 'tiff', why)}") from None
    return values


def _first(error: BaseException) -> BaseException:
    """The cause of an error; imagecodecs imports libraries on first use."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _check_whole(page: Any, length: int) -> None:
    """Refuse a TIFF page of a file of ``length`` bytes on which tifffile would hang, or which it would pad."""
    pixels, most = page.imagelength * page.imagewidth, Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > 2 * most:
        raise BrokenImage(f"Image size ({pixels} pixels) exceeds limit of {2 * most} pixels; {TOO_LARGE}")
    if math.prod(page.chunked) != len(page.dataoffsets) or len(page.dataoffsets) != len(page.databytecounts):
        raise BrokenImage("it is damaged: parts of the image are missing")
    if any(at + count > length or not count for at, count in zip(page.dataoffsets, page.databytecounts, strict=True)):
        raise BrokenImage("it is damaged or cut off: a part of the image is beyond its end")


def _by_pillow(image: Image.Image) -> bool:
    """Whether Pillow returns every value of an opened TIFF as it is stored."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    bits, kinds = set(tags.get(258, (1,))), set(tags.get(339, (_UNSIGNED,)))
    if max(bits) <= 8:
        fourth_band = tags.get(277) == 4 and tags.get(338) == (0,)  # not transparency; near infrared, for example
        return kinds == {_UNSIGNED} and not fourth_band and image.mode != "F"
    if tags.get(277, 1) != 1:
        return False
    if image.mode == "F":
        return bits == {32} and kinds == {_FLOAT}
    if image.mode == "I":
        return bits == {32} and kinds == {_SIGNED}
    return image.mode.startswith("I;16") and kinds == {_UNSIGNED} and tags.get(262) == 1 and bits == {16}


def _upright(values: NDArray[Any], turn: int) -> NDArray[Any]:
    """Rotate or flip values according to an EXIF orientation."""
    if turn in (5, 7):
        values = values.swapaxes(0, 1)
    quarter = {3: 2, 6: -1, 7: 2, 8: 1}.get(turn, 0)
    values = np.rot90(values, quarter) if quarter else values
    return values[:, ::-1] if turn == 2 else values[::-1] if turn == 4 else values
