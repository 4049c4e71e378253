"""Data sources, loaders, published augmentations, and the views of an evaluation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastrm.data import Source, eval_loader, make_loader, open_source
from fastrm.data.decode import BrokenImage, decode
from fastrm.data.draws import BatchSampler
from fastrm.data.encoded import FileImages
from fastrm.data.sources import ArrayImages
from fastrm.errors import UsageError
from fastrm.methods import find
from tests.conftest import FASHION_MNIST


def loader(data: str | Source, **options: object):
    """A loader for MoCo-v2 with small defaults."""
    defaults = {"method": "mocov2", "image_size": 24, "batch_size": 16, "device": "cpu", "workers": 0, "seed": 5}
    return make_loader(data, **{**defaults, **options})


def test_three_layouts_of_image_folders(pictures: Path) -> None:
    split, classes, flat = (open_source(str(pictures / name)) for name in ("split", "classes", "flat"))
    assert (len(split.train), len(classes.train), len(flat.train)) == (84, 96, 192)
    assert split.test is not None
    assert len(split.test) == 12
    assert split.bank is split.train
    assert flat.bank is flat.test is None
    assert "without labels" in flat.about
    assert classes.bank is not None
    assert classes.test is not None
    assert isinstance(classes.bank, FileImages)
    assert isinstance(classes.test, FileImages)
    assert (len(classes.bank), len(classes.test)) == (87, 9)
    assert not set(classes.bank.paths) & set(classes.test.paths)
    assert isinstance(split.train, FileImages)
    assert split.train.labels is not None
    for path, label in zip(split.train.paths, split.train.labels, strict=True):
        assert path.parent.name == f"digit{label}"


def test_paths_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    for data, message in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "holds no image"),
        (tmp_path / "text", "holds no image"),
        (tmp_path / "text" / "a.txt", "is a file"),
    ):
        with pytest.raises(UsageError, match=f"--data {data} {message}"):
            open_source(str(data))


def test_a_validation_class_that_training_lacks_is_refused(pictures: Path, tmp_path: Path) -> None:
    for part, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (9, 9)).save(tmp_path / part / name / "x.png")
    with pytest.raises(UsageError, match="classes that the training images lack: c"):
        open_source(str(tmp_path))


def test_digits_have_their_known_sizes() -> None:
    source = open_source("digits")
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (1437, 360)
    assert source.train.labels is not None
    assert np.bincount(source.train.labels).min() > 100
    assert source.train.picture(0).size == (8, 8)


def test_fashion_mnist_from_idx_files_plain_or_gzip(idx_folder: Path) -> None:
    source = open_source("fashion-mnist", idx_folder)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (40, 12)
    want = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    assert isinstance(source.train, ArrayImages)
    assert (source.train.arrays == want).all()
    (idx_folder / "train-images-idx3-ubyte.gz").write_bytes(b"junk")
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        open_source("fashion-mnist", idx_folder)


def test_fashion_mnist_has_its_known_sizes() -> None:
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"needs Fashion-MNIST in {FASHION_MNIST} (Debian: apt-get install dataset-fashion-mnist)")
    source = open_source("fashion-mnist", FASHION_MNIST)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (60_000, 10_000)
    assert source.train.labels is not None
    assert (np.bincount(source.train.labels) == 6000).all()


def test_a_data_set_that_cannot_be_downloaded_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", offline)
    with pytest.raises(UsageError, match=r"cifar10 is not in .* give the folder that holds it with --data-root"):
        open_source("cifar10", tmp_path)


def test_unusual_image_formats_are_decoded_as_displayed(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)
    picture = Image.fromarray(grey)
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "progressive.jpg", progressive=True)
    picture.convert("P").save(tmp_path / "palette.png")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.save(tmp_path / "UPPER CASE ü.JPG".replace("JPG", "WEBP"))
    Image.fromarray(grey.astype(np.uint16) << 8).save(tmp_path / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    picture.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    for path in sorted(tmp_path.iterdir()):
        read = decode(path.read_bytes())
        assert (read.mode, read.size) == ("RGB", (48, 32)), path.name
        assert np.abs(np.asarray(read).mean(axis=2) - grey).mean() < 4, path.name


def test_an_unreadable_file_is_named_and_replaced_by_another_in_training(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG but cut")
    images = FileImages(sorted(tmp_path.iterdir()), None)
    index, picture = images.read(0, decode)
    assert (index, picture.getpixel((0, 0))) == (1, (255, 0, 0))
    assert images.unreadable == {0: "cannot identify image file"}
    with pytest.raises(BrokenImage, match=r"^cannot identify image file$"):
        images.pixels(0)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(UsageError, match="none of the 2 image files"):
        FileImages(images.paths, None).read(0, decode)


def test_an_epoch_has_whole_batches_and_each_image_at_most_once() -> None:
    pixels = np.arange(70, dtype=np.uint8)[:, None, None].repeat(8, axis=1).repeat(8, axis=2)
    source = Source(name="ramp", train=ArrayImages(pixels, None), bank=None, test=None, about="")
    made = loader(source, batch_size=16)
    assert len(made) == 4
    orders = [BatchSampler(70, 16, 5, 0, 1) for _ in range(2)]
    orders[1].epoch = 1
    first, second = ([index for batch in order for index in batch.images] for order in orders)
    assert len(set(first)) == len(set(second)) == 64
    assert first != second
    assert len(list(made)) == 4


def test_ranks_read_different_images_of_an_epoch() -> None:
    shares = [[i for batch in BatchSampler(70, 8, 5, rank, 2) for i in batch.images] for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 32
    assert not set(shares[0]) & set(shares[1])


@pytest.mark.parametrize("kind", ["torch", "memory"])
def test_views_depend_on_the_seed_and_not_on_the_workers(kind: str) -> None:
    def views(**options: Any) -> list[torch.Tensor]:
        made = loader("digits", loader=kind, **options)
        return [torch.stack(batch.views) for batch, _ in zip(made, range(3), strict=False)]

    alone, helped, other = views(), views(workers=2), views(seed=6)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert not torch.equal(alone[0], other[0])
    assert not torch.equal(alone[0][0], alone[0][1])
    assert alone[0].shape == (2, 16, 3, 24, 24)


@pytest.mark.parametrize("kind", ["torch", "memory"])
def test_each_pass_is_a_new_epoch_and_seek_moves_to_any_batch(kind: str) -> None:
    digits = open_source("digits").train
    assert isinstance(digits, ArrayImages)
    few = Source(name="few", train=digits.subset(np.arange(40)), bank=None, test=None, about="")
    made = loader(few, batch_size=16, loader=kind)
    every = [torch.stack(batch.views) for _ in range(2) for batch in made]
    assert not torch.equal(every[0], every[len(made)])
    for batch in (0, 1, len(made) + 1):
        made.seek(batch)
        assert torch.equal(torch.stack(next(iter(made)).views), every[batch])


def test_views_do_not_change_the_global_random_state() -> None:
    made = loader("digits", loader="torch")
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    next(iter(made))
    next(iter(loader("digits", loader="memory")))
    assert torch.equal(torch.rand(3), want)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match="--batch-size 2000 is more than the 1437 images of digits"):
        loader("digits", batch_size=2000)
    with pytest.raises(UsageError, match="--loader dali reads files only"):
        loader("digits", loader="dali")


def test_augmentations_have_the_published_values() -> None:
    v2_first, v2_second = find("mocov2").augmentation(0.2).views
    assert v2_first == v2_second
    assert (v2_first.saturation, v2_first.hue, v2_first.blur_probability, v2_first.solarize_probability) == (
        0.4, 0.1, 0.5, 0.0,
    )  # fmt: skip
    for method, interpolation in (("mocov3", "bilinear"), ("byol", "bicubic")):
        first, second = find(method).augmentation(0.08).views
        assert (first.blur_probability, second.blur_probability) == (1.0, 0.1)
        assert (first.solarize_probability, second.solarize_probability) == (0.0, 0.2)
        for view in (first, second):
            assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
            assert (view.jitter_probability, view.grayscale_probability, view.flip_probability) == (0.8, 0.2, 0.5)
            assert view.crop_scale == (0.08, 1.0)
            assert view.interpolation == interpolation


def test_evaluation_crops_the_centre_of_large_images_and_resizes_small_ones() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 300, 260, 3), dtype=np.uint8)
    images = ArrayImages(pixels, None)
    (((batch,), _),) = eval_loader(images, image_size=224, batch_size=4, workers=0)
    want = v2.functional.center_crop(v2.functional.resize(images.picture(1), 256, antialias=True), 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels_back = batch[1].permute(1, 2, 0) * std + mean
    np.testing.assert_allclose(pixels_back.numpy(), np.asarray(want) / 255, atol=1e-6)
    (((small,), _),) = eval_loader(images, image_size=32, batch_size=4, workers=0)
    assert small.shape == (3, 3, 32, 32)


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png", ".hidden.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    os.mkdir(tmp_path / ".cache")
    Image.new("RGB", (8, 8)).save(tmp_path / ".cache" / "b.png")
    assert len(open_source(str(tmp_path)).train) == 1
