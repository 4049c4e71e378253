"""A file's bytes as a picture: 8 bits per channel, RGB, upright; or in one line why they cannot be read as one.

:mod:`fastrm.data.stored` reads the same files with every value that is stored in them.
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
"""What turns a picture upright, by its EXIF orientation."""
# How a file ends that was not cut off: some decoders make up the rest, others stop without naming the file.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
# 16-bit values below this use at most 14 of their bits: cameras and scanners store 10, 12 or 14 bits so. At the full
# range these pictures are all but black, with few levels left in 8 bits.
_FULL_RANGE = 2**14
_CONVERT = "convert it to 8 bits per channel"


NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
"""What Pillow opens and does not decode by itself, or what holds no picture made of pixels."""


class BrokenImage(ValueError):
    """Bytes that cannot be read rightly as a picture; the message is one line that says why."""


class UnknownLayout(BrokenImage):
    """Bytes of a layout that Pillow does not know."""


BROKEN = (OSError, BrokenImage)
"""What is raised for a file that cannot be read, and for bytes that cannot be decoded."""


def reason(error: Exception) -> str:
    """What an error says, in one line and without addresses of objects; its kind where it says nothing."""
    text = re.sub(r"\s*<[^<>]* at 0x[0-9a-fA-F]+>", "", getattr(error, "strerror", None) or str(error))
    text = " ".join(text.split())[:200]
    kind = type(error)
    if text and isinstance(error, (OSError, BrokenImage, SyntaxError, Image.DecompressionBombError)):
        return text
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name}: {text}" if text else name


class Header(NamedTuple):
    """What is known of a picture before it is decoded."""

    size: tuple[int, int]
    """Height and width, upright."""
    plain: str | None
    """``"JPEG"`` or ``"PNG"`` where any decoder shows it as :func:`decode` does."""


def decode(content: bytes) -> Image.Image:
    """Read a picture as RGB of 8 bits per channel, upright as its EXIF orientation says.

    16-bit values are scaled by their full range. Transparency is dropped, colour profiles are not applied, and of
    several pictures in a file the first is read.

    Args:
        content: the file's bytes.

    Raises:
        BrokenImage: the bytes are no picture, a damaged one, or one whose values have no known black and white.
    """
    with opened(content) as image:
        _check_values(image)
        wide = sixteen_bits(image)
        image.load()
        turn = _UPRIGHT.get(orientation(image))
        picture = colours(image, wide=wide)
        return picture if turn is None else picture.transpose(turn)


def inspect(content: bytes) -> Header:
    """Read a picture's header; raises as :func:`decode`."""
    with opened(content) as image:
        _check_values(image)
        width, height = image.size
        if image.format == "TIFF":  # newer releases of Pillow give the upright size, older ones the stored one
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
    """Open a picture, and raise whatever its decoder raises as a BrokenImage."""
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
    """Raise whatever is raised while an image is read as a BrokenImage that says it in one line."""
    try:
        yield
    except BrokenImage:
        raise
    except Exception as error:  # damaged bytes lead decoders to errors of every kind
        if exhausted(error):  # a machine that is short of memory says nothing about the image
            raise
        raise BrokenImage(reason(error)) from None


def check_kind(image: Image.Image) -> None:
    """Refuse what Pillow opens and is not made of pixels."""
    if image.format in NOT_DECODED:
        raise BrokenImage(f"it is {image.format}, not a picture made of pixels")


def _check_values(image: Image.Image) -> None:
    """Refuse an opened picture whose values have no known black and white, as far as its header tells."""
    if (problem := _unknown_values(image)) is not None:
        raise BrokenImage(problem)


def _unknown_values(image: Image.Image) -> str | None:
    """Why the values of an opened picture cannot be read as 8 bits, as far as its header tells."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        return f"its values are floating-point numbers, whose black and white are not known; {_CONVERT}"
    # Netpbm says which value is white, and Pillow scales to 16 bits; PNG knows no more than these.
    if image.mode == "I" and image.format not in ("PPM", "PNG"):
        return f"its values are integers of 32 bits or with a sign, whose black and white are not known; {_CONVERT}"
    if 2 in tags.get(339, ()):
        return f"its values are integers with a sign, whose black and white are not known; {_CONVERT}"
    if tags.get(284) == 2 and max(tags.get(258, (1,))) > 8:
        return f"its channels lie one after the other in 16 bits, which Pillow does not read; {_CONVERT}"
    if image.mode.startswith("I;16") and tags.get(262) == 0:
        return f"its values are 16 bits of which 0 is white; {_CONVERT}"
    return None


def sixteen_bits(image: Image.Image) -> bool:
    """Whether an opened picture has 12 or 16 bits per channel, of which Pillow may give the upper 8.

    A Netpbm file with another largest value than 65,535 says what is white, and Pillow scales by it.
    """
    layouts = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return image.mode.startswith("I;16") or any(re.search(r";1[26]|65535", layout) for layout in layouts)


def orientation(image: Image.Image) -> int:
    """From 1 to 8; 1, which is upright, where the EXIF block is damaged: the pixels are sound nevertheless."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of every kind
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def colours(image: Image.Image, *, wide: bool) -> Image.Image:
    """RGB of 8 bits per channel of an opened picture; ``wide``: it has 16, of which Pillow gives the upper 8."""
    if image.mode.startswith("I"):  # 16 bits; a plain conversion would clip everything above 255
        values = np.asarray(image)
        if wide:
            check_depth(int(values.max()))
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if wide:  # of which the upper 8 bits were read
        ranges = zip(np.reshape(image.getextrema(), (-1, 2)).tolist(), image.getbands(), strict=True)
        upper = max(top for (_, top), band in ranges if band != "A")
        check_depth(256 * upper + 255 if upper else 0)
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        check_drawn(np.asarray(image))
    return image.convert("RGB")


def check_drawn(values: NDArray[np.uint8]) -> None:
    """Refuse values [H, W, bands] with transparency as the last band, if there is nothing but that."""
    flat = values.reshape(-1, values.shape[-1])
    least, most = flat.min(axis=0), flat.max(axis=0)
    if (least[:-1] == most[:-1]).all() and least[-1] < most[-1]:
        raise BrokenImage("its content is only in the transparency: all colours are the same; give it a background")


def check_depth(top: int) -> None:
    """Refuse 16-bit values of which the largest says that they do not have the full range."""
    if 0 < top < _FULL_RANGE:
        bits = top.bit_length()
        raise BrokenImage(f"its values use {bits} of 16 bits, so that white is not known; {_CONVERT}")
