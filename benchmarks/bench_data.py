"""Images per second and CPU time per image of the loaders, compared with torchvision's and lightly's transforms.

[PHOTOS=FOLDER] pytest benchmarks/bench_data.py --benchmark-only

The images are those of the folder, otherwise generated JPEGs of 500x375 pixels.
"""

from __future__ import annotations

import importlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from benchmarks._timing import DEVICE
from fastrm.data import Source, make_loader, open_source
from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation, View
from fastrm.data.dali import dali_problem
from fastrm.data.draws import blur_radius, draw_views
from fastrm.data.encoded import FileImages
from fastrm.data.torch_loader import TorchLoader
from fastrm.machine.device import available_cores
from fastrm.methods import find
from tests.test_batched import composed

BATCH, COUNT, ROUNDS = 32, 256, 5
WORKERS = min(available_cores(), 8)
OURS, LIGHTLY, FLOOR = "fastrm torch", "lightly MoCoV2Transform", "decoding and two crops alone"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> FileImages:
    """Photographs, or JPEGs with edges, gradients and noise, about 50 KB each."""
    folder = Path(os.environ["PHOTOS"]) if "PHOTOS" in os.environ else made_up(tmp_path_factory.mktemp("jpegs"))
    images = open_source(str(folder)).train
    assert isinstance(images, FileImages)
    return images


def made_up(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse).astype(np.int64) + rng.integers(-12, 13, (375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
    return folder


class Transformed(Dataset[Any]):
    """Two views per image by a rival's transform, on files read as by torchvision's ImageFolder."""

    def __init__(self, images: FileImages, transform: Callable[[Image.Image], Any]) -> None:
        self.paths, self.transform = [str(path) for path in images.paths], transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        return self.transform(default_loader(self.paths[index]))


def transformed(images: FileImages, transform: Callable[[Image.Image], Any], workers: int) -> Iterable[Any]:
    return DataLoader(
        Transformed(images, transform), batch_size=BATCH, shuffle=True, num_workers=workers,
        persistent_workers=workers > 0, drop_last=True,
    )  # fmt: skip


def twice(transform: Callable[[Image.Image], Tensor], image: Image.Image) -> tuple[Tensor, Tensor]:
    return transform(image), transform(image)


def torchvision_transform(size: int) -> Callable[[Image.Image], Any]:
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def ours(images: FileImages, kind: str, size: int, workers: int) -> Any:
    source = Source(name="jpegs", train=images, bank=None, test=None, about="")
    return make_loader(
        source, method="mocov2", image_size=size, batch_size=BATCH, device=DEVICE, workers=workers, seed=0, loader=kind
    )


def floor(images: FileImages, size: int, workers: int) -> Any:
    view = View(jitter_probability=0, grayscale_probability=0, blur_probability=0, flip_probability=0)
    return TorchLoader(
        images, Augmentation(views=(view, view)), image_size=size, batch_size=BATCH, device=DEVICE,
        dtype=torch.float32, workers=workers, seed=0, rank=0, world_size=1,
    )  # fmt: skip


def contenders(files: FileImages, size: int, workers: int) -> dict[str, Iterable[Any]]:
    loaders: dict[str, Iterable[Any]] = {OURS: ours(files, "torch", size, workers)}
    try:
        lightly = importlib.import_module("lightly.transforms").MoCoV2Transform(input_size=size)
        loaders[LIGHTLY] = transformed(files, lightly, workers)
    except ImportError as error:
        print(f"lightly cannot: {error}")
    loaders["torchvision v2"] = transformed(files, partial(twice, torchvision_transform(size)), workers)
    if dali_problem() is None and workers:  # DALI has its own threads
        loaders["fastrm dali"] = ours(files, "dali", size, workers)
    loaders[FLOOR] = floor(files, size, workers)
    return loaders


def check_views(files: FileImages, size: int) -> None:
    """Check that the first views equal torchvision v2's for the same parameters, within seven roundings to bytes."""
    augmentation = find("mocov2").augmentation(0.2)
    loader = ours(files, "torch", size, 0)
    request = next(iter(loader._sampler))
    batch = next(iter(loader))
    pictures = [files.pixels(index) for index in batch.indices]
    drawn = draw_views(
        augmentation.views, [(p.shape[1], p.shape[2]) for p in pictures], size, loader._sampler.generator(request)
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for view, draws, views in zip(augmentation.views, drawn, batch.views, strict=True):
        radius = blur_radius(view, size)
        wants = [composed(p, draws, i, view.interpolation, size, radius) for i, p in enumerate(pictures)]
        off = [float((a.cpu() * std + mean - b).abs().mean()) for a, b in zip(views, wants, strict=True)]
        assert statistics.median(off) < 1.5 / 255
        assert max(off) < 6 / 255


def rate(loader: Iterable[Any]) -> float:
    """Images per second in an epoch."""
    begin = time.perf_counter()
    count = sum(len(getattr(batch, "views", batch)[0]) for batch in loader)
    return count / (time.perf_counter() - begin)


def cpu_time(loader: Iterable[Any]) -> float:
    """Milliseconds of CPU time per image, measured over two batches."""
    begin = time.process_time()
    count = sum(len(getattr(batch, "views", batch)[0]) for batch in islice(loader, 2))
    return (time.process_time() - begin) / count * 1e3


def in_turn(loaders: dict[str, Iterable[Any]], measure: Callable[[Iterable[Any]], float]) -> dict[str, list[float]]:
    order = random.Random(0)
    figures: dict[str, list[float]] = {name: [] for name in loaders}
    for loader in loaders.values():
        measure(loader)
    for _ in range(ROUNDS):
        for name in order.sample(list(loaders), len(loaders)):
            figures[name].append(measure(loaders[name]))
    return figures


def ratio(figures: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(figures[above], figures[below], strict=True))


@pytest.mark.parametrize("size", [224, 32])
def test_views_per_second(files: FileImages, size: int, enter: Any, note: Any) -> None:
    check_views(files, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    costs = in_turn(contenders(files, size, 0), cpu_time)
    torch.set_num_threads(threads)
    rates = in_turn(contenders(files, size, WORKERS), rate)
    case = f"images at {size} pixels, {len(files)} JPEGs, MoCo-v2's views, batch {BATCH}, {WORKERS} workers, {DEVICE}"
    lines = [
        case,
        "| loader | images per second (from, to) | fastrm is faster by | CPU ms per image | fastrm takes less by |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, values in rates.items():
        row = f"{statistics.median(values):.0f} ({min(values):.0f}, {max(values):.0f}) | {ratio(rates, OURS, name):.2f}"
        cost = f"{statistics.median(costs[name]):.2f} | {ratio(costs, name, OURS):.2f}" if name in costs else "|"
        lines.append(f"| {name} | {row} | {cost} |")
    note("\n".join(lines))
    enter(f"{case}, time per image", {name: [1 / value for value in values] for name, values in rates.items()})


def test_memory_loader(enter: Any) -> None:
    """Digits at 32 pixels, two views of MoCo-v3 each: the whole set on the device against worker processes."""
    common: dict[str, Any] = {"method": "mocov3", "image_size": 32, "batch_size": 128, "device": DEVICE, "seed": 0}
    seconds = {
        kind: [1 / rate(loader) for _ in range(ROUNDS)]
        for kind in ("memory", "torch")
        for loader in [make_loader("digits", loader=kind, workers=WORKERS, **common)]
    }
    enter("digits at 32 pixels, time per image", seconds)
