"""The contact sheet of nearest neighbours, and the data set of photo patches for the demo."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastrm import evaluate, train
from fastrm.data import Source, open_source, sheets
from fastrm.data.encoded import FileImages
from fastrm.data.patches import LARGEST, LEFT, PHOTOGRAPHS, SHORT, SMALLEST
from fastrm.data.sources import ArrayImages
from fastrm.errors import UsageError
from fastrm.own import sheet
from fastrm.probes.features import Setting
from fastrm.probes.neighbours import nearest, picture
from fastrm.settings.config import Config
from tests.test_cli import fails

SETTING = Setting(8, torch.device("cpu"), 0)


class Flat(nn.Module):
    """A network that returns the normalised pixels [B, 3 * H * W]."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def some(count: int, classes: int, seed: int) -> ArrayImages:
    """``count`` random images of 8x8 pixels with labels."""
    rng = np.random.default_rng(seed)
    return ArrayImages(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), np.arange(count) % classes)


def source_of(bank: Any, test: Any) -> Source:
    """A source with this bank and these test images."""
    return Source(name="some", train=bank, bank=bank, test=test, about="some")


def test_nearest_neighbours_equal_those_of_all_cosines() -> None:
    source = source_of(some(600, 4, 0), some(20, 4, 1))  # the bank has more than one batch
    found = nearest(Flat(), source, SETTING, count=8, k=5)
    assert sorted(int(source.test.labels[i]) for i in found.test) == [0, 0, 1, 1, 2, 2, 3, 3]  # type: ignore[union-attr, index]
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))

    def directions(images: ArrayImages) -> Any:
        rows = ((images.arrays / 255 - mean) / std).transpose(0, 3, 1, 2).reshape(len(images), -1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    cosine = directions(source.test)[found.test] @ directions(source.bank).T  # type: ignore[arg-type]
    assert found.bank.tolist() == np.argsort(-cosine, axis=1)[:, :5].tolist()
    # Fewer images than requested.
    found = nearest(Flat(), source_of(some(3, 2, 0), some(2, 2, 1)), SETTING, count=8, k=5)
    assert sorted(found.test) == [0, 1]
    assert found.bank.shape == (2, 3)


def test_unreadable_files_are_neither_queries_nor_neighbours(tmp_path: Path) -> None:
    paths = []
    for i in range(24):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(some(24, 2, 0).arrays[i]).save(paths[-1])
    for i in (3, 8):
        paths[i].write_bytes(b"no picture")
    images = FileImages(paths, np.arange(24) % 2)
    source = source_of(images, images)
    with pytest.warns(UserWarning, match="cannot be read"):
        found = nearest(Flat(), source, SETTING, count=24, k=10)
    assert sorted(found.test) == sorted({*range(24)} - {3, 8})
    assert not {3, 8} & set(found.bank.flatten().tolist())
    assert [row[0] for row in found.bank.tolist()] == found.test  # each image is its own nearest neighbour
    assert picture(found, source, side=16).height > 22 * 16


def test_neighbours_of_the_same_class_have_a_green_frame() -> None:
    bank = ArrayImages(np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 0, 1, 1]))
    bank.arrays[:] = np.arange(60, 100, 10, dtype=np.uint8)[:, None, None, None]
    source = source_of(bank, bank.subset(np.array([0, 3])))
    found = nearest(Flat(), source, SETTING, count=2, k=4)._replace(bank=torch.tensor([[1, 2, 0, 3], [2, 0, 3, 1]]))
    drawn = np.asarray(picture(found, source, side=20))
    top = 0
    for own, others in ((0, [1, 2, 0, 3]), (3, [2, 0, 3, 1])):
        # The gray level identifies an image. An image of 8x8 pixels is drawn 16 pixels wide.
        shown = (drawn[top:] == bank.arrays[own, 0, 0]).all(axis=2)
        y, left = np.argwhere(shown & np.roll(shown, -15, axis=0) & np.roll(shown, -15, axis=1))[0]
        top += y
        assert (drawn[top - 3, left : left + 16] == 255).all()  # the query has no frame
        for other in others:
            row = (drawn[top, left + 16 :] == bank.arrays[other, 0, 0]).all(axis=1)
            left += 16 + int(row.argmax())
            assert (drawn[top : top + 16, left : left + 16] == bank.arrays[other, 0, 0]).all()
            framed = [tuple(drawn[y, x]) == sheets.GREEN for y in (top - 3, top + 18) for x in (left - 3, left + 18)]
            assert framed == [bank.labels[other] == bank.labels[own]] * 4  # type: ignore[index]
        top += 16


def test_a_sheet_holds_images_of_any_shape() -> None:
    wide, high = (sheets.whole(Image.new("L", size, 200), 32) for size in ((90, 30), (1, 4000)))
    assert (wide.size, high.size) == ((32, 11), (1, 32))
    tiles = [sheets.Tile(wide), sheets.Tile(high, sheets.GREEN), sheets.Tile(wide)]
    drawn = sheets.draw([sheets.Row("a", "", tiles[:1]), sheets.Row("b", "", tiles), sheets.Row("c", "", [])])
    assert drawn.width >= 32 + 1 + 32
    assert drawn.height >= 11 + 32
    assert sheets.draw([]).width == 1


def test_evaluate_draws_neighbours_and_keeps_the_images_of_the_user(
    small: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(small(max_steps=1))
    run = ["--checkpoint", str(tmp_path / "run"), "--workers", "0"]
    mine = tmp_path / "holiday.png"
    Image.new("RGB", (9, 9)).save(mine)
    before = mine.read_bytes()
    for out, why in (
        (mine, "is there and not a contact sheet that fastrm wrote"),
        (tmp_path / "x.gif", "must end in .png"),
        (tmp_path / "nowhere" / "x.png", "does not exist or is not writable"),
    ):
        said = fails(evaluate.main, [*run, f"--neighbours={out}"], capsys)
        assert f"--neighbours {out}" in said
        assert why in said
    assert mine.read_bytes() == before
    out = tmp_path / "neighbours.png"
    for _ in range(2):  # a sheet that fastrm wrote is replaced
        capsys.readouterr()
        evaluate.main([*run, f"--neighbours={out}"])
        assert str(out) in capsys.readouterr().out
        assert sheet(out)
    with Image.open(out) as drawn:
        assert drawn.width > 6 * 128  # an image and five neighbours, enlarged
        assert drawn.height > 16 * 128
    evaluate.main(["--checkpoint", str(tmp_path / "run" / "backbone.safetensors"), *run[2:], f"--neighbours={out}"])


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs scikit-image")
def test_photo_patches_for_training_and_test_are_from_two_parts_of_each_photograph() -> None:
    from importlib.resources import files

    source = open_source("photo-patches")
    train, test = source.train, source.test
    assert isinstance(train, ArrayImages)
    assert isinstance(test, ArrayImages)
    assert train.arrays.shape == (1920, 32, 32, 3)
    assert test.arrays.shape == (480, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [120] * 16  # type: ignore[arg-type]
    assert np.bincount(test.labels).tolist() == [30] * 16  # type: ignore[arg-type]
    again = open_source("photo-patches").train
    assert (again.arrays == train.arrays).all()  # type: ignore[union-attr]
    # The two halves of "camera.png" differ in brightness, and so do their patches.
    label = PHOTOGRAPHS.index("camera.png")
    with Image.open(files("skimage") / "data" / "camera.png") as opened:  # type: ignore[arg-type]
        whole = opened.convert("L").resize((SHORT, SHORT), Image.Resampling.LANCZOS)
    pixels = np.asarray(whole, dtype=np.float64)
    assert SMALLEST < LARGEST < (1 - LEFT) * SHORT
    left, right = pixels[:, : round(LEFT * SHORT)], pixels[:, round(LEFT * SHORT) :]
    for images, part in ((train, left), (test, right)):
        own = images.arrays[images.labels == label].astype(np.float64)
        assert abs(own.mean() - part.mean()) < abs(own.mean() - (pixels.sum() - part.sum()) / (pixels.size - part.size))


def test_photo_patches_name_the_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the photographs in scikit-image; pip install '\.\[demo\]'"):
        open_source("photo-patches")
    package = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    with pytest.raises(UsageError, match=r"astronaut\.png cannot be read"):
        open_source("photo-patches")
