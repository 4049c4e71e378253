"""Pictures of pictures: drawn in rows, and written so that fastrm knows them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from fastrm.errors import UsageError
from fastrm.files import write_whole, writing
from fastrm.own import SHEET, require, sheet
from fastrm.settings.config import check_path

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""By ending: those that can say what they are, so that they are neither trained on nor taken for a photograph."""
GREEN = (0, 158, 115)
_MARGIN = 4  # pixels around a picture, in which its frame is


def draw(rows: Sequence[Sequence[tuple[Image.Image, tuple[int, int, int] | None]]], *, side: int = 64) -> Image.Image:
    """Draw rows of pictures; the first of each row stands apart, as what the others belong to.

    Args:
        rows: pictures of any size, which are cropped to a square, each with the colour of its frame or None.
        side: of the squares, in pixels.
    """
    step = side + 2 * _MARGIN
    width = max((len(row) for row in rows), default=0)
    drawn = Image.new("RGB", ((width * step + step // 4) if width else 1, max(1, len(rows) * step)), "white")
    for j, row in enumerate(rows):
        for i, (picture, frame) in enumerate(row):
            square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
            if frame is not None:
                square = ImageOps.expand(square, _MARGIN - 1, frame)
            edge = _MARGIN - (_MARGIN - 1) * (frame is not None)
            drawn.paste(square, (i * step + (i > 0) * (step // 4) + edge, j * step + edge))
    return drawn


def check(flag: str, out: Path) -> None:
    """Raise a UsageError if a picture could not be written there, or would take the place of one of the user's."""
    if out.suffix.lower() not in FORMATS:
        raise UsageError(f"{flag} {out} cannot be written: it must end in {', '.join(FORMATS)}; give views.png, say")
    check_path(flag.removeprefix("--"), out)
    if not os.access(out.parent, os.W_OK):
        raise UsageError(
            f"{flag} {out} cannot be written: there is no folder {out.parent}, or it is not yours to write"
        )
    require(flag, out, sheet, what="a contact sheet")


def save(flag: str, out: Path, picture: Image.Image) -> None:
    """Write a picture, whole.

    Raises:
        UsageError: it cannot be written.
    """
    check(flag, out)
    mark = PngInfo()
    mark.add_text("Comment", SHEET.decode())
    kind = FORMATS[out.suffix.lower()]
    with writing(out, flag):
        write_whole(out, lambda partial: picture.save(partial, format=kind, pnginfo=mark, comment=SHEET))
