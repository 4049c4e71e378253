"""Checks of the loader, several processes and an evaluation that need a GPU; parts of ``make gpu``.

    python -m benchmarks.gpu_checks crops --photos FOLDER

Each prints a table or raises an error. Figures are measured with many copies of the photographs in FOLDER.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks._timing import DEVICE, synchronise
from fastrm.data import Augmentation, Batch, View, dali, dali_loader, open_source
from fastrm.data.augmentation import IMAGENET_STD
from fastrm.data.dali_loader import DaliLoader
from fastrm.data.encoded import EncodedImages
from fastrm.data.settling import settled
from fastrm.machine import distributed
from fastrm.machine.device import available_cores
from fastrm.machine.signals import Signals
from fastrm.methods import build_method, find
from fastrm.models.named import named_backbone
from fastrm.optim import build_optimizer
from fastrm.optim.schedules import Rates
from fastrm.probes.features import Setting, shares
from fastrm.run.step import AUTOCAST, Step
from fastrm.settings.config import build

CROPPED = View(jitter_probability=0.0, grayscale_probability=0.0, blur_probability=0.0, solarize_probability=0.0)
"""A view with crop and flip only, which is the part that DALI does."""
CROPS = Augmentation(views=(CROPPED, CROPPED))
BATCH, SIZE = 256, 224
RATE, SHARE = 3000, 0.02
LIMIT = datetime.timedelta(seconds=120)


def loader_on(
    device: torch.device, photos: Path, augmentation: Augmentation, batch_size: int = BATCH, **options: Any
) -> DaliLoader:
    options = {"dtype": torch.float32, "workers": available_cores(), **options}
    images = settled(open_source(str(photos))).train
    assert isinstance(images, EncodedImages)
    return DaliLoader(
        images, augmentation, image_size=SIZE, device=device, batch_size=batch_size, seed=0, rank=0, world_size=1,
        **options,
    )  # fmt: skip


def first(loader: DaliLoader, count: int) -> list[Batch]:
    batches = iter(loader)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()  # type: ignore[attr-defined]


def crops(photos: Path) -> None:
    """Compare crops of DALI on the GPU and on the CPU; no image may be decoded again or by Pillow."""
    std = torch.tensor(IMAGENET_STD).view(-1, 1, 1)
    with warnings.catch_warnings(), mock.patch.object(dali_loader, "pipeline", wraps=dali.pipeline) as built:
        warnings.simplefilter("error", UserWarning)
        found = [first(loader_on(device, photos, CROPS, 64), 3) for device in (DEVICE, torch.device("cpu"))]
    assert built.call_count == 2, "a pipeline was built again, after an error"
    worst = 0.0
    for ours, theirs in zip(*found, strict=True):
        assert ours.indices == theirs.indices
        for one, other in zip(ours.views, theirs.views, strict=True):
            off = ((one.cpu() - other) * std * 255).abs()
            worst = max(worst, off.mean().item())
            print(f"| batch of 64 | mean {off.mean():.2f} of 255 | largest {off.max():.0f} |")
    assert worst < 3


def rates(photos: Path) -> None:
    """Images per second of the loader, by the share of the hardware decoder and by the decoded part."""
    best, recipe = 0.0, find("mocov3").augmentation(0.2)
    for regions, share in itertools.product((False, True), (0.5, 0.65, 0.9)):
        with mock.patch.object(dali, "HARDWARE", share):
            loader = loader_on(DEVICE, photos, recipe, regions=regions, dtype=torch.bfloat16)
        batches = forever(loader)
        for _ in range(4):
            next(batches)
        synchronise()
        begin = time.perf_counter()
        for _ in range(30):
            next(batches)
        synchronise()
        rate = 30 * BATCH / (time.perf_counter() - begin)
        best = max(best, rate)
        decoded = "boxes" if regions else "pictures"
        print(f"| {decoded} decoded | hardware {share:g} | {rate:,.0f} images/s |", flush=True)
        batches.close()  # type: ignore[attr-defined]
    assert best >= RATE, f"the best rate is {best:.0f} images per second; wanted {RATE}"


def forever(loader: DaliLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def copies(photos: Path) -> None:
    """Time of the host to copy crops out of DALI while the training stream is busy."""
    from nvidia.dali.plugin import pytorch

    batches = forever(loader_on(DEVICE, photos, CROPS))
    copy, times = pytorch.feed_ndarray, list[float]()

    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        copied = copy(*args, **options)
        times.append(1e3 * (time.perf_counter() - begin))
        return copied

    with mock.patch.object(pytorch, "feed_ndarray", timed):
        for _ in range(4):
            next(batches)
        synchronise()
        times.clear()
        busy = torch.cuda.Event()
        torch.cuda._sleep(3_000_000_000)  # cycles: more than a second
        busy.record()
        next(batches)  # another batch is decoded now
        while len(times) < 2 and not busy.query():
            time.sleep(0.01)
        still = not busy.query()
    print(f"| copies | {', '.join(f'{t:.2f}' for t in times)} ms | training stream busy meanwhile: {still} |")
    assert still, "the copies waited for the training stream"
    assert statistics.median(times) < 1


@contextmanager
def joined(backend: str) -> Iterator[None]:
    """A process group of the processes that torchrun started, or of this process."""
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    dist.init_process_group(backend, timeout=LIMIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ranks(_: Path) -> None:
    """Two processes on one GPU: compiled steps under DDP, their graphs, and the number of waits for the GPU."""
    counters = torch._dynamo.utils.counters
    with joined("gloo"):
        rank = distributed.world().rank
        for method in ("mocov3", "mocov2", "densecl"):
            counters.clear()
            torch._dynamo.reset()
            config = build(
                data="digits", arch="test_resnet", method=method, image_size=64, batch_size=64, queue_size=1024,
                hidden_dim=256, predictor_hidden_dim=256, output_dim=128,
            )  # fmt: skip
            torch.manual_seed(0)
            built = build_method(config, device=DEVICE, precision="bf16").train()
            built.pair.keep_low_precision(AUTOCAST["bf16"])
            for part in (built.student, built.teacher, built.predictor):
                part.compile()
            step = Step(
                built, build_optimizer(built, config.optim), precision="bf16", accumulate=1, clip_norm=None,
                layout=torch.channels_last,
            )  # fmt: skip
            views = torch.randn(2, 32, 3, 64, 64, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(rank))
            batch = Batch(tuple(view.contiguous(memory_format=torch.channels_last) for view in views), [])
            begin = time.perf_counter()
            for _ in range(2):
                step([batch], Rates(0.1, 1.0, 0.99), measure=False)
            waits = counted_waits(lambda step=step, batch=batch: step([batch], Rates(0.1, 1.0, 0.99), measure=False))
            weights = torch.cat([p.detach().flatten() for p in built.student.parameters()])
            assert weights.isfinite().all()
            own, _ = distributed.gather_rows(weights[None])
            assert torch.equal(own[0], own[1]), f"{method}: the processes have different weights"
            if rank == 0:
                graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
                took = time.perf_counter() - begin
                print(f"| {method} | graphs {graphs}, broken {breaks} | waits per step {waits} | {took:.0f} s |")
                for reason, count in counters["graph_break"].items():
                    print(f"  {count} x {reason[:200]}")


def counted_waits(step: Callable[[], object], steps: int = 2) -> str:
    """Number and places of the host's waits for the GPU in a step."""
    if DEVICE.type != "cuda":
        step()
        return "unknown"
    synchronise()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message))
    where = ", ".join(f"{place} {count / steps:g}" for place, count in places.most_common(6))
    return f"{sum(places.values()) / steps:g} ({where})" if where else "0"


def nccl(_: Path) -> None:
    """One process over NCCL: DDP, collectives, meetings and signals."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    with joined("nccl"):
        network = distributed.replicate(nn.Linear(8, 4).to(device), device)
        network(torch.randn(6, 8, device=DEVICE)).sum().backward()
        rows = torch.randn(4, 8, device=DEVICE)
        found = torch.empty_like(rows)
        distributed._all_gather(found, rows)
        assert torch.equal(found, rows)
        assert torch.equal(distributed._exchanged(rows, [4], [4]), rows)
        assert torch.equal(distributed.mean(rows), rows)
        distributed.gather_objects({"a": 1})
        with Signals() as heard:
            heard.asked()
        dist.barrier(device_ids=[0])
        synchronise()
    print(f"| NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} | one process | no error |")


def evaluation(photos: Path) -> None:
    """Speed of an evaluation of ResNet-50, and its share of a run of 100 epochs on ImageNet with 8 GPUs.

    Assumes ten evaluations with a bank of 100,000 images and 50,000 test images, and 1,500 trained images per second
    and GPU.
    """
    source = settled(open_source(str(photos)))
    network = named_backbone("resnet50", image_size=SIZE, stem="imagenet", channels=3).to(DEVICE)
    setting = Setting(SIZE, DEVICE, workers=available_cores())
    shares({"it": network}, source.train.subset(np.arange(512)), setting)
    synchronise()
    begin = time.perf_counter()
    shares({"it": network}, source.train, setting)
    synchronise()
    rate = len(source.train) / (time.perf_counter() - begin)
    run, scored = 100 * 1_281_167 / (8 * 1_500), 10 * 150_000 / (8 * rate)
    print(f"| {rate:,.0f} images/s | {scored / run:.1%} of the run | {available_cores()} cores per GPU |")
    assert scored / run <= SHARE


CHECKS: dict[str, Callable[[Path], None]] = {
    check.__name__: check for check in (crops, rates, copies, ranks, nccl, evaluation)
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__.split("\n")[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--photos", type=Path, default=Path(), help="folder with photographs in train/CLASS")
    options = parser.parse_args()
    CHECKS[options.check](options.photos)


if __name__ == "__main__":
    sys.exit(main())
