"""The images of an evaluation: unreadable ones are left out, labels stay with their images, and memory is bounded."""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from fastrm import train
from fastrm.data import Source, encoded, eval_loader, make_loader, open_source
from fastrm.data.encoded import FileImages
from fastrm.data.eval_loader import eval_view
from fastrm.data.scan import scan
from fastrm.errors import UsageError
from fastrm.evaluate import EvaluateConfig, evaluate
from fastrm.methods import LinearProtocol, build_method
from fastrm.probes import Estimate, accuracies, features, frozen_scores, gap
from fastrm.probes.features import Setting
from fastrm.probes.linear import published_linear
from fastrm.settings.config import Config, build

HERE = Setting(16, torch.device("cpu"), 0)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Colour(nn.Module):
    """The mean colour of each image [B, 3] from 0 to 255, which tells the file that it is from."""

    def forward(self, images: Tensor) -> Tensor:
        return 255 * (images.mean(dim=(2, 3)) * STD + MEAN)


def gray(index: int) -> int:
    """The gray value of the file with this index."""
    return 12 * (index + 1)


def write(folder: Path, count: int, classes: int = 4) -> None:
    """Write ``count`` PNG files of 16x16 pixels of one gray each; neighbours have different classes."""
    for index in range(count):
        path = folder / f"class{index % classes}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (gray(index),) * 3).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 20 images for training and the same 20 for validation."""
    for part in ("train", "val"):
        write(tmp_path / "pictures" / part, 20)
    return tmp_path / "pictures"


def harm(images: FileImages) -> list[int]:
    """Delete one file and truncate another, and return their indices."""
    images.paths[3].unlink()
    images.paths[10].write_bytes(images.paths[10].read_bytes()[:50])
    return [3, 10]


def opened(folder: Path) -> tuple[Source, FileImages, FileImages]:
    """The source of a folder, its training images and its validation images."""
    source = open_source(str(folder))
    assert isinstance(source.bank, FileImages)
    assert isinstance(source.test, FileImages)
    return source, source.bank, source.test


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_left_out_and_the_others_keep_their_labels(folder: Path, workers: int) -> None:
    _, _, test = opened(folder)
    lost = harm(test)
    want = [index for index in range(20) if index not in lost]
    setting = HERE._replace(workers=workers)
    for _ in range(2):  # the second pass does not warn again
        loader = eval_loader(test, image_size=16, batch_size=3, workers=workers)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of a fork beside threads
            seen = [(indices, Colour()(views)) for (views,), indices in loader]
        assert [index for indices, _ in seen for index in indices] == want
        found = torch.cat([colour for _, colour in seen])[:, 0].round().int().tolist()
        assert found == [int(test.paths[index].stem) * 12 + 12 for index in want]
        assert {Path(name).name for name in loader.broken} == {test.paths[index].name for index in lost}
    assert not said
    assert test.labels is not None
    assert torch.cat([labels for _, labels in features(Colour(), test, setting)]).tolist() == test.labels[want].tolist()


def test_a_batch_of_missing_files_is_skipped(folder: Path) -> None:
    _, _, test = opened(folder)
    test.paths[0].unlink()
    loader = eval_loader(test, image_size=16, batch_size=1, workers=0)
    with pytest.warns(UserWarning, match=r"left out, since it cannot be read: .*No such file"):
        batches = list(loader)
    assert len(batches) == 19


def test_knn_quick_linear_and_gap_count_the_images_that_were_read(folder: Path) -> None:
    source, bank, test = opened(folder)
    for images in (bank, test):
        harm(images)
    with pytest.warns(UserWarning, match="left out"):
        scores = frozen_scores({"it": Colour()}, source, HERE, knn=True, linear=True)["it"]
    method = build_method(build(data="digits", arch="test_resnet", image_size=32, method="mocov2", queue_size=8))
    apart = gap(method, test, HERE._replace(image_size=32))
    # The width of Wilson's interval depends on the number of images.
    assert scores["knn20"] == Estimate.of(np.arange(18) < round(18 * scores["knn20"].value))
    assert set(scores) == {"knn10", "knn20", "knn100", "knn200", "linear_quick"}
    assert all(abs(found.value) < 1e-6 for found in apart.values())


def test_no_image_is_scored_with_the_label_of_another(folder: Path) -> None:
    """A classifier that is right about the pixels has accuracy 1, because no image has the label of another."""
    _, _, test = opened(folder)
    harm(test)

    def by_colour(colours: Tensor) -> dict[str, Tensor]:
        return {"right": ((colours[:, 0] / 12).round().long() - 1) % 4}

    with pytest.warns(UserWarning, match="left out"):
        found = accuracies(features(Colour(), test, HERE), [by_colour])
    assert found["right"] == Estimate.of(np.ones(18, dtype=bool))


def test_training_a_classifier_uses_the_label_of_the_image_that_was_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bank, _ = opened(folder)
    harm(bank)
    pairs: list[tuple[int, int]] = []

    class Heads:
        def __init__(self, *_: object, **__: object) -> None: ...

        def step(self, colours: Tensor, truth: Tensor, _: float) -> None:
            pairs.extend(zip((colours[:, 0] / 12).round().int().tolist(), truth.tolist(), strict=True))

    monkeypatch.setattr("fastrm.probes.linear.LinearHeads", Heads)
    with pytest.warns(UserWarning, match="left out"):
        published_linear({"it": Colour()}, source, HERE, LinearProtocol(lr=0.1, batch_size=8, epochs=3))
    assert len(pairs) == 48
    assert all(label == (number - 1) % 4 for number, label in pairs)


def test_more_than_a_tenth_of_broken_files_is_refused(folder: Path) -> None:
    _, _, test = opened(folder)
    harm(test)
    test.paths[5].write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UsageError, match="3 of 20 files are broken"):
        list(features(Colour(), test, HERE))


def test_a_run_and_its_evaluation_report_files_lost_after_the_scan(
    folder: Path, small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lost = folder / "val" / "class3" / "03.png"

    def then_lost(source: Source, *, workers: int):
        found = scan(source, workers=workers)
        lost.unlink(missing_ok=True)
        return found

    monkeypatch.setattr("fastrm.run.images.scan", then_lost)
    with pytest.warns(UserWarning, match=r"left out, since it cannot be read: .*03\.png \(No such file"):
        train.train(small(data=str(folder), batch_size=8, max_steps=2, epochs=1, eval_every=1))
    assert str(lost) in (tmp_path / "run" / "skipped.txt").read_text()
    Image.new("RGB", (16, 16)).save(lost)
    os.truncate(folder / "val" / "class0" / "04.png", 60)
    monkeypatch.setattr("fastrm.evaluate.scan", then_lost)
    with pytest.warns(UserWarning, match=r"03\.png"):
        found = evaluate(EvaluateConfig(checkpoint=tmp_path / "run", knn=True, semi=0.5, device="cpu", workers=0))
    assert found["pictures"]["left_out"] == 2
    assert "left out   1 broken files; the first is" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]["pictures"]["left_out"] == 2
    scores = found["pictures"]["scores"]["student"]
    assert scores["knn20"] == Estimate.of(np.arange(18) < round(18 * scores["knn20"].value))
    assert scores["semi_0.5"] == Estimate.of(np.arange(18) < round(18 * scores["semi_0.5"].value))


def noise(width: int, height: int) -> Image.Image:
    """An RGB image of random pixels."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def torchvisions(picture: Image.Image, image_size: int) -> Tensor:
    """The published view in float32 [3, size, size]: the whole image is resized, and then cropped."""
    if image_size <= 64:
        resized = [v2.Resize((image_size, image_size), antialias=True)]
    else:
        resized = [v2.Resize(round(image_size * 256 / 224), antialias=True), v2.CenterCrop(image_size)]
    normalised = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN.tolist(), STD.tolist())]
    return v2.Compose([*resized, *normalised])(picture)


@pytest.mark.parametrize("size", [(260, 300), (500, 375), (99, 160), (20, 300), (7, 100), (3, 2), (1, 1), (224, 224)])
@pytest.mark.parametrize("image_size", [32, 65, 224])
def test_views_equal_torchvision_bit_for_bit(size: tuple[int, int], image_size: int) -> None:
    assert torch.equal(
        eval_view(v2.functional.pil_to_tensor(noise(*size)), image_size), torchvisions(noise(*size), image_size)
    )


@pytest.mark.parametrize("size", [(1, 30), (30, 1), (200, 5), (5, 201), (2000, 100), (100, 2001)])
@pytest.mark.parametrize("image_size", [32, 96, 224])
def test_views_of_long_images_equal_torchvision_within_rounding(size: tuple[int, int], image_size: int) -> None:
    off = (
        (
            eval_view(v2.functional.pil_to_tensor(noise(*size)), image_size) - torchvisions(noise(*size), image_size)
        ).abs()
        * STD[:, None, None]
        * 255
    )
    assert off.max() < 2.1  # in steps of 1/255: Pillow rounds between rows and columns, in either order
    assert off.mean() < 0.4


LONG = [(1, 30_000), (30_000, 1), (65_500, 20), (20, 65_500), (1, 1)]


@pytest.mark.parametrize("image_size", [32, 224])
def test_memory_is_bounded_for_images_of_any_shape(
    image_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation and training, no intermediate image is larger than the view and the file together."""
    for number in range(8):
        Image.new("RGB", LONG[number % len(LONG)], (200, 100, 50)).save(tmp_path / f"{number}.png")
    made: list[int] = []
    plain_resize, plain_interpolate = Image.Image.resize, nn.functional.interpolate

    def resize(picture: Image.Image, size: tuple[int, int], *args: Any, **options: Any) -> Image.Image:
        # Pillow resizes rows before columns. The intermediate image has the new width, and the old rows that are
        # needed.
        box = options.get("box") or (0, 0, *picture.size)
        made.append(max(size[0] * min(picture.height, int(box[3] - box[1]) + 3), size[0] * size[1]))
        return plain_resize(picture, size, *args, **options)

    def interpolate(*args: Any, **options: Any) -> Tensor:
        out = plain_interpolate(*args, **options)
        made.append(out[0, 0].numel())
        return out

    monkeypatch.setattr(Image.Image, "resize", resize)
    monkeypatch.setattr(nn.functional, "interpolate", interpolate)
    source = open_source(str(tmp_path))
    (((views,), _),) = eval_loader(source.train, image_size=image_size, batch_size=8, workers=0)
    colours = (views * STD[:, None, None] + MEAN[:, None, None]) * 255
    want = torch.tensor([200.0, 100.0, 50.0])[:, None, None].expand_as(colours)
    torch.testing.assert_close(colours, want, atol=1.01, rtol=0)
    for method in ("mocov2", "byol"):
        training = make_loader(
            source, method=method, image_size=image_size, batch_size=8, device="cpu", workers=0, seed=0, loader="torch"
        )
        assert all(views.isfinite().all() for views in next(iter(training)).views)
    assert len(made) >= 8 + 2 * 16
    assert max(made) <= 65_500 * 20 * 2


def test_images_above_the_pixel_limit_of_pillow_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (4000, 3000)).save(folder / "val" / "class0" / "00.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)
    with pytest.warns(UserWarning, match=r"00\.png \(.*12000000 pixels\) exceeds.*cut it into smaller images"):
        list(eval_loader(opened(folder)[2], image_size=32, batch_size=4, workers=0))


def test_processes_take_turns_at_the_batches_of_one_process(folder: Path) -> None:
    _, _, test = opened(folder)
    whole = list(eval_loader(test, image_size=16, batch_size=3, workers=0))
    for size in (2, 3, 8):
        loaders = [
            eval_loader(test, image_size=16, batch_size=3, workers=0, rank=rank, world_size=size)
            for rank in range(size)
        ]
        assert sum(map(len, loaders)) == len(whole) == 7
        dealt = [list(loader) for loader in loaders]
        for number, batch in enumerate(whole):
            same = dealt[number % size][number // size]
            assert same.indices == batch.indices
            assert torch.equal(same.views[0], batch.views[0])


def test_the_limited_set_of_labelled_images_is_reproducible(folder: Path) -> None:
    source, bank, _ = opened(folder)
    few = source.limited(7)
    assert few.bank is not None
    assert few.bank.labels is not None
    names = [few.bank.name(index) for index in range(7)]
    assert names == [source.limited(7).bank.name(index) for index in range(7)]  # type: ignore[union-attr]
    every = [bank.name(index) for index in range(20)]
    assert names == sorted(names, key=every.index)
    assert [f"class{label}" for label in few.bank.labels] == [Path(name).parent.name for name in names]
    assert len(few.train) == 20
    assert source.limited(20).bank is bank


def test_a_temporary_read_error_does_not_mark_a_file_as_broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, test = opened(folder)
    whole, failed = encoded._whole, list[str]()

    def flaky(path: str) -> tuple[bytes, int]:
        if failed.count(path) < 2:
            failed.append(path)
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return whole(path)

    pauses: list[float] = []
    monkeypatch.setattr(encoded, "_whole", flaky)
    monkeypatch.setattr("fastrm.files.time.sleep", pauses.append)
    assert test.content(0) == test.paths[0].read_bytes()
    assert len(failed) == 2
    assert pauses == sorted(pauses)
    test.paths[1].unlink()  # a missing file is not a temporary error
    failed.extend([test.name(1)] * 2)
    with pytest.raises(FileNotFoundError):
        test.content(1)
    assert len(pauses) == 2
