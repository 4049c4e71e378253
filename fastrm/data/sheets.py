"""Draws contact sheets, rows of images with names, and writes them with a mark by which fastrm recognises them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastrm.errors import UsageError
from fastrm.files import as_utf8, check_folder, write_whole, writing
from fastrm.own import SHEET, SHEET_FORMATS, require, sheet
from fastrm.settings.config import check_path

GREEN = (0, 158, 115)
SIDE = 128
"""Smallest length of an image's longer side in pixels, so that its content is visible."""
_MARGIN = 4  # pixels around an image, which hold its frame
_APART = 16  # additional pixels after the first column
_TEXT = 14  # font size in pixels
_INK = (64, 64, 64)
_LONGEST = 400  # last characters of a name that are considered


class Tile(NamedTuple):
    """An image, and the colour of its frame; None for no frame."""

    picture: Image.Image
    frame: tuple[int, int, int] | None = None


class Row(NamedTuple):
    """A row of images."""

    name: str
    """Text above the images; if it is too long, its start is cut off."""
    about: str
    """Text after the name."""
    tiles: Sequence[Tile]


def enlarged(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """Enlarge an image by a whole factor, so that its longer side is at least ``side`` pixels."""
    return ImageOps.scale(picture.convert("RGB"), times(max(picture.size), side), Image.Resampling.NEAREST)


def times(length: int, side: int = SIDE) -> int:
    """The factor by which :func:`enlarged` scales an image whose longer side is ``length``."""
    return math.ceil(side / length)


def whole(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """Fit an image into a square of ``side`` pixels: shrink it, or enlarge it by a whole factor."""
    picture = picture.convert("RGB")
    if max(picture.size) > side:
        picture.thumbnail((side, side))
        return picture
    return ImageOps.scale(picture, side // max(picture.size), Image.Resampling.NEAREST)


def draw(rows: Sequence[Row], *, titles: Sequence[str] = ()) -> Image.Image:
    """Draw rows of images; a gap separates the first image of each row from the others.

    Args:
        rows: images of any size, each row with a name.
        titles: titles of the columns.
    """
    font = ImageFont.load_default(_TEXT)
    measured = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [tuple(map(math.ceil, measured.multiline_textbbox((0, 0), title, font)[2:])) for title in titles]
    columns = range(max([len(heads), *(len(row.tiles) for row in rows)]))
    wide = [
        max([head[0] for head in heads[i : i + 1]] + [row.tiles[i].picture.width for row in rows if i < len(row.tiles)])
        for i in columns
    ]
    left = [sum(wide[:i]) + (2 * i + 1) * _MARGIN + (i > 0) * _APART for i in columns]
    width = left[-1] + wide[-1] + _MARGIN if left else 1
    line, top = _TEXT + 3 * _MARGIN, max((head[1] for head in heads), default=0) + _MARGIN
    high = [max((tile.picture.height for tile in row.tiles), default=0) + 2 * _MARGIN + line for row in rows]
    sheet = Image.new("RGB", (width, top + sum(high)), "white")
    drawn = ImageDraw.Draw(sheet)
    for x, title in zip(left, titles, strict=False):
        drawn.multiline_text((x, _MARGIN // 2), title, _INK, font)
    for row, height in zip(rows, high, strict=True):
        about = f"   {row.about}" if row.about else ""
        room = width - 2 * _MARGIN - font.getlength(about)
        drawn.text((_MARGIN, top + 2 * _MARGIN), _shortened(row.name, room, font) + about, _INK, font)
        for x, (picture, frame) in zip(left, row.tiles, strict=False):
            y = top + line + _MARGIN
            if frame is not None:
                edge = _MARGIN - 1
                drawn.rectangle(
                    (x - edge, y - edge, x + picture.width + edge - 1, y + picture.height + edge - 1), frame
                )
            sheet.paste(picture, (x, y))
        top += height
    return sheet


def _shortened(name: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A name in one line of at most ``room`` pixels; of a longer name the end, which usually differs."""
    name = " ".join(as_utf8(name).split())
    short = name if len(name) <= _LONGEST else ""
    for start in range(max(0, len(name) - _LONGEST), len(name) + 1):
        if short and font.getlength(short) <= room:
            break
        short = "…" + name[start + 1 :]
    return short


def check(flag: str, out: Path) -> None:
    """Raise a UsageError if the sheet cannot be written to ``out``, or would replace a file of the user."""
    if out.suffix.lower() not in SHEET_FORMATS:
        raise UsageError(f"{flag} {out} cannot be written: it must end in {', '.join(SHEET_FORMATS)}, as in views.png")
    check_path(flag.removeprefix("--"), out)
    check_folder(flag, out)
    require(flag, out, sheet, what="a contact sheet")


def save(flag: str, out: Path, picture: Image.Image) -> None:
    """Write a sheet; the file is complete or absent.

    Raises:
        UsageError: it cannot be written.
    """
    check(flag, out)
    mark = PngInfo()
    mark.add_text("Comment", SHEET.decode())
    kind = SHEET_FORMATS[out.suffix.lower()]
    with writing(out, flag):
        write_whole(out, lambda partial: picture.save(partial, format=kind, pnginfo=mark, comment=SHEET))
