"""Images in files and shards, through each loader: parity with torchvision, unusual and broken files, and order."""

from __future__ import annotations

import errno
import gc
import gzip
import io
import itertools
import os
import shutil
import tarfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastrm import train
from fastrm.data import dali, eval_loader, make_loader, open_source
from fastrm.data.dali import dali_problem, dali_trial, encoded
from fastrm.data.dali_loader import DaliLoader
from fastrm.data.decode import decode
from fastrm.data.draws import draw_views
from fastrm.data.encoded import EncodedImages, FileImages
from fastrm.data.formats import RGB
from fastrm.data.memory_loader import MemoryLoader, of_one_size
from fastrm.data.patterns import expand
from fastrm.data.scan import scan
from fastrm.data.settling import settled
from fastrm.data.sources import ArrayImages
from fastrm.data.stored import examined
from fastrm.data.torch_loader import TorchLoader
from fastrm.data.workers import started
from fastrm.errors import TrainingError, UsageError
from fastrm.methods import find
from fastrm.settings.config import Config
from tests.conftest import natural_pictures
from tests.interpreted import other_defaults
from tests.test_batched import composed

needs_dali = pytest.mark.skipif(dali_problem() is not None, reason=f"needs DALI: {dali_problem()}")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid images in all formats and shapes."""
    folder = tmp_path_factory.mktemp("odd files é")
    colour = Image.fromarray(natural_pictures(1, 60, 80)[0].permute(1, 2, 0).numpy())
    gray = colour.convert("L")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    gray.save(folder / "gray.jpg")
    colour.save(folder / "progressive.jpg", progressive=True)
    colour.convert("P").save(folder / "palette.png")
    colour.convert("RGBA").save(folder / "alpha.png")
    gray.convert("LA").save(folder / "gray alpha.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) << 8).save(folder / "sixteen.png")
    for ending in ("webp", "bmp", "tiff", "png", "JPEG", "PNG"):
        colour.save(folder / f"plain.{ending}")
    colour.save(folder / "png.jpg", format="PNG")
    colour.save(folder / "Ümlaut 日本.JPG")
    colour.resize((3, 2)).save(folder / "tiny.png")
    colour.resize((1, 1)).save(folder / "one.jpg")
    colour.resize((4000, 20)).save(folder / "long.jpg")
    colour.resize((20, 4000)).save(folder / "high.png")
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        colour.save(folder / f"turned{orientation}.jpg", exif=exif)
        colour.save(folder / f"turned{orientation}.png", exif=exif)
    colour.save(folder / "._hidden.jpg")
    return folder


@pytest.fixture
def broken(pictures: Path, tmp_path: Path) -> Path:
    """A folder of 20 valid images, a truncated one, an empty file, a text file, and the header of a PNG."""
    sound = sorted((pictures / "flat").glob("*.jpg"))[:20]
    for path in sound:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = sound[0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:-60])  # cut within the image data, after its header
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "header.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x08\x00\x00\x00\x08\x08\x02"
    )
    return tmp_path


def add_sound(pictures: Path, folder: Path, count: int) -> None:
    """Copy this number of valid images to a folder."""
    for i, path in enumerate(sorted((pictures / "flat").glob("*.jpg"))[:count]):
        (folder / f"more{i}.jpg").write_bytes(path.read_bytes())


def skipped(out: Path) -> list[str]:
    """The names of the files in skipped.txt."""
    return [Path(line.split("\t")[0]).name for line in (out / "skipped.txt").read_text().splitlines()]


def made(data: Path | str, kind: str = "dali", **options: object):
    """A loader of this kind with small settings."""
    defaults = {"method": "mocov2", "image_size": 24, "batch_size": 8, "device": "cpu", "workers": 2, "seed": 5}
    return make_loader(str(data), **{**defaults, "loader": kind, **options})


DALI = pytest.param("dali", marks=needs_dali)


@pytest.mark.parametrize("kind", ["torch", "memory"])
def test_the_default_dtype_of_torch_does_not_change_views(pictures: Path, kind: str) -> None:
    found = []
    for dtype in ("float64", "float16", "float32"):
        with other_defaults(dtype):
            found.append([*next(iter(made(pictures, kind, workers=0))).views])
    for views in found[:2]:
        assert all(torch.equal(mine, right) for mine, right in zip(views, found[2], strict=True))


@pytest.mark.parametrize(
    "kind",
    [
        DALI,
        pytest.param("dali by regions", marks=needs_dali),
        pytest.param("dali on a GPU", marks=[needs_dali, pytest.mark.gpu]),
        "torch",
    ],
)
@pytest.mark.parametrize("method", ["mocov3", "byol"])
def test_views_of_unusual_files_equal_torchvision(odd: Path, method: str, kind: str) -> None:
    images = open_source(str(odd)).train
    assert isinstance(images, FileImages)
    recipe, place = find(method).augmentation(0.2), "cuda" if "GPU" in kind else "cpu"
    common: dict[str, Any] = {
        "image_size": 48, "batch_size": len(images), "device": torch.device(place), "dtype": torch.float32,
        "workers": 1, "seed": 5, "rank": 0, "world_size": 1,
    }  # fmt: skip
    loader: Any
    if kind == "torch":
        loader = TorchLoader(images, recipe, **common)
    else:
        loader = DaliLoader(images, recipe, regions="regions" in kind, **common)
    (batch,) = loader._sampler
    views = next(iter(loader)).views
    pictures = [images.picture(index) for index in batch.images]
    sizes = [(picture.height, picture.width) for picture in pictures]
    drawn = draw_views(recipe.views, sizes, 48, loader._sampler.generator(batch))
    mean, std = (torch.tensor(values)[:, None, None] for values in (RGB.mean, RGB.std))
    for view, draws, out in zip(recipe.views, drawn, views, strict=True):
        for i, picture in enumerate(pictures):
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            want = composed(image, draws, i, view.interpolation, 48, 2)
            error = float((out[i].cpu() * std + mean - want).abs().mean())
            # JPEG decoders differ by a step or two, because they round the inverse cosine transform and the upsampled
            # chroma differently. At its threshold, solarizing makes a small difference large.
            assert error < (12 if draws.solarize[i] else 4) / 255, images.paths[batch.images[i]]


def test_files_for_dali_keep_their_displayed_size(odd: Path) -> None:
    for path in sorted(odd.iterdir()):
        assert encoded(path.read_bytes()).size == decode(path.read_bytes()).size[::-1], path.name


@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_seek_is_exact_with_any_number_of_workers(pictures: Path, kind: str) -> None:
    loader = made(pictures / "classes", kind)
    every = [torch.stack(batch.views) for _ in range(2) for batch in loader]
    assert len(loader) == 12
    assert len(every) == 24
    assert not torch.equal(every[0], every[12])
    other = made(pictures / "classes", kind, workers=1)
    for batch in (0, 5, 13):
        other.seek(batch)
        assert torch.equal(torch.stack(next(iter(other)).views), every[batch])
    assert every[0].shape == (2, 8, 3, 24, 24)
    assert not torch.equal(every[0][0], every[0][1])


@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_ranks_of_each_loader_read_different_images(pictures: Path, kind: str) -> None:
    loaders = [made(pictures / "classes", kind, workers=1, rank=rank, world_size=2) for rank in (0, 1)]
    shares = [[index for batch in loader._sampler for index in batch.images] for loader in loaders]
    assert sorted(shares[0] + shares[1]) == list(range(96))
    first, second = (next(iter(loader)).views[0] for loader in loaders)
    assert first.shape == (8, 3, 24, 24)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_unusual_files_are_read_for_two_epochs(odd: Path, kind: str, tmp_path: Path) -> None:
    for file in odd.iterdir():
        if kind == "torch" or examined(file.read_bytes()).dtype == "uint8":
            shutil.copy(file, tmp_path)
    loader = made(tmp_path, kind, workers=1)
    for _ in range(2):
        assert all(torch.isfinite(torch.stack(batch.views)).all() for batch in loader)


@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_broken_files_are_named_and_left_out(broken: Path, pictures: Path, kind: str) -> None:
    loader = made(broken, kind, batch_size=24)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UsageError, match=r"[34] of 24 files are broken"):
        next(iter(loader))
    add_sound(pictures, broken, 30)
    loader = made(broken, kind, batch_size=27)
    with pytest.warns(UserWarning, match="left out") as seen:
        views = [torch.stack(batch.views) for _ in range(2) for batch in loader]
    assert len(views) == 4
    assert all(torch.isfinite(pair).all() for pair in views)
    for name in ("cut.jpg", "empty.jpg", "text.png", "header.png"):
        assert sum(name in str(warning.message) for warning in seen) == 1, name
    assert {Path(name).name for name in loader.broken} == {"cut.jpg", "empty.jpg", "text.png", "header.png"}


@pytest.mark.parametrize("kind", [DALI, "torch"])
@pytest.mark.parametrize("damage", ["scan", "tables", "chunk"])
def test_a_file_with_damaged_content_stops_no_loader(pictures: Path, tmp_path: Path, kind: str, damage: str) -> None:
    add_sound(pictures, tmp_path, 23)
    picture = Image.fromarray(natural_pictures(1, 60, 80)[0].permute(1, 2, 0).numpy())
    name = "damaged.png" if damage == "chunk" else "damaged.jpg"
    picture.save(tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    middle = content.index(b"\xff\xc4") + 8 if damage == "tables" else len(content) // 2
    content[middle : middle + 40] = bytes(range(200, 240))
    (tmp_path / name).write_bytes(content)
    loader = made(tmp_path, kind, workers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a decoder may still return an image
        for _ in range(2):
            assert sum(len(batch.indices) for batch in loader) == 24


class Pipeline:
    """In a reference cycle; notes the processes that free it."""

    def __init__(self, file: Path) -> None:
        self.file, self.own = file, self

    def __del__(self) -> None:
        with self.file.open("a") as file:
            file.write(f"{os.getpid()}\n")


class Collecting(torch.utils.data.Dataset[int]):
    """Frees the garbage of the process that reads it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def test_loader_processes_do_not_free_what_another_process_made(tmp_path: Path) -> None:
    gc.disable()
    try:
        Pipeline(tmp_path / "freed")
        list(started(torch.utils.data.DataLoader(Collecting(), num_workers=1)))
    finally:
        gc.enable()
    assert (tmp_path / "freed").read_text() == f"{os.getpid()}\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_memory_does_not_grow_over_epochs(pictures: Path, kind: str) -> None:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc to read the resident set")
    loader = made(pictures / "classes", kind)
    resident = []
    for _ in range(20):
        assert len(list(loader)) == 12
        resident.append(int(status.read_text().split()[1]))
    assert resident[-1] < 1.05 * resident[4]


@pytest.fixture(autouse=True)
def _cache_of_our_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_a_missing_dali_is_reported(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastrm.data.dali_problem", lambda: "DALI is not installed")
    with pytest.raises(UsageError, match="--loader dali cannot be used: DALI is not installed"):
        made(pictures / "flat", "dali")


@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_broken_files_are_found_before_a_run(
    broken: Path, pictures: Path, kind: str, small: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--data: 4 of 24 files are broken, more than a tenth; .*cut.jpg"):
        train.train(small(data=str(broken), loader=kind, batch_size=8))
    add_sound(pictures, broken, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no broken file is left to be found while reading
        summary = train.train(small(data=str(broken), loader=kind, batch_size=8))
    assert summary["images"] == 50
    assert skipped(tmp_path / "run") == ["cut.jpg", "empty.jpg", "header.png", "text.png"]


@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_broken_files_found_without_a_scan_are_listed(
    broken: Path, pictures: Path, kind: str, small: Callable[..., Config], tmp_path: Path
) -> None:
    add_sound(pictures, broken, 30)
    options: dict[str, Any] = {"data": str(broken), "loader": kind, "batch_size": 27, "workers": 1, "max_steps": 4}
    with pytest.warns(UserWarning, match="left out"):
        train.train(small(**options, scan=False))
    assert sorted(skipped(tmp_path / "run")) == ["cut.jpg", "empty.jpg", "header.png", "text.png"]


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_a_deleted_folder_is_reported_in_one_line(pictures: Path, kind: str, tmp_path: Path) -> None:
    shutil.copytree(pictures / "flat", tmp_path / "data")
    loader = made(tmp_path / "data", kind, workers=1)
    shutil.rmtree(tmp_path / "data")
    batches = iter(loader)
    with pytest.raises(UsageError, match=r"192 .*files") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_the_scan_includes_the_images_for_knn_and_is_cached(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "split", tmp_path / "data")
    some, other = sorted((tmp_path / "data" / "val").rglob("*.jpg"))[:2]
    some.write_bytes(some.read_bytes()[:-300])
    source = open_source(str(tmp_path / "data"))
    found, faults = scan(source, workers=2)
    assert [*faults] == [str(some)]
    assert found.test is not None
    assert (len(found.train), len(found.test)) == (84, 11)
    assert found.bank is found.train
    assert found.test.labels is not None
    assert len(found.test.labels) == 11
    with mock.patch("fastrm.data.scan.examined", side_effect=AssertionError("looked again")):
        assert scan(source, workers=2)[1] == faults
    other.write_bytes(b"")
    with pytest.raises(UsageError, match="2 of 12 files are broken"):
        scan(source, workers=2)


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> str:
    """The pattern of two shards of 48 images with labels, and members that are not images."""
    paths = sorted((pictures / "classes").rglob("*.jpg"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard:04d}.tar", "w") as tar:
            for i, path in enumerate(paths[48 * shard : 48 * shard + 48]):
                for ending, content in (("jpg", path.read_bytes()), ("cls", path.parent.name[-1].encode())):
                    info = tarfile.TarInfo(f"some/{shard}{i:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            tar.addfile(tarfile.TarInfo("some/._000.jpg"))
            tar.addfile(tarfile.TarInfo("../../etc/readme.txt"))
    return str(tmp_path / "train-{0000..0001}.tar")


@pytest.mark.parametrize("kind", [DALI, "torch"])
def test_shards_give_the_views_of_the_files(shards: str, pictures: Path, kind: str) -> None:
    images, files = open_source(shards).train, open_source(str(pictures / "classes")).train
    assert isinstance(files, FileImages)
    assert len(images) == 96
    # The label of a class folder is its position among the sorted names; a number in a shard is the label itself.
    digits = sorted({int(path.parent.name[-1]) for path in files.paths})
    assert images.labels is not None
    assert files.labels is not None
    assert images.labels.tolist() == [digits[label] for label in files.labels]
    for mine, other in zip(made(shards, kind), made(pictures / "classes", kind), strict=True):
        assert torch.equal(torch.stack(mine.views), torch.stack(other.views))


def test_a_run_on_shards(shards: str, small: Callable[..., Config]) -> None:
    summary = train.train(small(data=shards, batch_size=16, eval_every=1, epochs=1, max_steps=None))
    assert summary["images"] == 96
    assert any("knn" in name for name in summary)


def test_missing_or_invalid_shards_are_refused(shards: str, tmp_path: Path) -> None:
    for pattern, message in (
        (str(tmp_path / "train-{0..2}.tar"), "train-0.tar does not exist"),
        (str(tmp_path / "train-{0001..0000}.tar"), "counts down"),
    ):
        with pytest.raises(UsageError, match=message):
            open_source(pattern)
    whole = (tmp_path / "train-0001.tar").read_bytes()
    for name, content in (("text", b"no tar" * 200), ("gzip", gzip.compress(whole)), ("empty", b"")):
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(UsageError, match=r"is not a whole, uncompressed tar file|holds no image"):
            open_source(str(tmp_path / f"{name}.tar"))
    assert expand("{a,b}-{08..10}.tar") == [f"{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10")]


def test_a_truncated_shard_is_refused(shards: str, tmp_path: Path) -> None:
    whole = (tmp_path / "train-0001.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(UsageError, match=r"cut.tar is not a whole, uncompressed tar file"):
        open_source(str(tmp_path / "cut.tar"))


def test_the_scan_reads_every_file_once(pictures: Path) -> None:
    """Without a val folder, the images for kNN are a part of the training images."""
    with mock.patch("fastrm.data.scan.examined", side_effect=examined) as look:
        found, faults = scan(open_source(str(pictures / "classes")), workers=2)
    assert look.call_count == len(found.train) == 96
    assert not faults


# Decoded images kept in memory


def kept_loader(folder: Path, **options: Any) -> Any:
    """A loader for MoCo-v3 with small settings."""
    defaults = {"method": "mocov3", "image_size": 24, "batch_size": 8, "device": "cpu", "workers": 0, "seed": 5}
    return make_loader(folder, **{**defaults, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_images_kept_in_memory_give_the_same_views_and_are_decoded_once(
    workers: int, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = kept_loader(pictures / "classes", loader="torch")
    kept = kept_loader(pictures / "classes", loader="memory", workers=workers)
    assert "decoded images are kept in memory" in kept.notes[0]
    for _ in range(2):
        for mine, other in zip(kept, plain, strict=True):
            assert mine.indices == other.indices
            assert all(torch.equal(a, b) for a, b in zip(mine.views, other.views, strict=True))
    if not workers:
        monkeypatch.setattr("fastrm.data.encoded.FileImages.content", lambda *_: pytest.fail("read again"))
        assert len(list(kept)) == len(plain)


@pytest.mark.parametrize("deep", [False, True])
def test_a_small_set_is_kept_in_memory_by_default(
    deep: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the size of the decoded images, and 8 bytes per image for its offset."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "deep" if deep else pictures / "flat"
    if deep:
        folder.mkdir()
        for index in range(12):
            values = np.random.default_rng(index).integers(0, 4096, (48, 32), dtype=np.uint16)
            Image.fromarray(values).save(folder / f"{index}.png")
    source, _ = scan(open_source(folder, keep=False), workers=1)
    source = replace(source, train=source.train.subset(np.arange(12)))
    shapes = [source.train.values(i).shape for i in range(len(source.train))]
    room = sum(height * width * (2 if deep else 3) for height, width, _ in shapes) + 8 * (len(shapes) + 1)

    def made(data: Any, **options: Any) -> Any:
        return kept_loader(data, **{"epochs": 2, "batch_size": 4} | options)

    def is_kept(loader: Any) -> bool:
        return any("kept in memory" in note for note in loader.notes)

    for few, right in ((room, True), (room - 8, False)):
        with monkeypatch.context() as patch:
            patch.setattr("fastrm.data.kept.capacity", lambda device, few=few: int(few / 0.03) + 1)
            assert is_kept(made(source)) == right
    unknown = open_source(folder, keep=False)
    assert not any(map(is_kept, (made(source, epochs=1), made(source, loader="torch"), made(unknown))))
    kept, plain = made(source), made(source, loader="torch")
    wanted = [list(plain), list(plain)]
    for epoch, want in enumerate(wanted):
        if epoch:
            monkeypatch.setattr("fastrm.data.encoded.FileImages.content", lambda *_: pytest.fail("read again"))
        for mine, other in zip(kept, want, strict=True):
            assert mine.indices == other.indices
            assert all(torch.equal(a, b) for a, b in zip(mine.views, other.views, strict=True))


def test_images_that_do_not_fit_in_memory_are_shrunk_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(8):
        Image.new("RGB", (300, 200), (30 * index, 100, 200)).save(tmp_path / f"{index}.png")
    full = 8 * 300 * 200 * 3
    for capacity, said in ((4 * full, "are kept in memory"), (full, "is shrunk to 54 pixels")):
        monkeypatch.setattr("fastrm.data.kept.capacity", lambda device, capacity=capacity: capacity)
        loader = kept_loader(tmp_path, loader="memory")
        assert said in loader.notes[0]
        (((first, _), _),) = loader
        assert first.shape == (8, 3, 24, 24)
    images = loader._images
    assert images.values(3).shape == (54, 81, 3)
    assert (images.values(3) == [90, 100, 200]).all()
    monkeypatch.setattr("fastrm.data.kept.capacity", lambda device: 10_000)
    with pytest.raises(
        UsageError, match=r"--loader memory: the images take .* even if .*; give --loader torch or auto"
    ):
        kept_loader(tmp_path, loader="memory")


class Failing:
    """A DALI pipeline that raises an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self, **inputs: Any) -> Any:
        raise self.error


def of_dali(operator: str, met: str) -> RuntimeError:
    """An error as DALI reports it from one of its operators."""
    return RuntimeError(
        f"Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.{operator}`,\nwhich was used in the "
        f'pipeline definition with the following traceback:\n\n  File "/memory/cuda.py", line 1\n\nencountered:\n\n'
        f"{met}\nCurrent pipeline object is no longer valid."
    )


@needs_dali
@pytest.mark.parametrize(
    "error",
    [
        of_dali("decoders.image", "CUDA allocation failed. Current memory usage: 80 GB"),
        of_dali("decoders.image", "nvImageCodec failure: '#6'"),
        of_dali("decoders.image", "Can't allocate 4194304 bytes on device 0."),
        of_dali("decoders.image", "nvml error (999): An internal driver error occurred"),
        of_dali("slice", "Slice can't be placed out of bounds"),
        RuntimeError("CUDA runtime API error cudaErrorIllegalAddress (700)"),
    ],
)
def test_errors_that_no_file_causes_are_raised(pictures: Path, error: RuntimeError) -> None:
    loader = made(pictures / "classes")
    loader._decoder._pipeline = Failing(error)
    with pytest.raises(RuntimeError) as raised:
        next(iter(loader))
    assert raised.value is error


@needs_dali
def test_a_training_batch_that_only_pillow_decodes_is_reported(pictures: Path) -> None:
    want = next(iter(made(pictures / "classes")))
    loader = made(pictures / "classes")
    loader._decoder._pipeline = Failing(of_dali("decoders.image", "nvImageCodec failure: '#5'"))
    with pytest.warns(UserWarning, match=r"DALI could not decode a batch \(nvImageCodec failure: '#5'\), but Pillow"):
        found = next(iter(loader))
    assert found.indices == want.indices
    for ours, theirs in zip(found.views, want.views, strict=True):
        assert float((ours - theirs).abs().mean()) < 0.05  # the two decoders round differently


@needs_dali
def test_files_are_read_while_others_are_decoded(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = made(pictures / "classes", workers=1)
    third = threading.Event()
    plain, count = loader._images.read, itertools.count(1)

    def read(*arguments: Any) -> Any:
        if next(count) == 3 * 8:
            third.set()
        return plain(*arguments)

    monkeypatch.setattr(loader._images, "read", read)
    run = loader._decoder._pipeline.run
    waited: list[bool] = []

    def decoded(**inputs: Any) -> Any:
        waited.append(third.wait(timeout=60))
        return run(**inputs)

    monkeypatch.setattr(loader._decoder._pipeline, "run", decoded)
    assert len(next(iter(loader)).indices) == 8
    assert all(waited)  # the first batch was decoded after the third had been read


@needs_dali
def test_doctor_tries_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dali_trial(torch.device("cpu")) is None
    monkeypatch.setattr(dali, "pipeline", lambda *_, **__: Failing(of_dali("decoders.image", "no libnvjpeg")))
    assert dali_trial(torch.device("cpu")) == "it is installed, but cannot decode on cpu: no libnvjpeg"


def test_files_of_one_size_are_kept_as_one_array(tmp_path: Path) -> None:
    """The views equal those of an array in memory. A file lost since the scan is replaced by the next one."""
    rng = np.random.default_rng(0)
    for number, pixels in enumerate(rng.integers(0, 256, (24, 40, 48, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    source, _ = scan(settled(open_source(str(tmp_path))), workers=0)
    images = source.train
    assert isinstance(images, EncodedImages)
    assert of_one_size(images)
    arrays = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())])
    arrays[5] = arrays[6]
    (tmp_path / "05.png").write_bytes(b"lost")
    options: dict[str, Any] = {
        "image_size": 16, "device": torch.device("cpu"), "dtype": torch.float32, "batch_size": 8, "seed": 0, "rank": 0,
        "world_size": 1,
    }  # fmt: skip
    recipe = find("mocov3").augmentation(0.2)
    held = MemoryLoader(images, recipe, workers=2, **options)
    with pytest.warns(UserWarning, match=r"05\.png"):
        ours = list(held)
    theirs = list(MemoryLoader(ArrayImages(arrays, None), recipe, **options))
    for one, other in zip(ours, theirs, strict=True):
        assert one.indices == [6 if at == 5 else at for at in other.indices]
        assert all(torch.equal(*views) for views in zip(one.views, other.views, strict=True))
    assert len(held.broken) == 1
    Image.fromarray(arrays[0, :20]).save(tmp_path / "00.png")
    with pytest.raises(UsageError, match=r"00\.png has another size"), pytest.warns(UserWarning, match="listed"):
        MemoryLoader(images, recipe, workers=2, **options)
    assert not of_one_size(scan(settled(open_source(str(tmp_path))), workers=0)[0].train)  # type: ignore[arg-type]


def _full(*_: object) -> Any:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def _two(image: Any) -> tuple[Any, Any]:
    return image.resize((20, 20)), torch.ones(3, 8, 8)


@pytest.mark.parametrize("method", ["mocov2", _two])
def test_batches_come_through_pipes_if_the_shared_memory_is_full(
    method: Any, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers, whose /dev/shm has 64 MB unless asked otherwise; torch then waits forever."""
    want = [batch.views for batch in made(pictures, "torch", method=method, workers=0)]
    test = open_source(str(pictures)).test
    assert test is not None
    scored = list(eval_loader(test, image_size=16, batch_size=4, workers=0))
    monkeypatch.setattr(torch.Tensor, "share_memory_", _full)  # the loader processes are forked
    with pytest.warns(UserWarning, match="through pipes, which is slower, since the shared memory"):
        got = [batch.views for batch in made(pictures, "torch", method=method, workers=2)]
    for views, others in zip(got, want, strict=True):
        for view, other in zip(views, others, strict=True):
            assert torch.equal(view, other)
            assert view.stride() == other.stride()
    with pytest.warns(UserWarning, match="through pipes"):
        again = list(eval_loader(test, image_size=16, batch_size=4, workers=2))
    assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(again, scored, strict=True))


def test_a_shared_memory_without_space_for_locks_is_said(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = made(pictures, "torch", workers=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("multiprocessing.Lock", mock.Mock(side_effect=full))
    with pytest.raises(TrainingError, match=r"the shared memory \(/dev/shm\) .* is full; make it larger"):
        next(iter(ready))
    with pytest.raises(TrainingError, match=r"the shared memory \(/dev/shm\)"):
        made(pictures, "memory")
