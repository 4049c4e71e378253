"""Pixels of any dtype and number of bands: how files store them, how values are scaled, and what a network receives."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import fastrm
from fastrm.data import Augmentation, PixelFormat, PixelOptions, View, eval_loader, make_loader, open_source
from fastrm.data.decode import BrokenImage
from fastrm.data.scan import scan
from fastrm.data.settling import settled
from fastrm.data.stored import Look, examined, stored
from fastrm.errors import UsageError
from fastrm.kernels import batched
from fastrm.run import checkpoint
from tests.conftest import natural_pictures
from tests.test_decode import RAMP, colour, png, scaled, tiff, with_alpha, written

DEEP = 1 + np.arange(48 * 32).reshape(32, 48)  # each value occurs once
NO_CHANGE = View(
    crop_scale=(1, 1),
    crop_ratio=(1, 1),
    jitter_probability=0,
    grayscale_probability=0,
    blur_probability=0,
    flip_probability=0,
)


def npy(values: NDArray[Any]) -> bytes:
    """The bytes of an NPY file with these values."""
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def many(values: NDArray[Any], bands: int) -> NDArray[Any]:
    """An image [H, W, bands] in which each band differs."""
    return np.stack([values + band for band in range(bands)], axis=-1).astype(values.dtype)


def with_tifffile(values: NDArray[Any], **options: Any) -> bytes:
    """The bytes of a TIFF file that tifffile writes."""
    tifffile = pytest.importorskip("tifffile")
    content = io.BytesIO()
    tifffile.imwrite(content, values, **options)
    return content.getvalue()


def packed_by(how: str, values: NDArray[Any], **options: Any) -> bytes:
    """The bytes of a compressed TIFF file; skips the test without imagecodecs."""
    pytest.importorskip("imagecodecs", reason="tifffile packs and unpacks with it")
    options = {"photometric": "minisblack", "planarconfig": "contig", "predictor": True} | options
    return with_tifffile(values, compression=how, **options)


STORED: dict[str, tuple[Callable[[], bytes], NDArray[Any]]] = {
    "float32": (lambda: tiff(DEEP.astype("f4") / 7), DEEP.astype("f4") / 7),
    "float from -1 to 1": (lambda: tiff((2 * RAMP - 1).astype("f4")), (2 * RAMP - 1).astype("f4")),
    "float16": (lambda: with_tifffile(DEEP.astype("f2")), DEEP.astype("f2")),
    "LZW of many bands": (lambda: packed_by("lzw", many(DEEP.astype("u2"), 6)), many(DEEP.astype("u2"), 6)),
    "LZW in tiles": (
        lambda: packed_by("lzw", many(DEEP.astype("i2"), 5), tile=(16, 16), predictor=False), many(DEEP.astype("i2"), 5)
    ),
    "zstd": (lambda: packed_by("zstd", many(DEEP.astype("f4"), 7), predictor=False), many(DEEP.astype("f4"), 7)),
    "double": (lambda: tiff(DEEP / 7), DEEP / 7),
    "float colour": (lambda: tiff(many(DEEP.astype("f4"), 3)), many(DEEP.astype("f4"), 3)),
    "PFM": (lambda: b"Pf\n48 32\n-1.0\n" + DEEP.astype("<f4")[::-1].tobytes(), DEEP.astype("f4")),
    "int32": (lambda: tiff(DEEP.astype("i4") * 99_999 - 5), DEEP.astype("i4") * 99_999 - 5),
    "uint32": (lambda: tiff(DEEP.astype("u4") * 2_500_000), DEEP.astype("u4") * 2_500_000),
    "int16": (lambda: tiff(DEEP.astype("i2") - 700), DEEP.astype("i2") - 700),
    "int8": (lambda: tiff((DEEP % 256 - 128).astype("i1")), (DEEP % 256 - 128).astype("i1")),
    "10 bits": (lambda: tiff(scaled(1023, "u2")), scaled(1023, "u2")),
    "the other byte order": (lambda: tiff(scaled(4095, ">u2")), scaled(4095, "u2")),
    "16 bits in colour": (lambda: tiff(many(DEEP.astype("u2"), 3)), many(DEEP.astype("u2"), 3)),
    "16 bits in planes": (lambda: tiff(many(DEEP.astype("u2"), 3), planar=True), many(DEEP.astype("u2"), 3)),
    "16 bits, white is 0": (lambda: tiff(DEEP.astype("u2"), white_is_zero=True), (65535 - DEEP).astype("u2")),
    "8 bands": (
        lambda: with_tifffile(many(DEEP.astype("u2"), 8), photometric="minisblack", planarconfig="contig"),
        many(DEEP.astype("u2"), 8),
    ),
    "4 bands of bytes": (
        lambda: with_tifffile(many(DEEP % 200, 4).astype("u1"), photometric="rgb", extrasamples=["unspecified"]),
        many(DEEP % 200, 4).astype("u1"),
    ),
    "8 bands in planes, packed": (
        lambda: with_tifffile(
            np.moveaxis(many(DEEP.astype("f4"), 8), 2, 0), planarconfig="separate", photometric="minisblack",
            compression="zlib",
        ),
        many(DEEP.astype("f4"), 8),
    ),
    "PNG of 12 bits": (lambda: png(scaled(4095, "u2")[..., None], 0), scaled(4095, "u2")),
    "PNG of 16 bits in colour": (lambda: png(many(DEEP, 3), 2), many(DEEP, 3).astype("u2")),
    "PNG of 16 bits and transparency": (lambda: png(with_alpha(many(DEEP, 3)), 6), many(DEEP, 3).astype("u2")),
    "gray PNG and transparency": (lambda: png(with_alpha(DEEP[..., None]), 4), DEEP.astype("u2")),
    "PGM": (lambda: b"P5\n48 32\n65535\n" + DEEP.astype(">u2").tobytes(), DEEP.astype("u2")),
    "PPM": (lambda: b"P6\n48 32\n65535\n" + many(DEEP, 3).astype(">u2").tobytes(), many(DEEP, 3).astype("u2")),
    "NPY": (lambda: npy(DEEP.astype("i4")), DEEP.astype("i4")),
    "NPY, bands last": (lambda: npy(many(DEEP.astype("f2"), 5)), many(DEEP.astype("f2"), 5)),
    "NPY, bands first": (lambda: npy(np.moveaxis(many(DEEP.astype("u2"), 5), 2, 0)), many(DEEP.astype("u2"), 5)),
    "gray": (lambda: written(Image.fromarray(scaled(255, "u1")), "PNG"), scaled(255, "u1")),
    "RGB": (lambda: written(Image.fromarray(colour(scaled(255, "u1"))), "TIFF"), colour(scaled(255, "u1"))),
    "a palette": (lambda: written(Image.fromarray(scaled(255, "u1")).convert("P"), "PNG"), colour(scaled(255, "u1"))),
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_every_value_is_read_as_stored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    content, want = STORED[name][0](), STORED[name][1]
    want = want[..., None] if want.ndim == 2 else want
    values = stored(content)
    assert values.dtype == want.dtype
    np.testing.assert_array_equal(values, want)
    assert examined(content) == Look((32, 48), want.dtype.name, want.shape[2], 1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (npy(np.array(["a"])), "its values are str"),
        (npy(DEEP.astype(complex)), "its values are complex128; they must be integers of 8 to 32 bits, or floats"),
        (npy(np.zeros((2, 2, 2, 2))), r"it has the shape \[2, 2, 2, 2\]; it must be \[height, width, bands\]"),
        (npy(np.array({"a": 1}, dtype=object)), "allow_pickle"),
        (npy(DEEP.astype("f4"))[:200], "reshape|buffer|EOF|read"),
        (tiff(DEEP.astype("f8"))[:3000], "."),
        (b"II*\0", "."),
    ],
)  # fmt: skip
def test_unreadable_pixels_are_reported_in_one_line(content: bytes, why: str) -> None:
    for read in (stored, examined):
        with pytest.raises(BrokenImage, match=why) as caught:
            read(content)
        assert "\n" not in str(caught.value)


def test_a_tiff_above_the_limit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenImage, match="exceeds limit of 200 pixels; if it is whole, cut it into smaller images"):
        stored(tiff(np.zeros((20, 30, 6), np.uint16)))


def test_a_deep_tiff_is_turned_upright() -> None:
    tags = pytest.importorskip("tifffile")
    assert tags
    for orientation, want in {1: DEEP, 2: DEEP[:, ::-1], 3: DEEP[::-1, ::-1], 4: DEEP[::-1], 5: DEEP.T,
                              6: np.rot90(DEEP, -1), 7: np.rot90(DEEP, 2).T, 8: np.rot90(DEEP)}.items():  # fmt: skip
        for dtype in ("u2", "f8"):
            content = with_tifffile(DEEP.astype(dtype), extratags=[(274, 3, 1, orientation, True)])
            np.testing.assert_array_equal(stored(content)[..., 0], want)


# How the values of a data set are scaled


def fill(folder: Path, contents: dict[str, bytes]) -> Path:
    """Write files of these names and contents to a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def format_of(folder: Path, **options: Any) -> tuple[PixelFormat, str]:
    """The pixel format of the images in a folder, and the description of the source."""
    source = settled(open_source(folder), PixelOptions(**options))
    assert source.format is not None
    return source.format, source.about


GRAY, COLOUR = scaled(255, "u1"), colour(scaled(255, "u1"))
CHANNELS: dict[str, tuple[list[tuple[str, bytes]], int]] = {
    "gray of 8 bits": ([("png", written(Image.fromarray(GRAY), "PNG"))], 3),
    "deep gray": ([("png", png(scaled(4095, "u2")[..., None], 0))], 1),
    "deep gray and gray of 8 bits": (
        [("png", png(scaled(4095, "u2")[..., None], 0)), ("png", written(Image.fromarray(GRAY), "PNG"))], 1,
    ),
    "deep gray and RGB": (
        [("png", png(scaled(4095, "u2")[..., None], 0)), ("png", written(Image.fromarray(COLOUR), "PNG"))], 3,
    ),
    "5 bands": ([("npy", npy(many(DEEP.astype("u2"), 5)))], 5),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANNELS)
def test_the_number_of_channels_of_a_data_set(name: str, tmp_path: Path) -> None:
    files, want = CHANNELS[name]
    fill(tmp_path / "set", {f"{i}.{ending}": content for i, (ending, content) in enumerate(files * 4)})
    found, about = format_of(tmp_path / "set")
    assert found.channels == want
    assert (f"{want} channel" in about) == (name != "gray of 8 bits")


def test_images_with_incompatible_numbers_of_bands_are_refused(tmp_path: Path) -> None:
    five, eight = npy(many(DEEP.astype("u2"), 5)), npy(many(DEEP.astype("u2"), 8))
    fill(tmp_path / "set", {f"{i}.npy": five if i % 2 else eight for i in range(8)})
    with pytest.raises(UsageError, match=r"does not fit the bands of the images \(4 have . bands?, 4 have .|4 have"):
        format_of(tmp_path / "set")
    with pytest.raises(UsageError, match=r"--channels 3 does not fit"):
        format_of(tmp_path / "set", channels=3)


def test_the_range_of_a_dtype_is_its_percentiles_per_band(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sets = {f"{i}.npy": rng.normal(1000, 200, (40, 50, 3)) * [1, 2, 3] for i in range(6)}
    fill(tmp_path / "set", {name: npy(values.astype("i4")) for name, values in sets.items()})
    found, about = format_of(tmp_path / "set")
    every = np.concatenate([values.astype("i4").reshape(-1, 3) for values in sets.values()]).astype(float)
    low, high = np.percentile(every, [0.1, 99.9], axis=0)
    np.testing.assert_allclose(found.limits["int32"], (low, high), rtol=1e-8)
    unit = (every - low) / (high - low)
    np.testing.assert_allclose(found.mean, unit.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.std, unit.std(axis=0), rtol=1e-5)
    assert "int32 from " in about
    assert "measured on 6 images" in about
    assert format_of(tmp_path / "set")[0] == found  # from the cache
    given, _ = format_of(tmp_path / "set", value_range=(0, 4095), mean=(0.5,), std=(0.25, 0.5, 1))
    assert (given.limits, given.mean, given.std) == ({"int32": ((0,), (4095,))}, (0.5,) * 3, (0.25, 0.5, 1))
    with pytest.raises(UsageError, match=r"--mean has 2 numbers; it must have 1, or 3"):
        format_of(tmp_path / "set", mean=(0.5, 0.5))


def test_each_of_several_dtypes_has_its_own_range(tmp_path: Path) -> None:
    fill(tmp_path / "set", {
        "a.png": written(Image.fromarray(GRAY), "PNG"), "b.png": png(scaled(4095, "u2")[..., None], 0),
        "c.npy": npy(RAMP.astype("f4")), "d.npy": npy((2 * RAMP - 1).astype("f8")),
    })  # fmt: skip
    source = settled(open_source(sorted((tmp_path / "set").iterdir())))
    assert source.format is not None
    limits = dict(source.format.limits)
    low, high = limits.pop("float64")
    assert limits == {"uint8": ((0,), (255,)), "uint16": ((0,), (4095,)), "float32": ((0,), (1,))}
    np.testing.assert_allclose([low[0], high[0]], np.percentile(2 * RAMP - 1, [0.1, 99.9]), rtol=1e-8)
    for index in range(3):
        np.testing.assert_allclose(source.train.pixels(index)[0].numpy() / 255, RAMP, atol=1 / 255)


def test_an_image_that_is_left_out_does_not_change_the_format_of_the_others(tmp_path: Path) -> None:
    fill(tmp_path / "set", {f"{i:02}.png": written(Image.fromarray(COLOUR), "PNG") for i in range(12)})
    scene = with_tifffile(many(DEEP.astype("u2"), 5), photometric="minisblack", planarconfig="contig")
    fill(tmp_path / "set", {"scene.tif": scene})
    assert format_of(tmp_path / "set")[0] == PixelFormat()
    with pytest.raises(BrokenImage):
        settled(open_source(tmp_path / "set")).train.pixels(12)


def test_a_rare_dtype_is_measured(tmp_path: Path) -> None:
    """The sample of images that is measured contains none with this dtype."""
    plain = written(Image.fromarray(COLOUR), "PNG")
    fill(tmp_path / "set", {f"{i:03}.png": plain for i in range(600)})
    (tmp_path / "set" / "001.png").write_bytes(png(scaled(4095, "u2")[..., None], 0))
    source, _ = scan(open_source(tmp_path / "set"), workers=2)
    format = settled(source).format
    assert format is not None
    assert dict(format.limits) == {"uint8": ((0,), (255,)), "uint16": ((0,), (4095,))}
    assert format.channels == 3


def test_values_that_are_not_finite_become_black(tmp_path: Path) -> None:
    holes = RAMP.astype("f4").copy()
    holes[:4, :5] = [np.nan, np.inf, -np.inf, np.nan, np.nan]
    fill(tmp_path / "set", {f"{i}.npy": npy(holes) for i in range(3)})
    source = settled(open_source(tmp_path / "set"))
    pixels = source.train.pixels(0)
    assert pixels.isfinite().all()
    assert (pixels[0, :4, :5] == 0).all()


# What the network receives


def ramp(side: int = 64) -> NDArray[np.uint16]:
    """uint16 values [side, side], each of which occurs once."""
    return np.arange(side * side, dtype=np.uint16).reshape(side, side)


RAMPS = {
    "gray TIFF": ("tiff", lambda: tiff(ramp())),
    "gray PNG": ("png", lambda: png(ramp()[..., None], 0)),
    "PNG in colour": ("png", lambda: png(colour(ramp()), 2)),
    "NPY": ("npy", lambda: npy(ramp())),
    "float16": ("npy", lambda: npy((ramp() / 2).astype("f2"))),
    "8 bands": ("npy", lambda: npy(np.stack([ramp()] * 8, axis=-1))),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_of_4096_values_keeps_all_values(name: str, workers: int, tmp_path: Path) -> None:
    if workers and name != "gray PNG":
        pytest.skip("one kind is enough for what travels between processes")
    ending, content = RAMPS[name]
    fill(tmp_path / "set", {f"{i}.{ending}": content() for i in range(2)})
    source = settled(open_source(tmp_path / "set"))
    loader = make_loader(
        source, method=Augmentation(views=(NO_CHANGE, NO_CHANGE)), image_size=64, batch_size=2, device="cpu",
        workers=workers, seed=0,
    )  # fmt: skip
    (((first, second), _),) = loader
    want = stored(content()).astype(np.float64)
    steps = len(np.unique(want))
    assert steps >= 2048
    (((seen,), _),) = eval_loader(source.train, image_size=64, batch_size=2, workers=workers)
    for views in (first, second, seen):
        for band in range(views.shape[1]):
            values = views[0, band].double().numpy()
            assert len(np.unique(values)) == steps
            line = np.polyfit(want[..., band % want.shape[2]].ravel(), values.ravel(), 1)
            np.testing.assert_allclose(np.polyval(line, want[..., band % want.shape[2]]), values, atol=1e-5)


def test_colour_changes_that_need_rgb_are_left_out_for_other_bands_and_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bands = {f"{i}.npy": npy(rng.integers(0, 60_000, (20, 20, 6), dtype=np.uint16)) for i in range(8)}
    source = settled(open_source(fill(tmp_path / "set", bands)))
    assert "hue, saturation and grayscale need RGB and are left out" in source.about
    loader = make_loader(source, method="mocov3", image_size=16, batch_size=8, device="cpu", workers=0, seed=0)
    (((first, second), _),) = loader
    assert first.shape == second.shape == (8, 6, 16, 16)
    assert first.isfinite().all()
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_one_channel_of_an_rgb_image_is_its_luma(tmp_path: Path) -> None:
    pictures = natural_pictures(4, 30, 30).permute(0, 2, 3, 1).numpy()
    fill(tmp_path / "set", {f"{i}.png": written(Image.fromarray(p), "PNG") for i, p in enumerate(pictures)})
    source = settled(open_source(tmp_path / "set"), PixelOptions(channels=1))
    for index, picture in enumerate(pictures):
        want = picture @ [0.2989, 0.587, 0.114]
        np.testing.assert_allclose(source.train.pixels(index)[0].numpy(), want, atol=0.5001)
    named = settled(open_source(pictures), PixelOptions(channels=1))
    for kind in ("memory", "torch"):
        loader = make_loader(
            named, method=Augmentation(views=(NO_CHANGE,)), image_size=30, batch_size=4, device="cpu", workers=0,
            seed=0, loader=kind,
        )  # fmt: skip
        (((views,), indices),) = loader
        assert views.shape == (4, 1, 30, 30)
        want = np.stack([(pictures[i] @ [0.2989, 0.587, 0.114]).round() for i in indices]) / 255
        format = named.train.format
        np.testing.assert_allclose(views[:, 0].numpy() * format.std[0] + format.mean[0], want, atol=1e-5)


# Pages


def pages(*values: NDArray[Any]) -> bytes:
    """The bytes of a TIFF file with these pages."""
    tifffile = pytest.importorskip("tifffile")
    content = io.BytesIO()
    with tifffile.TiffWriter(content) as file:
        for page in values:
            file.write(page, photometric="minisblack", contiguous=False)
    return content.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_pages_are_bands_or_images_and_this_is_reported(dtype: str, tmp_path: Path) -> None:
    ones = [(DEEP % 250).astype(dtype), (DEEP % 101).astype(dtype), (DEEP % 33).astype(dtype)]
    fill(tmp_path / "set", {f"{i}.tif": pages(*ones) for i in range(4)})
    source = settled(open_source(tmp_path / "set"))
    assert source.format is not None
    assert (source.format.channels, source.format.pages) == (3, "bands")
    assert "the pages of a file are the bands of one image" in source.about
    np.testing.assert_array_equal(source.train.values(1), np.stack(ones, axis=-1))
    first = settled(open_source(tmp_path / "set"), PixelOptions(pages="first"))
    assert "have several pages, of which only the first is read" in first.about
    np.testing.assert_array_equal(first.train.values(1)[..., 0], ones[0])
    split = settled(open_source(tmp_path / "set"), PixelOptions(pages="images"))
    assert "each page is an image: 12 in 4 files" in split.about
    assert split.train.name(4) == f"{tmp_path}/set/1.tif, page 2"
    np.testing.assert_array_equal(split.train.values(4)[..., 0], ones[1])
    assert len(set(split.train.identities())) == 12
    loader = make_loader(split, method="mocov2", image_size=16, batch_size=12, device="cpu", workers=0, seed=0)
    assert next(iter(loader)).views[0].shape[0] == 12


@pytest.mark.parametrize("name", ["gray of 8 bits", "deep gray and RGB", "5 bands"])
def test_views_do_not_depend_on_the_number_made_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "set", {f"{i}.{ending}": content for i, (ending, content) in enumerate(CHANNELS[name][0] * 4)})

    def views() -> tuple[torch.Tensor, ...]:
        loader = make_loader(
            str(tmp_path / "set"), method="byol", image_size=32, batch_size=4, device="cpu", workers=0, seed=2
        )
        return next(iter(loader)).views

    together = views()
    monkeypatch.setattr(batched, "_CACHED", 1)  # also for a gray image in an RGB set, alone
    for mine, other in zip(together, views(), strict=True):
        assert torch.equal(mine, other)


# Whole runs


def a_set(folder: Path, kind: str) -> Path:
    """Write twelve images of two classes in this format, and return the folder."""
    rng = np.random.default_rng(0)

    def values(label: int, bands: int) -> NDArray[Any]:
        return rng.normal(2000 + 500 * label, 300, (24, 24, bands)).clip(0, 4095)

    make: dict[str, tuple[str, Callable[[int], bytes]]] = {
        "12 bits": ("png", lambda label: png(values(label, 1).astype("u2"), 0)),
        "16 bits in colour": ("png", lambda label: png(16 * values(label, 3).astype("u2"), 2)),
        "float TIFF": ("tif", lambda label: tiff(values(label, 1)[..., 0].astype("f4") / 4095)),
        "signed": ("tiff", lambda label: tiff((values(label, 1)[..., 0] - 1000).astype("i2"))),
        "8 bands": ("npy", lambda label: npy(values(label, 8).astype("u2"))),
        "8 bands of bytes": ("npy", lambda label: npy((values(label, 8) / 16).astype("u1"))),
        "pages": ("tif", lambda label: pages(*(values(label, 4).astype("u2")[..., i] for i in range(4)))),
        "several dtypes": ("npy", lambda label: npy(values(label, 1).astype("u2" if rng.random() < 0.5 else "f4"))),
    }
    ending, content = make[kind]
    for label in (0, 1):
        fill(folder / f"class{label}", {f"{i}.{ending}": content(label) for i in range(6)})
    return folder


OFTEN = ("12 bits", "pages", "8 bands of bytes")
RARELY = ("16 bits in colour", "float TIFF", "signed", "8 bands", "several dtypes")


@pytest.mark.parametrize("kind", [*OFTEN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in RARELY)])
def test_runs_on_each_pixel_format_resume_and_are_scored_and_exported(kind: str, tmp_path: Path) -> None:
    from fastrm import evaluate, export

    data = a_set(tmp_path / "data", kind)
    options: dict[str, Any] = {
        "arch": "test_resnet", "stem": "imagenet", "image_size": 16, "batch_size": 4, "epochs": 1, "hidden_dim": 16,
        "output_dim": 8, "predictor_hidden_dim": 16, "log_to": (), "eval_every": 0, "workers": 0,
    }  # fmt: skip
    whole = fastrm.pretrain(data, out=tmp_path / "whole", **options)
    fastrm.pretrain(data, out=tmp_path / "cut", max_steps=1, **options)
    again = fastrm.pretrain(data, out=tmp_path / "cut", **options)
    for mine, other in zip(whole.student.state_dict().values(), again.student.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    assert whole.scores["loss"] == again.scores["loss"]
    evaluate.main([str(tmp_path / "whole"), "--knn", "--workers", "0"])
    for form, out in (("safetensors", "a.safetensors"), ("timm", "timm")):
        export.main([str(tmp_path / "whole"), "--format", form, "--out", str(tmp_path / out)])
    model = fastrm.load(tmp_path / "a.safetensors")
    assert model.channels == whole.student.channels
    images = torch.rand(2, model.channels, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images), whole.student.cpu().eval()(images))


@pytest.mark.parametrize("state", ["missing", "broken", "a part is broken"])
def test_a_compressed_tiff_names_the_package_that_reads_it(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile = pytest.importorskip("tifffile")
    content = with_tifffile(many(DEEP.astype("u2"), 6), photometric="minisblack", planarconfig="contig")
    plain, lzw = (struct.pack("<HHII", 259, 3, 1, packing) for packing in (1, 5))
    assert content.count(plain) == 1

    def lacking(page: Any) -> None:
        why = ImportError("libjxl.so.0: cannot open shared object file")
        raise ValueError(f"{page.compression!r} requires the 'imagecodecs' package") from why

    monkeypatch.setattr(tifffile.TiffPage, "asarray", lacking)
    if state == "missing":
        monkeypatch.setitem(sys.modules, "imagecodecs", None)
    else:
        broken_package("imagecodecs", tmp_path, monkeypatch, broken=state == "broken")
    fill(tmp_path / "data", {f"{i}.tif": content.replace(plain, lzw) for i in range(2)})
    broken = ", which is installed but broken:"
    said = {
        "missing": r": .*; pip install (tifffile )?imagecodecs",
        "broken": f"{broken} libcodec.so.3: cannot .*; pip install --force-reinstall imagecodecs",
        "a part is broken": f"{broken} libjxl.so.0: cannot open shared object file; pip install",
    }[state]
    packed = r"0.tif \(this TIFF is packed by LZW, which needs the package imagecodecs"
    with pytest.raises(UsageError, match=packed + said):
        scan(open_source(tmp_path / "data"), workers=1)


def broken_package(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, broken: bool = True) -> None:
    """A package of this name that can be found; if ``broken``, importing it raises."""
    (folder / "site" / name).mkdir(parents=True)
    text = "raise ImportError('libcodec.so.3: cannot open shared object file')" if broken else ""
    (folder / "site" / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_an_installed_but_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = with_tifffile(many(DEEP.astype("u2"), 6), photometric="minisblack", planarconfig="contig")
    fill(tmp_path / "data", {f"{i}.tif": content for i in range(2)})
    said = ", which is installed but broken: libcodec.so.3: cannot open shared object file; pip install --force-rein"
    for name in ("tifffile", "h5py"):
        broken_package(name, tmp_path, monkeypatch)
    with pytest.raises(UsageError, match=rf"this TIFF needs the package tifffile{said}stall tifffile"):
        scan(open_source(tmp_path / "data"), workers=1)
    (tmp_path / "x.h5").write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"x.h5 needs the package h5py{said}stall h5py"):
        open_source(tmp_path / "x.h5")


def test_the_pixel_format_is_kept_after_a_damaged_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value range stays the one that was measured first, although the images are darker by now.

    Their sizes are the same.
    """
    rng = np.random.default_rng(0)

    def fill_with(most: int) -> Path:
        content = {f"{i}.npy": npy(rng.integers(0, most, (24, 24, 1), dtype=np.uint16)) for i in range(8)}
        return fill(tmp_path / "data", content)

    def run(steps: int) -> None:
        fastrm.pretrain(
            fill_with(4096 if steps == 2 else 256), arch="test_resnet", image_size=16, batch_size=4, epochs=9,
            hidden_dim=16, output_dim=8, predictor_hidden_dim=16, log_to=(), eval_every=0, workers=0,
            checkpoint_every=1, max_steps=steps, out=tmp_path / "run",
        )  # fmt: skip

    run(2)
    newest, before = checkpoint.own(tmp_path / "run")
    then = checkpoint.glanced(before)
    assert then is not None
    assert then.format is not None
    newest.write_bytes(newest.read_bytes()[:-1000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))  # an empty cache
    run(3)
    assert checkpoint.load(tmp_path / "run")["step"] == 3
    assert checkpoint.glanced(tmp_path / "run") == then
