"""Memory: capacity, usage, and one-line errors when it does not suffice."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastrm.errors import Stopped, TrainingError, UsageError

if TYPE_CHECKING:
    import torch

SHARED_FULL = (
    "the shared memory (/dev/shm) that loader processes use is full; make it larger (docker run --shm-size), or give "
    "--workers 0"
)
_SHARED = re.compile(r"unable to (open|allocate|mmap|resize|write).*(shared|/torch_|bytes from file)", re.I | re.S)
_SHORT = re.compile(
    r"out of memory|(can't|cannot|not|failed to|unable to) allocate|not enough memory|STATUS_\w*ALLOC\w*"
    r"|\ballocation failed|cudaErrorMemoryAllocation|\bbad[_ ]alloc|\w*MemoryError\b",
    re.I,
)
_ON_DEVICE = re.compile(r"cuda|cudnn|cublas|cusolver|nccl|OutOfMemoryError", re.I)
_WANTED = re.compile(r"tried to allocate ([\d.]+) ?([KMGT]iB|bytes)|Unable to allocate ([\d.]+) ([KMGT]iB)", re.I)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def exhausted(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that memory is exhausted, in torch, CUDA, NumPy or Python."""
    for each in _chain(error):
        if isinstance(each, UsageError | TrainingError):
            return False
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError":
            return True
        if isinstance(each, OSError) and each.errno is not None:  # its text has a file name, which may be anything
            if each.errno == errno.ENOMEM:
                return True
        elif isinstance(each, RuntimeError | OSError) and (_SHORT.search(str(each)) or _SHARED.search(str(each))):
            return True
    return False


def shortage(error: BaseException, device: torch.device | None = None) -> str:
    """Describe which memory is exhausted, its size, and, if the error says so, the amount that was requested."""
    text = "\n".join(f"{type(each).__name__} {each}" for each in _chain(error))
    if _SHARED.search(text):
        return SHARED_FULL
    on_device = device is not None and device.type == "cuda" and _ON_DEVICE.search(text) is not None
    where = _named(device) if on_device and device else _host()
    found = _WANTED.search(text)
    wanted = "" if found is None else f" (for {_amount(found)} more)"
    return f"{where} has not enough memory{wanted}"


@contextmanager
def enough(device: torch.device, asked: Callable[[], str], lower: str) -> Iterator[None]:
    """Turn errors of exhausted memory into one line.

    Args:
        device: device whose memory may be exhausted.
        asked: returns a description of the request, with sizes.
        lower: what the user can do about it.

    Raises:
        TrainingError: memory is exhausted.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if not exhausted(error):
            raise
        raise TrainingError(f"{shortage(error, device)}: {asked()}. {lower}") from None


def size(count: float) -> str:
    """Format a number of bytes with a suitable unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def peak(device: torch.device) -> int | None:
    """Peak memory of this process in bytes, of the GPU if ``device`` is one, otherwise of the host."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(device)
    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def capacity(device: torch.device) -> int | None:
    """Memory in bytes of a GPU, or of the host or container of this process."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return _host_capacity()


def _host_capacity() -> int | None:
    found = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
            found.append(int(file.read()))
    return min(found, default=None)


def _host() -> str:
    there = _host_capacity()
    return "the host" if there is None else f"the host, with {size(there)},"


def _named(device: torch.device) -> str:
    import torch

    with contextlib.suppress(RuntimeError):  # after some errors CUDA answers nothing
        return f"{torch.cuda.get_device_name(device)}, with {size(capacity(device) or 0)},"
    return str(device)


def _amount(found: re.Match[str]) -> str:
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return size(float(number)) if unit == "bytes" else f"{float(number):g} {unit}"
