"""Decoding: the bytes of a file become its image, or one line that says why they cannot be read."""

from __future__ import annotations

import io
import itertools
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, features

from fastrm.data import make_loader, open_source
from fastrm.data import scan as scanning
from fastrm.data.augmentation import Augmentation, View
from fastrm.data.dali import dali_problem
from fastrm.data.decode import BrokenImage, decode, inspect, reason
from fastrm.data.encoded import FileImages
from fastrm.data.scan import scan
from fastrm.data.settling import settled
from fastrm.data.sources import Source
from fastrm.data.stored import Look, examined

RAMP = np.linspace(0, 1, 48 * 32).reshape(32, 48)  # values from 0 (black) to 1 (white), [32, 48]
LOADERS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(dali_problem() is not None, reason="needs DALI"))]


def written(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a picture in this file format."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def entries(tags: dict[int, tuple[int, bytes]], endian: str = "<") -> bytes:
    """A TIFF file with one directory; ``tags`` maps a tag to the type and the bytes of its values."""
    sizes = {2: 1, 3: 2, 4: 4, 5: 8, 10: 8}
    start = 8 + 2 + 12 * len(tags) + 4
    directory, data = struct.pack(endian + "H", len(tags)), b""
    for tag, (kind, value) in sorted(tags.items()):
        at = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(endian + "I", start + len(data))
        directory += struct.pack(endian + "HHI", tag, kind, len(value) // sizes[kind]) + at
        data += value if len(value) > 4 else b""
    head = (b"II*\0" if endian == "<" else b"MM\0*") + struct.pack(endian + "I", 8)
    return head + directory + bytes(4) + data


def tiff(values: NDArray[Any], *, white_is_zero: bool = False, planar: bool = False) -> bytes:
    """A TIFF file of values [H, W] or [H, W, C] in their dtype and byte order, written from the specification."""
    endian = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    pixels = (np.moveaxis(values, 2, 0) if planar else values).tobytes()
    parts = channels if planar else 1

    def short(*numbers: int) -> tuple[int, bytes]:
        return 3, struct.pack(f"{endian}{len(numbers)}H", *numbers)

    def long(*numbers: int) -> tuple[int, bytes]:
        return 4, struct.pack(f"{endian}{len(numbers)}I", *numbers)

    def directory(start: int) -> bytes:
        size = len(pixels) // parts
        tags = {
            256: short(width), 257: short(height), 258: short(*[8 * values.itemsize] * channels), 259: short(1),
            262: short(0 if white_is_zero else 1 if channels == 1 else 2), 277: short(channels), 278: short(height),
            273: long(*(start + part * size for part in range(parts))), 279: long(*[size] * parts),
            284: short(2 if planar else 1), 339: short(*[{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels),
        }  # fmt: skip
        return entries(tags, endian)

    return directory(len(directory(0))) + pixels


def png(values: NDArray[Any], colour: int) -> bytes:
    """A PNG file of 16-bit values [H, W, C] with this colour type, written from the specification."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def colour(values: NDArray[Any]) -> NDArray[Any]:
    """Gray values [H, W] as RGB values [H, W, 3]."""
    return np.stack([values] * 3, axis=-1)


def with_alpha(values: NDArray[Any]) -> NDArray[Any]:
    """The values with an opaque 16-bit alpha channel."""
    return np.concatenate([values, np.full((*values.shape[:2], 1), 65535)], axis=-1)


def scaled(top: float, kind: str) -> NDArray[Any]:
    """The ramp from 0 to ``top`` in the dtype ``kind``."""
    return (RAMP * top).round(0 if np.dtype(kind).kind in "ui" else 9).astype(kind)


REFUSED = {
    "float from 0 to 1": (tiff(scaled(1, "f4")), "floating-point"),
    "float from -1 to 1": (tiff((2 * RAMP - 1).astype("f4")), "floating-point"),
    "float from 0 to 4000": (tiff(scaled(4000, "f4")), "floating-point"),
    "float colour": (tiff(colour(scaled(1, "f4"))), "if it is whole, convert it to 8 bits"),
    "double": (tiff(scaled(1, "f8")), "if it is whole, convert it to 8 bits"),
    "PFM": (b"Pf\n48 32\n-1.0\n" + scaled(1, "<f4")[::-1].tobytes(), "floating-point"),
    "PFM in colour": (b"PF\n48 32\n-1.0\n" + colour(scaled(1, "<f4")).tobytes(), "cannot identify"),
    "int32": (tiff(scaled(1e6, "i4")), "32-bit or signed integers"),
    "uint32": (tiff(scaled(4e9, "u4")), "32-bit or signed integers"),
    "int16": (tiff(scaled(30_000, "i2")), "32-bit or signed integers"),
    "int8": (tiff(scaled(127, "i1")), "signed integers"),
    "10 bits": (tiff(scaled(1023, "u2")), "use 10 of 16 bits"),
    "12 bits": (tiff(scaled(4095, "u2")), "use 12 of 16 bits"),
    "14 bits": (tiff(scaled(16383, "u2")), "use 14 of 16 bits"),
    "12 bits in the other byte order": (tiff(scaled(4095, ">u2")), "use 12 of 16 bits"),
    "12 bits in colour": (tiff(colour(scaled(4095, "u2"))), "use 12 of 16 bits"),
    "16 bits in planes": (
        tiff(colour(scaled(65535, "u2")), planar=True),
        "16-bit channels are stored one after the other",
    ),
    "16 bits, white is 0": (tiff(scaled(65535, "u2"), white_is_zero=True), "16 bits, and 0 is white"),
    "PNG of 12 bits": (png(scaled(4095, "u2")[..., None], 0), "use 12 of 16 bits"),
    "PNG of 12 bits in colour": (png(colour(scaled(4095, "u2")), 2), "use 12 of 16 bits"),
    "PNG of 12 bits and transparency": (png(with_alpha(colour(scaled(4095, "u2"))), 6), "use 12 of 16 bits"),
    "PGM of 12 bits that claims 16": (b"P5\n48 32\n65535\n" + scaled(4095, ">u2").tobytes(), "use 12 of 16 bits"),
    "a drawing": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "it is EPS"),
    "nothing": (b"", "the file is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_of_unknown_range_are_refused_in_one_line(name: str) -> None:
    content, why = REFUSED[name]
    with pytest.raises(BrokenImage, match=why) as caught:
        decode(content)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


RIGHT = {
    "16 bits": tiff(scaled(65535, "u2")),
    "16 bits in the other byte order": tiff(scaled(65535, ">u2")),
    "16 bits in colour": tiff(colour(scaled(65535, "u2"))),
    "8 bits in planes": tiff(colour(scaled(255, "u1")), planar=True),
    "8 bits, white is 0": tiff(255 - scaled(255, "u1"), white_is_zero=True),
    "PNG": png(scaled(65535, "u2")[..., None], 0),
    "PNG in colour": png(colour(scaled(65535, "u2")), 2),
    "PNG with transparency": png(with_alpha(colour(scaled(65535, "u2"))), 6),
    "gray PNG with transparency": png(with_alpha(scaled(65535, "u2")[..., None]), 4),
    **{f"PGM to {top}": b"P5\n48 32\n%d\n" % top + scaled(top, ">u2").tobytes() for top in (1023, 4095, 65535)},
    **{
        f"PPM to {top}": b"P6\n48 32\n%d\n" % top + colour(scaled(top, "u2")).astype(">u2").tobytes()
        for top in (1023, 65535)
    },
}


@pytest.mark.parametrize("name", RIGHT)
def test_values_of_known_range_are_scaled_to_8_bits(name: str) -> None:
    pixels = np.asarray(decode(RIGHT[name]))
    np.testing.assert_allclose(pixels, colour(RAMP * 255), atol=1.01)
    assert inspect(RIGHT[name]) == ((32, 48), None)  # no special size or format: every loader reads it by these rules


def test_a_dark_image_with_a_stated_range_and_a_black_image_are_read() -> None:
    dark = b"P5\n48 32\n4095\n" + scaled(100, ">u2").tobytes()
    np.testing.assert_allclose(np.asarray(decode(dark)), colour(RAMP * 255 * 100 / 4095), atol=1.01)
    assert not np.asarray(decode(png(np.zeros((32, 48, 1)), 0))).any()


def test_an_image_whose_content_is_only_in_its_transparency_is_refused() -> None:
    drawn = Image.new("RGBA", (48, 32))
    drawn.putalpha(Image.fromarray(scaled(255, "u1")))
    for picture in (drawn, drawn.convert("LA")):
        with pytest.raises(BrokenImage, match="its content is only in the transparency"):
            decode(written(picture, "PNG"))
    hidden = Image.fromarray(colour(scaled(255, "u1"))).convert("RGBA")
    hidden.putalpha(0)
    np.testing.assert_array_equal(np.asarray(decode(written(hidden, "PNG"))), colour(scaled(255, "u1")))


BAD_EXIF: dict[str, dict[int, tuple[int, bytes]]] = {
    "a resolution in letters": {282: (2, b"hello\0")},
    "negative rationals": {282: (10, struct.pack("<ii", -3, -5))},
    "a rational of nothing": {282: (5, struct.pack("<II", 3, 0)), 283: (5, struct.pack("<II", 0, 0))},
    "a directory beyond the end": {0x8769: (4, struct.pack("<I", 999_999))},
    "a directory in itself": {0x8769: (4, struct.pack("<I", 8))},
    "a place in letters": {0x8825: (2, b"abc\0")},
    "no text": {270: (2, b"\xff\xfe\xfd\xfc\0")},
}
CARRIERS = ["JPEG", "PNG", *(["WEBP"] if features.check("webp") else [])]


@pytest.mark.parametrize(("carrier", "name"), [*itertools.product(CARRIERS, BAD_EXIF)])
def test_damaged_exif_does_not_change_the_image(carrier: str, name: str) -> None:
    picture = Image.fromarray(colour(scaled(255, "u1")))
    plain = written(picture, carrier)
    damaged = written(picture, carrier, exif=b"Exif\0\0" + entries(BAD_EXIF[name]))
    np.testing.assert_array_equal(np.asarray(decode(damaged)), np.asarray(decode(plain)))
    assert inspect(damaged).size == (32, 48)
    assert examined(damaged) == ((32, 48), "uint8", 3, 1)
    turned = written(picture, carrier, exif=b"Exif\0\0" + entries(BAD_EXIF[name] | {0x0112: (3, struct.pack("<H", 6))}))
    assert inspect(turned).size == (48, 32)
    np.testing.assert_array_equal(np.asarray(decode(turned)), np.rot90(np.asarray(decode(plain)), -1))


@pytest.mark.parametrize("value", [(2, b"6\0"), (3, b"\x09\0"), (5, struct.pack("<II", 6, 1))])
def test_an_invalid_orientation_is_ignored(value: tuple[int, bytes]) -> None:
    picture = Image.fromarray(colour(scaled(255, "u1")))
    content = written(picture, "JPEG", exif=b"Exif\0\0" + entries({0x0112: value}))
    assert inspect(content) == ((32, 48), "JPEG")
    assert decode(content).size == (48, 32)


@pytest.mark.parametrize(
    "carrier", ["JPEG", "PNG", "TIFF", *CARRIERS[2:], *(["AVIF"] if features.check("avif") else [])]
)
def test_every_orientation_of_every_format_is_turned_upright(carrier: str) -> None:
    picture = Image.fromarray(colour(scaled(255, "u1")))
    right = np.asarray(decode(written(picture, carrier)))
    turns = {
        2: right[:, ::-1], 3: right[::-1, ::-1], 4: right[::-1], 5: right.swapaxes(0, 1), 6: np.rot90(right, -1),
        7: np.rot90(right, 2).swapaxes(0, 1), 8: np.rot90(right),
    }  # fmt: skip
    for orientation, want in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = written(picture, carrier, exif=exif)
        assert inspect(content).size == want.shape[:2]
        # Lossless encoders store the same pixels; AVIF stores the rotation beside the image.
        np.testing.assert_allclose(np.asarray(decode(content)).astype(int), want, atol=0 if carrier != "WEBP" else 3)


def test_reasons_are_one_line_without_addresses() -> None:
    assert reason(OSError(f"cannot identify image file {io.BytesIO()!r}")) == "cannot identify image file"
    assert reason(FileNotFoundError(2, "No such file or directory", "/a/b.png")) == "No such file or directory"
    assert reason(RuntimeError("Failed\nto decode")) == "RuntimeError: Failed to decode"
    assert reason(KeyError()) == "KeyError"
    assert reason(zlib.error("bad")) == "zlib.error: bad"
    assert len(reason(OSError("x" * 999))) == 200


@pytest.mark.parametrize("error", [TypeError("odd"), RuntimeError("odd"), struct.error("odd")])
def test_any_error_of_a_decoder_marks_the_file_as_broken(error: Exception) -> None:
    content = written(Image.new("RGB", (8, 8)), "BMP")
    with mock.patch.object(Image.Image, "convert", side_effect=error), pytest.raises(BrokenImage, match="odd"):
        decode(content)
    for own in (MemoryError, KeyboardInterrupt):
        with mock.patch.object(Image.Image, "convert", side_effect=own), pytest.raises(own):
            decode(content)


@pytest.fixture
def odd_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FileImages, dict[str, str]]:
    """A folder of 54 images, and one of each kind of file that only has the name of an image; the errors by name."""
    sound = written(Image.fromarray(colour(scaled(255, "u1"))), "PNG")
    for index in range(54):
        (tmp_path / f"sound{index}.png").write_bytes(sound)
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        made.bind("socket.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    why = {
        "nowhere.jpg": "No such file or directory", "circle.jpg": "Too many levels of symbolic links",
        "pipe.jpg": "it is not a regular file", "folder.jpg": "it is not a regular file",
        "socket.jpg": "it is not a regular file", "empty.jpg": "the file is empty",
    }  # fmt: skip
    return FileImages(sorted(tmp_path.iterdir()), None), why


def test_special_and_empty_files_are_broken_for_the_scan_and_for_every_loader(
    odd_files: tuple[FileImages, dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, why = odd_files
    found, broken = scan(Source(name="odd", train=images, bank=None, test=None, about=""), workers=2)
    assert {Path(name).name: said for name, said in broken.items()} == why
    assert len(found.train) == 54
    for index in range(len(images)):
        images.read(index, decode)
    assert {images.paths[index].name: said for index, said in images.unreadable.items()} == why


def test_results_of_the_scan_are_cached_until_files_or_pillow_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(20):
        Image.new("RGB", (8, 8)).save(folder / f"{index:02d}.png")
    (folder / "00.png").write_bytes(b"broken")
    Image.new("RGB", (8, 8)).save(folder / "20.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    source = open_source(str(folder))
    looked: list[bytes] = []

    def look(content: bytes) -> Look:
        looked.append(content)
        return examined(content)

    monkeypatch.setattr(scanning, "examined", look)
    plain = FileImages.content

    def failing(images: FileImages, index: int) -> bytes:
        if images.paths[index].name == "05.png":
            raise OSError(5, "Input/output error")
        return plain(images, index)

    with monkeypatch.context() as patch:
        patch.setattr(FileImages, "content", failing)
        found, broken = scan(source, workers=2)
    assert {Path(name).name: why for name, why in broken.items()} == {
        "00.png": "cannot identify image file", "05.png": "Input/output error",
    }  # fmt: skip
    said = "1 files have several pages, of which only the first is read"
    assert said in settled(found).about
    assert len(looked) == 20
    # The disk works again: only the file that failed is examined again.
    found, broken = scan(source, workers=2)
    assert [Path(name).name for name in broken] == ["00.png"]
    assert said in settled(found).about
    assert len(looked) == 21
    assert scan(source, workers=2)[1] == broken
    assert len(looked) == 21
    monkeypatch.setattr("PIL.__version__", "99")
    assert scan(source, workers=2)[1] == broken
    assert len(looked) == 42


WHOLE = Augmentation(
    views=(
        View(
            crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5), flip_probability=0.0, jitter_probability=0.0,
            grayscale_probability=0.0, blur_probability=0.0,
        ),
    ),
    mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
)  # fmt: skip


@pytest.mark.parametrize("kind", LOADERS)
def test_all_loaders_decode_the_same_pixels_and_leave_out_the_same_files(kind: str, tmp_path: Path) -> None:
    wide = {name: content for name, content in RIGHT.items() if not name.startswith("8 bits")}
    sound = {name: RIGHT[name] for name in RIGHT.keys() - wide.keys()} if kind == "dali" else dict(RIGHT)
    plain = written(Image.fromarray(colour(scaled(255, "u1"))), "PNG")
    for name, content in {**sound, "cut": plain[:-40], "empty": b""}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    for index in range(22 - len(sound)):
        (tmp_path / f"more{index}.png").write_bytes(plain)
    made = make_loader(
        str(tmp_path), method=WHOLE, image_size=32, batch_size=24, device="cpu", workers=1, seed=0, loader=kind
    )
    with pytest.warns(UserWarning, match="left out"):
        (views,), _ = next(iter(made))
    assert {Path(name).stem for name in made.broken} == {"cut", "empty"}
    mean, std = (torch.tensor(values)[:, None, None] for values in (WHOLE.mean, WHOLE.std))
    want = torch.nn.functional.interpolate(torch.tensor(RAMP)[None, None] * 255, (32, 32), mode="area")[0]
    for view in views:
        assert float(((view * std + mean) * 255 - want).abs().max()) < 12
