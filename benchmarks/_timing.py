"""Shared code of the benchmarks: tensors of real networks, timing in turn, and tables."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Inputs = TypeVar("Inputs")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COPY = "plain copy"
"""Name of the row for a copy of as many bytes, which is not a contender."""


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's 161 parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inside, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit_b_shapes() -> list[tuple[int, ...]]:
    """Shapes of ViT-B/16's 152 parameters."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *block * 12, (d,), (d,), (1000, d), (1000,)]


NETWORKS = {"ResNet-50": resnet50_shapes, "ViT-B": vit_b_shapes}


def tensors(network: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Random tensors of a network's shapes, on the device of the benchmarks."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in NETWORKS[network]()]


@dataclass(frozen=True)
class Row:
    """Median time of one contender, its bytes per second, and its ratios to the first contender and to a plain copy."""

    case: str
    name: str
    ms: float
    gigabytes_per_second: float
    share_of_copy: float
    times_the_first: float
    gpu_us: float
    """Microseconds of its kernels and copies on the GPU; NaN on the CPU."""
    seconds: tuple[float, ...]
    """Seconds per call in each round."""

    @property
    def figures(self) -> dict[str, float]:
        """Additional values for pytest-benchmark's JSON file."""
        names = ("gigabytes_per_second", "share_of_copy", "times_the_first", "gpu_us")
        return {name: getattr(self, name) for name in names if not math.isnan(getattr(self, name))}


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def once(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds per call, the mean of ``repeats`` calls in a row."""
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) * 1e3 / repeats


def repeated(call: Callable[[], object], rounds: int = 7) -> list[float]:
    """Seconds of a single contender in each round."""
    repeats = 10 if DEVICE.type == "cuda" else 1
    once(call, repeats)
    return [once(call, repeats) / 1e3 for _ in range(rounds)]


def gpu_us(call: Callable[[], object], repeats: int = 10) -> float:
    """Microseconds of a call's kernels and copies on the GPU, from the profiler, without gaps; NaN on the CPU."""
    if DEVICE.type != "cuda":
        return math.nan
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    work = (event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA)
    return sum(event.self_device_time_total for event in work) / repeats


def extra_memory(call: Callable[[], object]) -> float:
    """Peak memory of a call in MiB above the memory before it; NaN if it cannot be read."""
    call()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def compare(
    case: str, contenders: Mapping[str, Callable[[], object]], bytes_moved: float, *, rounds: int = 15, repeats: int = 0
) -> list[Row]:
    """Time the contenders in turn, one call each per round. Medians are over rounds, and ratios are taken within
    rounds.

    ``bytes_moved`` is the minimum for the operation, the same for all, so that GB/s can be compared. A plain copy of as
    many bytes is timed too.
    """
    repeats = repeats or (10 if DEVICE.type == "cuda" else 1)
    source = torch.empty(int(bytes_moved) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    everyone = {**contenders, COPY: lambda: target.copy_(source)}
    for call in everyone.values():
        once(call, repeats)
    times: dict[str, list[float]] = {name: [] for name in everyone}
    order = random.Random(0)
    for _ in range(rounds):
        # The order changes in each round, because a call after the copy, for example, has less of its input in the
        # cache.
        for name in order.sample(list(everyone), len(everyone)):
            times[name].append(once(everyone[name], repeats))
    first = next(iter(times.values()))
    return [
        Row(
            case=case,
            name=name,
            ms=statistics.median(these),
            gigabytes_per_second=bytes_moved / statistics.median(these) / 1e6,
            share_of_copy=statistics.median(c / t for c, t in zip(times[COPY], these, strict=True)),
            times_the_first=statistics.median(t / f for f, t in zip(first, these, strict=True)),
            gpu_us=gpu_us(everyone[name]),
            seconds=tuple(ms / 1e3 for ms in these),
        )
        for name, these in times.items()
    ]


def available(
    rivals: Mapping[str, Callable[[Inputs], Callable[[], Tensor]]], inputs: Inputs, note: Callable[[str], None]
) -> Iterator[tuple[str, Callable[[], Tensor], Tensor]]:
    """Yield name, call and loss of each rival whose package is installed; the others are noted."""
    for name, make in rivals.items():
        try:
            call = make(inputs)
            loss = call()
        except ImportError as error:
            note(f"{name} left out: {error}")
        else:
            yield name, call, loss


def table_with_memory(case: str, rows: Iterable[Row], memory: Mapping[str, float], title: str = "extra MiB") -> str:
    """The rows as Markdown, with memory instead of bytes per second; rows without a value show nan."""
    lines = [f"| {case} | ms | times the first | GPU µs | {title} |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {r.name} | {r.ms:.2f} | {r.times_the_first:.2f} | {r.gpu_us:.1f} | {memory.get(r.name, math.nan):.1f} |"
        for r in rows
    ]
    return "\n".join(lines)


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    rows = list(rows)
    lines = ["| case | what | ms | GB/s | share of a copy | times the first |", "|---|---|--:|--:|--:|--:|"]
    lines += [
        f"| {r.case} | {r.name} | {r.ms:.3f} | {r.gigabytes_per_second:.0f} | {r.share_of_copy:.2f} "
        f"| {r.times_the_first:.2f} |"
        for r in rows
    ]
    if DEVICE.type == "cuda":
        more = [" GPU µs |", "--:|", *(f" {row.gpu_us:.1f} |" for row in rows)]
        lines = [line + cell for line, cell in zip(lines, more, strict=True)]
    return "\n".join(lines)
