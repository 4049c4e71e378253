"""What a run computes with: the device, the processes, and what ``auto`` stands for on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastrm.machine.device import check_cuda_graph, choose_compile, choose_device, choose_kernels, choose_precision
from fastrm.machine.distributed import World, own_device, processes
from fastrm.settings.config import DeviceConfig


class Machine(NamedTuple):
    """What a run computes with."""

    device: torch.device
    world: World
    precision: str
    backend: str | None
    """Of fastrm.kernels; None chooses by device."""
    compiled: bool


@contextmanager
def joined(settings: DeviceConfig, *, optimizer: str) -> Iterator[Machine]:
    """Choose what to compute with, join the other processes, and leave them at the end.

    What a run changes of the process is put back then: torch's random state and the choice of cuDNN's algorithms.

    Raises:
        UsageError: the machine does not allow what is asked for.
    """
    device = own_device(choose_device(settings.device))
    with unchanged(device), processes(device) as world:
        precision = choose_precision(settings.precision, device)
        backend = choose_kernels(settings.kernels, device)
        compiled = choose_compile(settings.compile, device)
        if settings.cuda_graph:
            check_cuda_graph(settings.kernels, optimizer, device, precision, world.size)
        yield Machine(device, world, precision, backend, compiled)


@contextmanager
def unchanged(device: torch.device) -> Iterator[None]:
    """Put back what a run changes of the process."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
