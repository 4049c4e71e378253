"""Shared fixtures and helpers: images on disk, small configurations that train in seconds, and a browser."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from fastrm import pretraining, train
from fastrm.data import named as named_sets
from fastrm.data import open_source
from fastrm.data.sources import ArrayImages
from fastrm.settings.config import Config, build
from tests.interpreted import INTERPRETED

FASHION_MNIST = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))

# The ordinary profile tries the same cases each time, and `make nightly` tries new ones. The interpreter of Triton gets
# fewer cases, because some take a second each.
CASES = 8 if INTERPRETED else 25
settings.register_profile("ordinary", max_examples=CASES, derandomize=True, database=None, deadline=None)
settings.register_profile("nightly", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def pytest_configure(config: pytest.Config) -> None:
    """Point all caches to a folder of this session, which its processes share. The user's caches are not touched."""
    if hasattr(config, "workerinput"):
        return  # a process of pytest-xdist, which inherits the environment
    folder = Path(tempfile.mkdtemp(prefix="fastrm-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update({name: str(folder / name.lower()) for name in CACHES})
    # without this, each process starts compile workers and waits for them
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _no_cuda_surprises(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 96 JPEGs of digits, 40x36 pixels, in three layouts: split (train and val), classes, flat."""
    root = tmp_path_factory.mktemp("pictures")
    train = open_source("digits").train
    assert train.labels is not None
    for i in range(96):
        image = train.picture(i).resize((40, 36), Image.Resampling.BICUBIC)
        label = f"digit{train.labels[i]}"
        part = "val" if i % 8 == 7 else "train"
        for path in (root / "split" / part / label, root / "classes" / label, root / "flat" / f"{i % 3}" / "deep"):
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f"{i}.jpg")
        image.save(root / "flat" / f"top{i}.jpg")
    return root


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium that Selenium controls."""
    webdriver = pytest.importorskip("selenium.webdriver")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in found.items() if path is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    yield driver
    driver.quit()


def run_of_one_step(arch: str, image_size: int, out: Path) -> Path:
    """Train the network ``arch`` for one step on digits, and return the run folder ``out``."""
    train.train(
        build(
            data="digits", arch=arch, image_size=image_size, batch_size=4, epochs=1, max_steps=1, workers=0,
            eval_every=0, hidden_dim=16, output_dim=8, predictor_hidden_dim=16, out=out,
        )
    )  # fmt: skip
    return out


def leave_few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the data set "digits" to 128 training and 32 test images."""
    every = named_sets._digits()
    assert isinstance(every.train, ArrayImages)
    assert isinstance(every.test, ArrayImages)
    train, test = every.train.subset(np.arange(128)), every.test.subset(np.arange(32))
    monkeypatch.setattr(named_sets, "_digits", lambda: dataclasses.replace(every, train=train, bank=train, test=test))


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fastrm.pretrain use small heads and no worker processes, so that short runs are quick."""
    pretrain, small = (
        pretraining.pretrain,
        {"hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 8, "workers": 0},
    )
    monkeypatch.setattr(pretraining, "pretrain", lambda data, **settings: pretrain(data, **{**settings, **small}))


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set "digits" has 128 training and 32 test images."""
    leave_few_digits(monkeypatch)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Config]:
    """A function that returns the settings of a run of three steps; its keywords override them."""

    def make(**leaves: Any) -> Config:
        quick = {
            "data": "digits", "arch": "test_resnet", "image_size": 32, "batch_size": 32, "epochs": 4, "workers": 0,
            "hidden_dim": 64, "output_dim": 32, "predictor_hidden_dim": 64, "queue_size": 96, "warmup_epochs": 0.0,
            "log_every": 1, "eval_every": 0, "max_steps": 3, "out": tmp_path / "run",
            "stem": "imagenet",  # a step takes a quarter of the time of one with the small stem
        }  # fmt: skip
        return build(**{**quick, **leaves})

    return make


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder of four IDX files like those of Fashion-MNIST: one is plain, three are compressed with gzip."""
    import gzip
    import struct

    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 12)):
        arrays = {
            f"{prefix}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            f"{prefix}-labels-idx1-ubyte": rng.integers(0, 10, count, dtype=np.uint8),
        }
        for name, array in arrays.items():
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            if name.startswith("t10k-labels"):
                (tmp_path / name).write_bytes(head + array.tobytes())
            else:
                with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
                    file.write(head + array.tobytes())
    return tmp_path


def natural_pictures(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 images [count, 3, height, width] with edges, gradients and saturated colours, as photographs have."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-0.3, 1.3, (count, 3, 6, 8)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    edges = torch.nn.functional.interpolate(torch.from_numpy(rng.normal(0, 0.2, (count, 1, 5, 7))), (height, width))
    return ((smooth + edges).clamp(0, 1) * 255).round().to(torch.uint8)
