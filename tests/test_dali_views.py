"""Evaluation with DALI: it gives the views of the worker processes, leaves out the same files, and is used on GPUs."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastrm import data
from fastrm.data import dali, dali_views, eval_loader, open_source
from fastrm.data.dali import dali_problem, decodes_on
from fastrm.data.encoded import EncodedImages
from fastrm.data.eval_loader import EvalLoader
from fastrm.data.formats import RGB
from fastrm.data.sources import ArrayImages
from fastrm.errors import UsageError
from fastrm.probes import Estimate, frozen_scores
from tests.conftest import natural_pictures
from tests.test_eval_loader import HERE, STD, Colour, gray, harm, opened, write
from tests.test_loaders import Failing, of_dali

pytestmark = pytest.mark.skipif(dali_problem() is not None, reason=f"needs DALI: {dali_problem()}")
CPU = torch.device("cpu")
SIZES = [(300, 400), (333, 250), (96, 96), (50, 41), (64, 1500), (1500, 64)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> EncodedImages:
    """PNG and JPEG files of several sizes in RGB, CMYK and gray, some with an EXIF rotation."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, size in enumerate(SIZES):
        picture = Image.fromarray(natural_pictures(1, *size)[0].permute(1, 2, 0).numpy())
        picture.save(folder / f"{number}.png")
        picture.convert("CMYK").save(folder / f"{number} cmyk.jpg")
        picture.convert("L").save(folder / f"{number} gray.jpg")
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(folder / f"{number} turned.jpg", exif=exif)
        for chroma in (0, 2):
            picture.save(folder / f"{number} chroma{chroma}.jpg", subsampling=chroma, quality=90)
    images = open_source(str(folder)).train
    assert isinstance(images, EncodedImages)
    return images


def seen(images: EncodedImages, image_size: int, where: torch.device | None) -> Tensor:
    """The views [N, 3, size, size] of all images in order, by DALI on a device or by worker processes (None)."""
    loader = EvalLoader(images, image_size=image_size, batch_size=20, workers=0, dali=where)
    batches = list(loader)
    assert [index for batch in batches for index in batch.indices] == list(range(len(images)))
    assert [len(batch.indices) for batch in batches] == [20, 16]
    return torch.cat([batch.views[0].cpu() for batch in batches])


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("image_size", [32, 80])
def test_views_equal_those_of_worker_processes(
    image_size: int, place: str, photographs: EncodedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views of DALI equal those of worker processes, within rounding.

    Worker processes round after each of two passes, DALI after the last. So an error is below one step of 1/255, and
    about 0 on average.
    """
    monkeypatch.setattr(dali_views, "_MOST", 7)  # a batch of 20 is decoded in parts of 7
    ours, theirs = (seen(photographs, image_size, where) for where in (torch.device(place), None))
    assert ours.shape == theirs.shape == (len(photographs), 3, image_size, image_size)
    errors = (ours - theirs) * STD[:, None, None] * 255
    limits = (0.3, 0.1) if place == "cpu" else (1.0, 0.5)  # a GPU rounds differently when it decodes a JPEG
    for index, error in enumerate(errors):
        assert float(error.abs().mean()) < limits[0], photographs.name(index)
        assert abs(float(error.mean())) < limits[1], photographs.name(index)


@pytest.fixture
def by_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations decode with DALI on the CPU, as they do on a GPU."""
    monkeypatch.setattr(data, "_decoded_there", lambda images, device: True)


def test_unreadable_files_are_left_out_and_the_others_keep_their_labels(tmp_path: Path, by_dali: None) -> None:
    """A missing, a truncated and a damaged file are left out, as by worker processes, and labels stay with their
    images.
    """
    for part in ("train", "val"):
        write(tmp_path / part, 40)
    source, bank, test = opened(tmp_path)
    for images in (bank, test):
        lost = harm(images)
        picture = io.BytesIO()
        Image.new("RGB", (200, 200), (7, 7, 7)).save(picture, "JPEG")
        images.paths[20].write_bytes(picture.getvalue()[:700])
        lost.append(20)
    want = [index for index in range(40) if index not in lost]
    loader = eval_loader(test, image_size=16, batch_size=8, workers=1)
    with pytest.warns(UserWarning, match="left out, since it cannot be read") as said:
        batches = list(loader)
    assert [index for batch in batches for index in batch.indices] == want
    found = torch.cat([Colour()(batch.views[0]) for batch in batches])[:, 0].round().int().tolist()
    assert found == [min(255, gray(int(test.paths[index].stem))) for index in want]
    assert {Path(name).name for name in loader.broken} == {test.paths[index].name for index in lost}
    assert sum("left out" in str(warning.message) for warning in said) == len(lost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the second pass does not warn again
        assert [index for batch in eval_loader(test, image_size=16, batch_size=8, workers=1) for index in batch.indices]
    with pytest.warns(UserWarning, match="left out"):
        scores = frozen_scores({"it": Colour()}, source, HERE, knn=True)["it"]
    assert scores["knn20"] == Estimate.of(np.arange(37) < round(37 * scores["knn20"].value))


def test_a_batch_of_missing_files_is_skipped_and_too_many_are_refused(tmp_path: Path, by_dali: None) -> None:
    for part in ("train", "val"):
        write(tmp_path / part, 20)
    _, _, test = opened(tmp_path)
    for index in (4, 5):
        test.paths[index].unlink()
    with pytest.warns(UserWarning, match=r"left out, since it cannot be read: .*No such file"):
        batches = list(eval_loader(test, image_size=16, batch_size=2, workers=0))
    assert len(batches) == 9
    test.paths[6].unlink()
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UsageError, match="3 of 20 files are broken"):
        list(eval_loader(test, image_size=16, batch_size=2, workers=0))


def test_a_batch_that_only_pillow_decodes_is_reported_and_other_errors_are_raised(photographs: EncodedImages) -> None:
    for error in (of_dali("decoders.image", "nvImageCodec failure: '#5'"), of_dali("resize", "CUDA allocation failed")):
        loader: Any = EvalLoader(photographs, image_size=32, batch_size=8, workers=0, dali=CPU)
        loader._loader._decoder._pipeline = Failing(error)
        if "'#5'" in str(error):
            with pytest.warns(UserWarning, match="DALI could not decode a batch .*, but Pillow could"):
                assert sum(len(batch.indices) for batch in loader) == len(photographs)
        else:
            with pytest.raises(RuntimeError) as raised:
                next(iter(loader))
            assert raised.value is error


def test_evaluation_uses_dali_where_training_does(photographs: EncodedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI is used for RGB files on a GPU, unless another loader is requested."""
    monkeypatch.setattr(data, "decodes_on", lambda device: True)
    gpu, options = torch.device("cuda:1"), {"image_size": 32, "batch_size": 8, "workers": 0}
    deep = photographs.formatted(replace(RGB, channels=1, mean=(0.5,), std=(0.5,)))
    arrays = ArrayImages(np.zeros((8, 8, 8, 3), dtype=np.uint8), None)

    def where(images: Any, device: torch.device = gpu, loader: str = "auto") -> torch.device | None:
        with mock.patch.object(data, "EvalLoader") as made:
            eval_loader(images, **options, device=device, loader=loader)
        found: torch.device | None = made.call_args.kwargs["dali"]
        return found

    assert [where(photographs), where(photographs, loader="dali")] == [gpu, gpu]
    others = [where(photographs, CPU), where(photographs, CPU, "dali"), where(deep), where(arrays)]
    others += [where(photographs, loader=loader) for loader in ("torch", "memory")]
    assert others == [None] * 6
    assert data._kind("auto", photographs, mock.Mock(spec=data.Augmentation), gpu) == "dali"
    monkeypatch.setattr(data, "decodes_on", lambda device: False)
    assert where(photographs) is None
    assert data._kind("auto", photographs, mock.Mock(spec=data.Augmentation), gpu) == "torch"


def test_a_dali_that_cannot_decode_is_not_used_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = decodes_on.__wrapped__
    assert fresh(CPU)
    monkeypatch.setattr(dali, "pipeline", lambda *_: Failing(of_dali("decoders.image", "no libnvjpeg")))
    with pytest.warns(UserWarning, match="DALI is not used: it is installed, but cannot decode on cpu: no libnvjpeg"):
        assert not fresh(CPU)
    monkeypatch.setattr(dali, "dali_problem", lambda: "DALI is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fresh(CPU)
