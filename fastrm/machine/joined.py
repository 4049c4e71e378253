"""The device and processes of a run, and the values of ``auto`` on them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    """The device, precision and processes that a run computes with."""

    device: torch.device
    world: World
    precision: str
    backend: str | None
    """Backend of fastrm.kernels; None chooses by device."""
    compiled: bool


@contextmanager
def joined(settings: DeviceConfig, *, optimizer: str) -> Iterator[Machine]:
    """Choose device and precision, join the other processes, and leave them at the end.

    At the end the state of this process is restored: torch's random state, the choice of cuDNN's algorithms, the modes
    that a script has set (see :func:`ordinary`), and the number of threads, since the processes of a machine share its
    cores.

    Raises:
        UsageError: the machine does not support the settings.
    """
    device = own_device(choose_device(settings.device))
    with ordinary(device), unchanged(device), processes(device) as world:
        if world.size > 1 and "OMP_NUM_THREADS" not in os.environ:  # otherwise each process takes all cores
            torch.set_num_threads(own_cores())
        with together():  # all processes report what one machine does not support
            backend = choose_kernels(settings.kernels, device)
            precision = agreed(everyone(choose_precision(settings.precision, device)))
            compiled = all(everyone(choose_compile(settings.compile, device)))
            if settings.cuda_graph:
                check_cuda_graph(settings.kernels, optimizer, device, precision, world.size)
        yield Machine(device, world, precision, backend, compiled)


def own_cores() -> int:
    """This process's share of the machine's cores, at least one."""
    return max(1, available_cores() // on_this_machine())


def agreed(choices: Sequence[str]) -> str:
    """The best precision that all processes support; a GPU with bf16 also supports fp16."""
    return next(precision for precision in ("fp32", "fp16", "bf16") if precision in choices)


@contextmanager
def ordinary(device: torch.device) -> Iterator[None]:
    """Undo what a script has set for all of torch: no gradients, another default dtype or device, autocast."""
    dtype = torch.get_default_dtype()
    with ExitStack() as entered:
        entered.enter_context(torch.inference_mode(False))
        entered.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                entered.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            entered.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        entered.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def unchanged(device: torch.device) -> Iterator[None]:
    """Restore the state of the process that a run changes."""
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.backends.cudnn.benchmark = True
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
