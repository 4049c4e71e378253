"""What several tests need: pictures on disk and a small configuration that trains in seconds."""

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

# The ordinary profile tries the same cases each time. `make nightly` takes the other one, which tries new ones.
# Triton's interpreter takes a second for some of them.
CASES = 8 if INTERPRETED else 25
settings.register_profile("ordinary", max_examples=CASES, derandomize=True, database=None, deadline=None)
settings.register_profile("nightly", max_examples=400, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def pytest_configure(config: pytest.Config) -> None:
    """Caches of this session alone, shared by its processes: what the user keeps is neither read nor written."""
    if hasattr(config, "workerinput"):
        return  # a process of pytest-xdist, which has the environment of the one that started it
    folder = Path(tempfile.mkdtemp(prefix="fastrm-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.update({name: str(folder / name.lower()) for name in CACHES})
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else each process starts others, and waits for them


@pytest.fixture(autouse=True)
def _no_cuda_surprises(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 JPEGs of real digits in three layouts: split (train and val), classes, flat."""
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
    """A headless Chromium, driven by Selenium."""
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
    """A run folder with a network of this kind."""
    train.train(
        build(
            data="digits", arch=arch, image_size=image_size, batch_size=4, epochs=1, max_steps=1, workers=0,
            eval_every=0, hidden_dim=16, output_dim=8, predictor_hidden_dim=16, out=out,
        )
    )  # fmt: skip
    return out


def leave_few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the set of digits one with a few of them."""
    every = named_sets._digits()
    assert isinstance(every.train, ArrayImages)
    assert isinstance(every.test, ArrayImages)
    train, test = every.train.subset(np.arange(128)), every.test.subset(np.arange(32))
    monkeypatch.setattr(named_sets, "_digits", lambda: dataclasses.replace(every, train=train, bank=train, test=test))


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes the most time of a short run is small in each call of fastrm.pretrain, and nothing runs beside it."""
    pretrain, small = (
        pretraining.pretrain,
        {"hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 8, "workers": 0},
    )
    monkeypatch.setattr(pretraining, "pretrain", lambda data, **settings: pretrain(data, **{**settings, **small}))


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set of digits, with a few of them."""
    leave_few_digits(monkeypatch)


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Config]:
    """Settings of a run of a few steps; keywords override."""

    def make(**leaves: Any) -> Config:
        quick = {
            "data": "digits", "arch": "test_resnet", "image_size": 32, "batch_size": 32, "epochs": 4, "workers": 0,
            "hidden_dim": 64, "output_dim": 32, "predictor_hidden_dim": 64, "queue_size": 96, "warmup_epochs": 0.0,
            "log_every": 1, "eval_every": 0, "max_steps": 3, "out": tmp_path / "run",
            "stem": "imagenet",  # its steps take a quarter of the time that those of the small one take
        }  # fmt: skip
        return build(**{**quick, **leaves})

    return make


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder of four IDX files like Fashion-MNIST's, one of them plain and the others gzip."""
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
    """uint8 [count, 3, height, width] with edges, gradients and saturated colours, as photographs have."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-0.3, 1.3, (count, 3, 6, 8)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    edges = torch.nn.functional.interpolate(torch.from_numpy(rng.normal(0, 0.2, (count, 1, 5, 7))), (height, width))
    return ((smooth + edges).clamp(0, 1) * 255).round().to(torch.uint8)
