"""Triton kernels that normalise rows and write them into a ring. All matrices are contiguous."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import tl, triton
from .multi_tensor import guard

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8192  # columns of a row that one program holds
TILE = 4096  # elements of a tile of rows in a program that reads and writes them

if triton is not None:

    @triton.jit
    def load_unit(x_ptr, rows, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """Unit rows in float32, and the inverse of their lengths; both are 0 for zero rows and for rows that are not
        live."""
        d = tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + rows[:, None].to(tl.int64) * D + d[None, :]
        x = tl.load(x_ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        squared = tl.sum(x * x, axis=1)
        inverse = tl.where(squared > 0, tl.rsqrt(squared), 0.0)
        return x * inverse[:, None], inverse

    @triton.jit
    def push_rows(
        index,  # of the keys that are written here
        queue_ptr,
        keys_ptr,
        start,  # row of the ring for key 0
        count,
        size,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Write unit keys into the ring; if there are more keys than rows, only the last ones."""
        live = (index < count) & (index >= count - size)
        unit, _ = load_unit(keys_ptr, index, live, D, BLOCK_D)
        d = tl.arange(0, BLOCK_D)
        queue_ptrs = queue_ptr + ((start + index) % size)[:, None] * D + d[None, :]
        tl.store(queue_ptrs, unit.to(queue_ptr.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])

    @triton.jit(do_not_specialize=["count"])
    def push_kernel(
        queue_ptr,
        keys_ptr,
        start_ptr,  # a copy of the pointer, because some programs read it after the pointer has advanced; None for 0
        pointer_ptr,
        skip_ptr,  # if not None and not 0, nothing is pushed
        count,
        size,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_R: tl.constexpr,
    ):
        program = tl.program_id(0)
        start = tl.full((), 0, tl.int64)
        if start_ptr is not None:
            start = tl.load(start_ptr)
        if skip_ptr is not None:
            count = tl.where(tl.load(skip_ptr) != 0, 0, count)
        push_rows(program * BLOCK_R + tl.arange(0, BLOCK_R), queue_ptr, keys_ptr, start, count, size, D, BLOCK_D)
        if pointer_ptr is not None:  # noqa: SIM102 (decided when compiling, and the next when running)
            if program == 0:
                tl.store(pointer_ptr, (start + count) % size)


def block_d(dim: int) -> int:
    """Columns of a tile for rows of ``dim``: a power of two, at least the minimum of a matrix product."""
    return max(16, 1 << (dim - 1).bit_length())


def block_r(dim: int, copies: int = 1) -> int:
    """Rows of a tile that has ``copies`` of them."""
    return max(1, TILE // (block_d(dim) * copies))


def row_warps(dim: int) -> int:
    """Warps of a program that holds such a tile."""
    return max(4, block_d(dim) // 1024)


def fits(*matrices: Tensor | None) -> bool:
    """Whether the kernels take these matrices: their dtypes, and a width from 1 to WIDEST."""
    return all(x is None or (x.dtype in DTYPES and 0 < x.shape[1] <= WIDEST) for x in matrices)


def apart(x: Tensor, queue: Tensor | None) -> Tensor:
    """``x`` as a contiguous tensor; a copy if a launch that writes ``queue`` would change it."""
    if queue is not None and x.untyped_storage().data_ptr() == queue.untyped_storage().data_ptr():
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def launch_push(
    queue: Tensor,
    keys: Tensor,
    start: Tensor | None,
    pointer: Tensor | None,
    skip: Tensor | None = None,
) -> None:
    """Write the unit ``keys`` into ``queue`` from row ``start``, and advance ``pointer``."""
    dim = queue.shape[1]
    with guard(queue.device):
        push_kernel[(triton.cdiv(len(keys), block_r(dim)),)](
            queue, apart(keys, queue), start, pointer, skip, len(keys), len(queue), dim, block_d(dim), block_r(dim),
            num_warps=row_warps(dim),
        )  # fmt: skip


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor, skip: Tensor | None = None) -> None:
    """Write the unit keys into the ring and advance the pointer, by a copy of the pointer and one launch."""
    if not (fits(queue, keys) and queue.is_contiguous()):
        reference.enqueue_(queue, pointer, keys, skip)
    elif len(keys):
        launch_push(queue, keys, pointer.clone(), pointer, skip)
