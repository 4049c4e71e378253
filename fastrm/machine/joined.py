"""What a run computes with: the device, the processes, and what ``auto`` stands for on them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastrm.machine.device import (
    available_cores,
    check_cuda_graph,
    choose_compile,
    choose_device,
    choose_kernels,
    choose_precision,
)
from fastrm.machine.distributed import World, on_this_machine, own_device, processes
from fastrm.machine.meeting import everyone, together
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

    What a run changes of the process is put back then: torch's random state, the choice of cuDNN's algorithms, and the
    number of threads, since the processes of a machine share its cores.

    Raises:
        UsageError: the machine does not allow what is asked for.
    """
    device = own_device(choose_device(settings.device))
    with unchanged(device), processes(device) as world:
        if world.size > 1 and "OMP_NUM_THREADS" not in os.environ:  # else each process takes all cores
            torch.set_num_threads(own_cores())
        with together():  # what one machine does not allow is said by all
            backend = choose_kernels(settings.kernels, device)
            precision = agreed(everyone(choose_precision(settings.precision, device)))
            compiled = all(everyone(choose_compile(settings.compile, device)))
            if settings.cuda_graph:
                check_cuda_graph(settings.kernels, optimizer, device, precision, world.size)
        yield Machine(device, world, precision, backend, compiled)


def own_cores() -> int:
    """This process's share of the cores, of which the processes of a machine have as many each; at least one."""
    return max(1, available_cores() // on_this_machine())


def agreed(choices: Sequence[str]) -> str:
    """The precision that all have, of the best one of each: a GPU with bf16 has fp16 too."""
    return next(precision for precision in ("fp32", "fp16", "bf16") if precision in choices)


@contextmanager
def unchanged(device: torch.device) -> Iterator[None]:
    """Put back what a run changes of the process."""
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.backends.cudnn.benchmark = True
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
