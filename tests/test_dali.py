"""The DALI loader: parity with torchvision, odd and broken files, order and resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrm import train
from fastrm.config import Config
from fastrm.data import augmentation, make_loader, open_source
from fastrm.data.dali_loader import DaliLoader, dali_problem, encoded
from fastrm.data.draws import as_sizes, batch_generator, draw
from fastrm.data.sources import FileImages, decode
from fastrm.errors import UsageError
from tests.conftest import natural_pictures
from tests.test_batched import composed

needs_dali = pytest.mark.skipif(dali_problem() is not None, reason=f"needs DALI: {dali_problem()}")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound pictures of every kind that a folder may hold."""
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
    """20 sound pictures among which are a cut one, an empty one, a text, and a header alone."""
    sound = sorted((pictures / "flat").glob("*.jpg"))[:20]
    for path in sound:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = sound[0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:-60])  # within the picture, behind its header
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "header.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x08\x00\x00\x00\x08\x08\x02"
    )
    return tmp_path


def made(data: Path, kind: str = "dali", **options: object):
    defaults = {"method": "mocov2", "image_size": 24, "batch_size": 8, "device": "cpu", "workers": 2, "seed": 5}
    return make_loader(str(data), **{**defaults, "loader": kind, **options})


@needs_dali
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("method", ["mocov3", "byol"])
def test_views_of_odd_files_are_torchvisions(odd: Path, method: str, regions: bool) -> None:
    images = open_source(str(odd)).train
    assert isinstance(images, FileImages)
    recipe = augmentation(method, crop_min=0.2)
    count = len(images)
    loader = DaliLoader(
        images, recipe, image_size=48, batch_size=count, device=torch.device("cpu"), workers=2, seed=5,
        rank=0, world_size=1, regions=regions,
    )  # fmt: skip
    views = next(iter(loader))
    (batch,) = loader._sampler
    pictures = [images[index] for _, index in batch]
    sizes = as_sizes([(picture.height, picture.width) for picture in pictures])
    generator = batch_generator(5, 0, 0, 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    for view, out in zip(recipe.views, views, strict=True):
        draws = draw(view, *sizes, 48, generator)
        for i, picture in enumerate(pictures):
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            want = composed(image, draws, i, view.interpolation, 48, 2)
            error = float((out[i] * std + mean - want).abs().mean())
            # JPEG decoders differ by a step or two in the rounding of the inverse cosine transform and of the upsampled
            # chroma; solarizing makes a large difference of a small one at its threshold.
            assert error < (12 if draws.solarize[i] else 4) / 255, images.paths[batch[i][1]]


def test_a_file_is_passed_on_as_it_looks(odd: Path) -> None:
    for path in sorted(odd.iterdir()):
        assert encoded(path).size == decode(path).size[::-1], path.name


@needs_dali
def test_seek_and_resume_are_exact_and_workers_do_not_matter(pictures: Path) -> None:
    loader = made(pictures / "classes")
    every = [torch.stack(pair) for _ in range(2) for pair in loader]
    assert len(loader) == 12
    assert len(every) == 24
    assert not torch.equal(every[0], every[12])
    other = made(pictures / "classes", workers=1)
    for batch in (0, 5, 13):
        other.seek(batch)
        assert torch.equal(torch.stack(next(iter(other))), every[batch])
    assert every[0].shape == (2, 8, 3, 24, 24)
    assert not torch.equal(every[0][0], every[0][1])


@needs_dali
def test_ranks_share_an_epoch(pictures: Path) -> None:
    shares = [
        [index for batch in made(pictures / "classes", rank=rank, world_size=2)._sampler for _, index in batch]
        for rank in (0, 1)
    ]
    assert sorted(shares[0] + shares[1]) == list(range(96))


@pytest.mark.parametrize("kind", [pytest.param("dali", marks=needs_dali), "torch"])
def test_odd_files_train_for_two_epochs(odd: Path, kind: str) -> None:
    loader = made(odd, kind, workers=1)
    for _ in range(2):
        assert all(torch.isfinite(torch.stack(pair)).all() for pair in loader)


@pytest.mark.parametrize("kind", [pytest.param("dali", marks=needs_dali), "torch"])
def test_broken_files_are_named_and_left_out(broken: Path, kind: str) -> None:
    workers = 0 if kind == "torch" else 2  # a warning in a worker process is not seen here
    loader = made(broken, kind, workers=workers, batch_size=24)
    with pytest.warns(UserWarning, match="left out") as seen:
        (pair,) = loader
    assert torch.isfinite(torch.stack(pair)).all()
    for name in ("cut.jpg", "empty.jpg", "text.png", "header.png"):
        assert sum(name in str(warning.message) for warning in seen) == 1, name


@needs_dali
def test_memory_stays_flat(pictures: Path) -> None:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc to read the resident set")
    loader = made(pictures / "classes")
    resident = []
    for _ in range(20):
        assert len(list(loader)) == 12
        resident.append(int(status.read_text().split()[1]))
    assert resident[-1] < 1.05 * resident[4]


def test_what_a_loader_cannot_do_is_said(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--loader memory holds named sets only"):
        made(pictures / "flat", "memory")
    monkeypatch.setattr("fastrm.data.dali_problem", lambda: "DALI is not installed")
    with pytest.raises(UsageError, match="--loader dali cannot be used: DALI is not installed"):
        made(pictures / "flat")
    assert type(made(pictures / "flat", "auto")).__name__ == "TorchLoader"


@pytest.mark.parametrize("kind", [pytest.param("dali", marks=needs_dali), "torch"])
def test_broken_files_are_found_before_a_run(
    broken: Path, pictures: Path, kind: str, small: Callable[..., Config], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--data: 4 of 24 files are broken, more than a tenth; .*cut.jpg"):
        train.train(small(data=str(broken), loader=kind, batch_size=8))
    for i, path in enumerate(sorted((pictures / "flat").glob("*.jpg"))[:30]):
        (broken / f"more{i}.jpg").write_bytes(path.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is left to be found while reading
        summary = train.train(small(data=str(broken), loader=kind, batch_size=8))
    assert summary["images"] == 50
    lines = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert [Path(line.split("\t")[0]).name for line in lines] == ["cut.jpg", "empty.jpg", "header.png", "text.png"]
