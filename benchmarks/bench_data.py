"""Images a second of the loaders on JPEGs of 500x375, against torchvision's and lightly's transforms in workers.

pytest benchmarks/bench_data.py --benchmark-only -s
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks._timing import DEVICE
from fastrm.data import Source, make_loader, open_source
from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastrm.data.dali_loader import dali_problem
from fastrm.data.encoded import FileImages
from fastrm.data.sources import Images
from fastrm.data.torch_loader import TorchLoader
from fastrm.machine.device import available_cores

SIZE, BATCH, COUNT = 224, 32, 512
WORKERS = min(available_cores(), 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileImages:
    """JPEGs with edges, gradients and noise, about 50 KB each."""
    folder = tmp_path_factory.mktemp("jpegs")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse).astype(np.int64) + rng.integers(-12, 13, (375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    images = open_source(str(folder)).train
    assert isinstance(images, FileImages)
    return images


class Transformed(Dataset[Any]):
    """How the rivals are used: a transform that gives two views, a picture at a time."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index])


def in_workers(images: Images, transform: Callable[[Image.Image], Any]) -> Iterable[Any]:
    return DataLoader(
        Transformed(images, transform), batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )


def twice(transform: Callable[[Image.Image], Tensor], image: Image.Image) -> tuple[Tensor, Tensor]:
    return transform(image), transform(image)


def torchvision_transform() -> Callable[[Image.Image], Any]:
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def ours(images: FileImages, kind: str) -> Iterable[Any]:
    source = Source(name="jpegs", train=images, bank=None, test=None, about="")
    return make_loader(
        source, method="mocov2", image_size=SIZE, batch_size=BATCH, device=DEVICE, workers=WORKERS, seed=0, loader=kind
    )


def contenders(files: FileImages) -> dict[str, Iterable[Any]]:
    loaders = {"fastrm torch": ours(files, "torch")}
    if not dali_problem():
        loaders["fastrm dali"] = ours(files, "dali")
    loaders["torchvision v2"] = in_workers(files, partial(twice, torchvision_transform()))
    try:
        lightly = importlib.import_module("lightly.transforms").MoCoV2Transform(input_size=SIZE)
        loaders["lightly MoCoV2Transform"] = in_workers(files, lightly)
    except ImportError as error:
        print(f"lightly cannot: {error}")
    return loaders


def floor(images: FileImages) -> Iterable[Any]:
    """Decoding and the two crops alone."""
    view = View(jitter_probability=0, grayscale_probability=0, blur_probability=0, flip_probability=0)
    return TorchLoader(
        images, Augmentation(views=(view, view)), image_size=SIZE, batch_size=BATCH, device=DEVICE,
        dtype=torch.float32, workers=WORKERS, seed=0, rank=0, world_size=1,
    )  # fmt: skip


def rate(loader: Iterable[Any]) -> float:
    """Images a second, from the second batch of an epoch on."""
    batches = iter(loader)
    next(batches)
    begin = time.perf_counter()
    count = sum(len(getattr(batch, "views", batch)[0]) for batch in batches)
    return count / (time.perf_counter() - begin)


def test_images_a_second(files: FileImages, benchmark: Any) -> None:
    loaders = contenders(files)
    if "fastrm dali" in loaders:  # the same draws: the same views, but for the rounding of decoding and resizing
        for mine, other in zip(
            *(next(iter(loaders[f"fastrm {kind}"])).views for kind in ("torch", "dali")), strict=True
        ):
            assert float((mine - other).abs().mean()) < 0.05
    loaders["floor: decode, two crops"] = floor(files)
    order = random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for loader in loaders.values():
        rate(loader)
    for _ in range(5):
        for name in order.sample(list(loaders), len(loaders)):
            rates[name].append(rate(loaders[name]))
    names = list(loaders)
    print(f"\n{SIZE} pixels, MoCo-v2's augmentation, batch {BATCH}, {WORKERS} workers, {DEVICE}")
    print("| loader | images a second | from, to | fastrm torch is faster by | share of the floor |")
    print("|---|--:|--:|--:|--:|")
    ratios = {}
    for name in names:
        pairs = list(zip(rates[names[0]], rates[name], strict=True))
        ratios[name] = statistics.median(mine / theirs for mine, theirs in pairs)
        share = statistics.median(a / b for a, b in zip(rates[name], rates[names[-1]], strict=True))
        spread = f"{min(rates[name]):.0f}, {max(rates[name]):.0f}"
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {spread} | {ratios[name]:.2f} | {share:.2f} |")
    benchmark.extra_info.update({name: statistics.median(values) for name, values in rates.items()})
    benchmark.pedantic(lambda: None, rounds=1)
    assert ratios.get("lightly MoCoV2Transform", 2) > 1.3
    assert ratios["torchvision v2"] > 1.3


def test_memory_loader(benchmark: Any) -> None:
    """Digits at 32 pixels, two views of MoCo-v3 each: the whole set on the device against worker processes."""
    common: dict[str, Any] = {"method": "mocov3", "image_size": 32, "batch_size": 128, "device": DEVICE, "seed": 0}
    rates = {
        kind: statistics.median(rate(loader) for _ in range(5))
        for kind in ("memory", "torch")
        for loader in [make_loader("digits", loader=kind, workers=WORKERS, **common)]
    }
    print("\ndigits at 32 pixels, images a second:", {kind: round(value) for kind, value in rates.items()})
    benchmark.extra_info.update(rates)
    benchmark.pedantic(lambda: None, rounds=1)
    assert rates["memory"] > rates["torch"]
