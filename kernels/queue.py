"""The ring of past keys that MoCo-style losses score against."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from . import _push, reference
from .dispatch import (
    check_no_grad,
    check_not_recomputed,
    check_once,
    check_rows,
    check_strided,
    check_writable,
    choose,
    compute_dtype,
)


@torch.library.custom_op("fastrm::enqueue_", mutates_args=("queue", "pointer"))
def _enqueue(queue: Tensor, pointer: Tensor, keys: Tensor, skip: Tensor | None, backend: str) -> None:
    check_not_recomputed("enqueue_")
    _BACKENDS[backend](queue, pointer, keys, skip)


@_enqueue.register_fake
def _enqueue_fake(queue: Tensor, pointer: Tensor, keys: Tensor, skip: Tensor | None, backend: str) -> None:
    check_not_recomputed("enqueue_")


@torch.library.custom_op("fastrm::as_scored", mutates_args=())
def as_scored(queue: Tensor) -> Tensor:
    """A copy of the queue for the backward pass; an operator, because the compiler may delay an ordinary copy."""
    return queue.clone()


@as_scored.register_fake
def _as_scored_fake(queue: Tensor) -> Tensor:
    return torch.empty_like(queue)


def _on_cpu(queue: Tensor, pointer: Tensor, keys: Tensor, skip: Tensor | None) -> None:
    """Like the reference, in at most two slices; the host can read the pointer without waiting."""
    if skip is not None and skip.item() != 0:
        return
    size, start, count = queue.shape[0], int(pointer.item()), keys.shape[0]
    kept = keys[max(count - size, 0) :]  # of more keys than rows, only the last are kept
    new = reference.unit(kept.to(compute_dtype(queue, kept)))
    first = (start + count - kept.shape[0]) % size
    to_end = size - first
    queue[first : first + kept.shape[0]] = new[:to_end]
    queue[: max(kept.shape[0] - to_end, 0)] = new[to_end:]
    pointer.fill_((start + count) % size)


_BACKENDS = {"reference": reference.enqueue_, "cpu": _on_cpu, "triton": _push.enqueue_}
ENQUEUE = {backend: partial(_enqueue, backend=backend) for backend in _BACKENDS}


def check_ring(op: str, queue: Tensor, pointer: Tensor) -> None:
    """Raise unless (queue, pointer) is a ring that can be written."""
    if queue.shape[0] == 0:
        raise ValueError(f"{op}: queue has shape {tuple(queue.shape)}; it must hold at least one row")
    if queue.dtype.itemsize == 1:
        raise TypeError(
            f"{op}: queue is {queue.dtype}, which can be scored but not written; it must be wider than 8 bits"
        )
    check_writable(op, "queue", queue)
    check_strided(op, "pointer", pointer)
    if pointer.ndim != 0 or pointer.dtype != torch.int64 or pointer.device != queue.device:
        raise ValueError(
            f"{op}: pointer has shape {tuple(pointer.shape)}, dtype {pointer.dtype}, device {pointer.device}; "
            f"it must be a 0-d int64 tensor on {queue.device}"
        )


def enqueue_(
    queue: Tensor, pointer: Tensor, keys: Tensor, *, skip: Tensor | None = None, backend: str | None = None
) -> None:
    """Normalise ``keys`` and write them into the ring ``queue`` at ``pointer``, wrapping round its end.

    Args:
        queue: [K, D], floating, changed in place.
        pointer: 0-d int64 tensor, the row that is written next, changed in place.
        keys: [B, D], floating, any B; of more than K keys, the last K are kept. A zero row is stored as zeros.
        skip: a tensor of one element on the queue's device, such as the ``found_inf`` of a GradScaler. If it is not 0,
            nothing changes; the host does not wait for its value.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or the backend is not available.
        RuntimeError: called under activation checkpointing, in a backward pass, or under torch.func.
    """
    check_rows("enqueue_", "queue", queue)
    check_no_grad("enqueue_", "queue", queue)
    check_rows("enqueue_", "keys", keys, dim=queue.shape[1], device=queue.device)
    check_ring("enqueue_", queue, pointer)
    check_once("enqueue_")
    if skip is not None:
        check_strided("enqueue_", "skip", skip)
        if skip.numel() != 1 or skip.device != queue.device:
            raise ValueError(
                f"enqueue_: skip has shape {tuple(skip.shape)} on {skip.device}; "
                f"it must be one element on {queue.device}"
            )
    choose("enqueue_", backend, ENQUEUE, queue.device)(queue, pointer, keys, skip)


class FeatureQueue(nn.Module):
    """A ring of ``size`` unit feature rows that is saved with the model.

    Args:
        size: number of rows K, at least 1.
        dim: width D of a row, at least 1.
        dtype: storage dtype of the rows; scores are always computed in float32.

    Buffers (both persistent):
        features: [size, dim]; random unit rows at first, drawn from torch's global generator.
        pointer: 0-d int64, the row that is written next.
    """

    features: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"FeatureQueue: {name} is a {type(value).__name__}; it must be an int")
        if size < 1 or dim < 1:
            raise ValueError(f"FeatureQueue: size={size}, dim={dim}; both must be at least 1")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
            raise TypeError(f"FeatureQueue: dtype={dtype}; it must be a floating dtype of 16 bits or more")
        self.register_buffer("features", reference.unit(torch.randn(size, dim)).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def enqueue_(self, keys: Tensor, *, skip: Tensor | None = None, backend: str | None = None) -> None:
        """Put ``keys`` [B, dim] into the ring; see :func:`fastrm.kernels.enqueue_`."""
        enqueue_(self.features, self.pointer, keys, skip=skip, backend=backend)

    def extra_repr(self) -> str:
        """Size and dtype, for ``print(module)``."""
        return f"size={self.features.shape[0]}, dim={self.features.shape[1]}, dtype={self.features.dtype}"
