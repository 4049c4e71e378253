"""The processes that train together, and their exchanges. A single process has no process group."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastrm.errors import UsageError

E = TypeVar("E")
TIMEOUT = datetime.timedelta(minutes=30)
"""Time limit of collectives; for waits that may take longer, see fastrm.machine.meeting."""
_used = 0
"""How often a process group of the script was used; it is the same in all processes."""
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.14


class World(NamedTuple):
    """The rank of this process, and the number of processes."""

    rank: int = 0
    size: int = 1


@contextmanager
def processes(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, over NCCL on GPUs and gloo on CPUs, and leave them at the end.

    If the script has made a process group, all processes of that group are used, and the group stays as it is.

    Raises:
        UsageError: the environment is not that of torchrun, or the other processes cannot be reached.
    """
    if dist.is_initialized():
        _use_group(device)
        yield world()
        return
    size = _variable("WORLD_SIZE", "1", least=1)
    if size == 1:
        yield World()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set; start several with torchrun")
    _variable("LOCAL_RANK", "")
    _variable("MASTER_PORT", "", most=65535)
    _variable("RANK", "", most=size - 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the other processes cannot be reached over {backend}: {str(error).splitlines()[0]}"
        ) from None
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def _use_group(device: torch.device) -> None:
    """Check the process group of the script, and wait for its processes, as ``init_process_group`` does."""
    global _used
    size, backends = world().size, dict(each.split(":") for each in dist.get_backend_config().split(","))
    if size == 1:
        return
    found, wanted = backends.get(device.type), "nccl" if device.type == "cuda" else "gloo"
    if found is None or (found == "gloo" and wanted == "nccl"):
        raise UsageError(
            f"the process group of this script has {found or 'no backend'} for tensors on {device.type}, and a run "
            f"there needs {wanted}; init_process_group() without a backend makes a group for all devices"
        )
    _used += 1
    shared, arrived = store(), f"fastrm/used/{_used}"
    if shared.add(arrived, 1) == size:
        shared.set(f"{arrived}/all", "")
    try:
        shared.wait([f"{arrived}/all"], TIMEOUT)
    except RuntimeError:
        here = shared.add(arrived, -1) + 1
        _used -= 1
        raise UsageError(
            f"{here} of the {size} processes of this script's process group have started a run "
            f"within {TIMEOUT}; start it in all of them, or before init_process_group"
        ) from None


def store() -> Any:
    """The store of the process group, through which its processes exchange small values."""
    return dist.distributed_c10d._get_default_store()


def _variable(name: str, default: str, *, least: int = 0, most: int | None = None) -> int:
    """A number in the environment, set by torchrun."""
    value = os.environ.get(name, default)
    if value.isdecimal() and int(value) >= least and (most is None or int(value) <= most):
        return int(value)
    wanted = f"a number of {least} or more" if most is None else f"a number from {least} to {most}"
    raise UsageError(f"the environment has {name}={value!r}, which must be {wanted}; torchrun sets it, or leave it out")


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process; all processes of a machine share its CPU.

    Raises:
        UsageError: there are more processes than GPUs.
    """
    if device.type != "cuda":
        return device
    # Processes that a script has started itself choose their GPU by torch.cuda.set_device.
    index = _variable("LOCAL_RANK", str(torch.cuda.current_device()) if dist.is_initialized() else "0")
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"process {index} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "give torchrun at most as many --nproc-per-node"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def world() -> World:
    """The world of the processes that joined."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def started_alone() -> bool:
    """Whether only one process was started."""
    return _variable("WORLD_SIZE", "1", least=1) == 1


def started_first() -> bool:
    """Whether this is the first process that torchrun started, or the only one; it need not have joined."""
    return started_alone() or _variable("RANK", "0") == 0


def on_this_machine(size: int | None = None) -> int:
    """How many of ``size`` processes, or of those that joined, are on this machine; all, if torchrun does not say."""
    return _variable("LOCAL_WORLD_SIZE", str(world().size if size is None else size), least=1)


def replicate(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Average the gradients of ``module`` over all processes.

    Its buffers are not synchronised: queues are equal already, and only evaluation uses BatchNorm's statistics.
    """
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.14
    options: dict[str, Any] = {name: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None, **options)


def barrier() -> None:
    """Wait for all processes."""
    if world().size > 1:
        dist.barrier()


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, without gradient, and the index of this process's first row among them."""
    rank, size = world()
    if size == 1:
        return rows, 0
    plain, restored = _rows_first(rows)
    gathered = plain.new_empty(size * len(plain), *plain.shape[1:])
    _all_gather(gathered, plain)
    return restored(gathered), rank * len(rows)


def gather_objects(value: Any) -> list[Any]:
    """Plain values of all processes, in order of rank."""
    values: list[Any] = [value] * world().size
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def mean(values: Tensor) -> Tensor:
    """Mean over all processes, the same in each."""
    size = world().size
    if size > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= size
    return values


def shuffled(network: Callable[[Tensor], E], images: Tensor) -> E:
    """Encode images in batches that are mixed over all processes, and return the rows of this process.

    Shuffle-BN (He et al., arXiv 1911.05722): the keys' BatchNorm then sees other images than the queries', so
    its statistics do not reveal which key belongs to a query. Each process sends a random part of its batch to each
    process. The parts differ by at most one row, so that the host knows all sizes, and no process holds more than one
    batch. ``network`` returns a dataclass of tensors [B, …], without gradient.
    """
    rank, size = world()
    least, more = divmod(len(images), size)
    sent = [least + ((other - rank) % size < more) for other in range(size)]
    received = [least + ((rank - other) % size < more) for other in range(size)]
    order = torch.randperm(len(images), device=images.device)
    encoding: Any = network(_exchanged(images[order], sent, received))
    back = order.argsort()
    restored: dict[int, Tensor] = {}  # several fields may be the same tensor
    for field in dataclasses.fields(encoding):
        rows = getattr(encoding, field.name)
        if id(rows) not in restored:
            restored[id(rows)] = _exchanged(rows, received, sent)[back]
    changes = {field.name: restored[id(getattr(encoding, field.name))] for field in dataclasses.fields(encoding)}
    mine: E = dataclasses.replace(encoding, **changes)
    return mine


def _exchanged(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Exchange rows with all processes, in order of rank; ``sent`` and ``received`` are the numbers of rows."""
    plain, restored = _rows_first(rows)
    found = plain.new_empty(sum(received), *plain.shape[1:])
    dist.all_to_all_single(found, plain, received, sent)
    return restored(found)


def _rows_first(rows: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Contiguous rows without gradient, and a function that restores the memory format of ``rows``."""
    if rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        return rows.detach().permute(0, 2, 3, 1), lambda found: found.permute(0, 3, 1, 2)
    return rows.detach().contiguous(), lambda found: found
