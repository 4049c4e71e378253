"""Decodes the bytes of a file to an upright RGB image of 8 bits per channel, or reports in one line why it cannot.

:mod:`fastrm.data.stored` decodes the same files to the stored values.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastrm.machine.memory import exhausted

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image upright, by EXIF orientation."""
# Last bytes of complete files. Of truncated files, some decoders invent the rest, and others fail without naming the
# file.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# Cameras and scanners store 10, 12 or 14 bits in 16; all such values are below this. Scaled by the full 16-bit range,
# these images would be almost black, with few levels left in 8 bits.
_FULL_RANGE = 2**14
_CONVERT = "convert it to 8 bits per channel"
TOO_LARGE = "if it is whole, cut it into smaller images"


NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""Formats that Pillow opens but does not decode by itself, or that hold no raster image."""


class BrokenImage(ValueError):
    """Bytes that cannot be read correctly as an image; the message says why in one line."""


class UnknownLayout(BrokenImage):
    """Bytes in a layout that Pillow does not support."""


BROKEN = (OSError, BrokenImage)
"""Exceptions for files that cannot be read and bytes that cannot be decoded."""


def reason(error: Exception) -> str:
    """The message of an error in one line, without object addresses; its type if it has no message."""
    text = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", getattr(error, "strerror", None) or str(error))
    text = " ".join(text.split())[:200]
    kind = type(error)
    if text and isinstance(error, (OSError, BrokenImage, SyntaxError, Image.DecompressionBombError)):
        return text
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name}: {text}" if text else name


class Header(NamedTuple):
    """The properties of an image that are known before it is decoded."""

    size: tuple[int, int]
    """Height and width, upright."""
    plain: str | None
    """``"JPEG"`` or ``"PNG"`` if any decoder gives the same image as :func:`decode`, otherwise None."""


def decode(content: bytes) -> Image.Image:
    """Decode an image to RGB of 8 bits per channel, turned upright by its EXIF orientation.

    16-bit values are scaled by their full range. Transparency is dropped, colour profiles are not applied, and only
    the first image of a file is read.

    Args:
        content: bytes of the file.

    Raises:
        BrokenImage: the bytes are not an image or a damaged one, or the values of black and white are unknown.
    """
    with opened(content) as image:
        _check_values(image)
        wide = sixteen_bits(image)
        image.load()
        turn = _UPRIGHT.get(orientation(image))
        picture = colours(image, wide=wide)
        return picture if turn is None else picture.transpose(turn)


def inspect(content: bytes) -> Header:
    """Read the header of an image; raises like :func:`decode`."""
    with opened(content) as image:
        _check_values(image)
        width, height = image.size
        if image.format == "TIFF":  # new releases of Pillow return the upright size, old ones the stored size
            width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
        wide = sixteen_bits(image)
        if image.format == "PNG":
            image.load()  # its EXIF block may follow the pixels
        turn = orientation(image)
        plain = (
            image.format in _ENDS
            and image.mode in ("RGB", "L")
            and not wide
            and content.endswith(_ENDS[image.format])
            and "transparency" not in image.info
            and turn == 1
        )
        return Header((width, height) if turn >= 5 else (height, width), image.format if plain else None)


@contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """Open an image; errors of its decoder are raised as BrokenImage."""
    if not content:
        raise BrokenImage("the file is empty")
    with told():
        try:
            with Image.open(io.BytesIO(content)) as image:
                check_kind(image)
                yield image
        except UnidentifiedImageError as error:
            tiff = content.startswith((b"II*\0", b"MM\0*"))
            raise UnknownLayout(
                f"Pillow cannot read this TIFF; if it is whole, {_CONVERT}" if tiff else reason(error)
            ) from None


@contextmanager
def told() -> Iterator[None]:
    """Raise errors in this context as BrokenImage with a message of one line."""
    try:
        yield
    except BrokenImage:
        raise
    except Image.DecompressionBombError as error:  # its message ends with a suspicion, which is wrong for large scenes
        raise BrokenImage(f"{reason(error).partition(',')[0]}; {TOO_LARGE}") from None
    except Exception as error:  # decoders raise errors of any type for damaged bytes
        if exhausted(error):  # a lack of memory is not the fault of the image
            raise
        raise BrokenImage(reason(error)) from None


def check_kind(image: Image.Image) -> None:
    """Raise BrokenImage for formats that are not raster images."""
    if image.format in NOT_DECODED:
        raise BrokenImage(f"it is {image.format}, which is not a raster image")


def _check_values(image: Image.Image) -> None:
    """Raise BrokenImage if the header of an opened image shows that the values of black and white are unknown."""
    if (problem := _unknown_values(image)) is not None:
        raise BrokenImage(problem)


def _unknown_values(image: Image.Image) -> str | None:
    """Why the values of an opened image cannot be converted to 8 bits, judged by its header; None if they can."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        return f"its values are floating-point numbers, and the values of black and white are unknown; {_CONVERT}"
    # Netpbm files state the value of white, and Pillow scales by it to 16 bits; PNG has at most 16 bits.
    if image.mode == "I" and image.format not in ("PPM", "PNG"):
        return f"its values are 32-bit or signed integers, and the values of black and white are unknown; {_CONVERT}"
    if 2 in tags.get(339, ()):
        return f"its values are signed integers, and the values of black and white are unknown; {_CONVERT}"
    if tags.get(284) == 2 and max(tags.get(258, (1,))) > 8:
        return f"its 16-bit channels are stored one after the other, which Pillow does not read; {_CONVERT}"
    if image.mode.startswith("I;16") and tags.get(262) == 0:
        return f"its values have 16 bits, and 0 is white; {_CONVERT}"
    return None


def sixteen_bits(image: Image.Image) -> bool:
    """Whether an opened image has 12 or 16 bits per channel, of which Pillow may return the upper 8.

    Netpbm files with another maximum than 65,535 do not count: Pillow scales them by it.
    """
    layouts = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return image.mode.startswith("I;16") or any(re.search(r";1[26]|65535", layout) for layout in layouts)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation from 1 to 8; 1 (upright) if the EXIF block is damaged, since the pixels are still valid."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of any type
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def colours(image: Image.Image, *, wide: bool) -> Image.Image:
    """Convert an opened image to 8-bit RGB; ``wide``: it has 16 bits, of which Pillow may return the upper 8."""
    if image.mode.startswith("I"):  # 16 bits; a plain conversion would clip everything above 255
        values = np.asarray(image)
        if wide:
            check_depth(int(values.max()))
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if wide:  # only the upper 8 bits are known
        ranges = zip(np.reshape(image.getextrema(), (-1, 2)).tolist(), image.getbands(), strict=True)
        upper = max(top for (_, top), band in ranges if band != "A")
        check_depth(256 * upper + 255 if upper else 0)
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        check_drawn(np.asarray(image))
    return image.convert("RGB")


def check_drawn(values: NDArray[np.uint8]) -> None:
    """Raise BrokenImage if all content of the values [H, W, bands] is in the last band, the transparency."""
    flat = values.reshape(-1, values.shape[-1])
    least, most = flat.min(axis=0), flat.max(axis=0)
    if (least[:-1] == most[:-1]).all() and least[-1] < most[-1]:
        raise BrokenImage("its content is only in the transparency: all colours are the same; give it a background")


def check_depth(top: int) -> None:
    """Raise BrokenImage if ``top``, the largest 16-bit value, shows that the values do not use the full range."""
    if 0 < top < _FULL_RANGE:
        bits = top.bit_length()
        raise BrokenImage(f"its values use {bits} of 16 bits, so the value of white is unknown; {_CONVERT}")
