"""What the multi-tensor kernels share: tables of addresses on the device, and the layouts that may be read as flat.

A table has a row of int64 for each tensor: the addresses of its operands (the teacher and the student, say), then what
else its kernel needs. A second table, the chunks, says for each program which tensor's elements are its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._dispatch import tl, triton, triton_problem

BLOCK = 2048  # elements that one program handles; twice as many would spill registers in some optimizers
WARPS = 8  # so 8 elements a thread: two 128-bit float32 loads, or one of half precision, for each operand
DTYPES: dict[torch.dtype | None, Any] = {None: None}  # None stands for an operand that is absent
if triton is not None:
    DTYPES |= {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    DTYPES |= {torch.float32: tl.float32, torch.float64: tl.float64}


def layout(tensor: Tensor) -> tuple[int, ...] | None:
    """Where each dimension steps in memory if the elements fill it without gaps or overlap, else None.

    Two tensors of one shape with the same layout may be read as flat, element for element.
    """
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return None
        expected *= size
    return tuple(s if n != 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def flat(*tensors: Tensor) -> bool:
    """Whether a kernel may read all ``tensors``, of one shape, as flat."""
    first = layout(tensors[0])
    return first is not None and all(layout(other) == first for other in tensors[1:])


def in_order(tensors: Iterable[Tensor | None]) -> list[Any]:
    """The memory of tensors without gaps as their elements lie there, in one dimension unless that is their order."""
    return [t if t is None or t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in tensors]


def launchable(*tensors: Tensor) -> bool:
    """Whether the kernels know the dtypes of ``tensors``, all on one device, and Triton runs there.

    Triton has no conversion between float64 and the half-precision dtypes that is right everywhere.
    """
    sizes = {t.itemsize for t in tensors}
    return triton_problem(tensors[0].device) is None and all(t.dtype in DTYPES for t in tensors) and not sizes >= {2, 8}


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current for a launch: Triton launches on the current one, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def addresses(*columns: Sequence[Tensor] | None) -> list[list[int]]:
    """The address of every tensor, column by column; 0 in the place of a column that is absent."""
    rows = next(len(column) for column in columns if column is not None)
    return [[0] * rows if column is None else [*map(Tensor.data_ptr, column)] for column in columns]


def cut(sizes: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Cut tensors into pieces of at most ``lengths`` elements: columns of tensor index, first element, end."""
    size, length = np.asarray(sizes, np.int64), np.asarray(lengths, np.int64)
    counts = -(-size // length)
    tensor = np.repeat(np.arange(len(size)), counts)
    piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = piece * length[tensor]
    return [tensor.tolist(), start.tolist(), np.minimum(start + length[tensor], size[tensor]).tolist()]


class Mirror:
    """A small device tensor that follows host values: uploaded only when they change, without waiting.

    It stays the same tensor, so that a CUDA graph that reads it goes on seeing the current values.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.int64) -> None:
        self.device, self.dtype = device, dtype
        self.tensor = torch.empty(0, dtype=dtype, device=device)
        self._columns: list[Any] | None = None
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def update(self, columns: list[Any]) -> Tensor:
        """The device tensor [rows, columns], holding ``columns`` (lists of numbers, as long at every call)."""
        if columns != self._columns:
            host = torch.tensor(columns, dtype=self.dtype).T.contiguous()
            if self._columns is None:
                self.tensor = torch.empty_like(host, device=self.device)
            self.tensor.copy_(self._pinned(host) if self.device.type == "cuda" else host, non_blocking=True)
            self._columns = columns
        return self.tensor

    def _pinned(self, host: Tensor) -> Tensor:
        if not torch.cuda.is_current_stream_capturing():
            if self._spare is None:
                self._spare = host.pin_memory()  # for a capture, during which there may be no pinned memory to be had
            return host.pin_memory()
        pinned = torch.empty_like(host, pin_memory=True) if self._spare is None else self._spare
        self._spare = None
        self._captured.append(pinned.copy_(host))  # every replay reads it again
        return pinned


if triton is not None:

    @triton.jit
    def locate(
        table_ptr,  # [tensors, COLUMNS] int64, of which OPERANDS are addresses
        chunks_ptr,  # [programs, 3] int64: tensor, first element, end
        OPERANDS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """This program's row of the table, its first element, its end, and whether all addresses are 16-byte ones."""
        chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 3
        row_ptr = table_ptr + tl.load(chunk_ptr) * COLUMNS
        bits = tl.load(row_ptr)
        for column in tl.static_range(1, OPERANDS):
            bits |= tl.load(row_ptr + column)
        return row_ptr, tl.load(chunk_ptr + 1), tl.load(chunk_ptr + 2), bits % 16 == 0

    @triton.jit
    def operand(row_ptr, column, start, mask, DTYPE: tl.constexpr):
        """Pointer to element ``start`` of a row's operand; without a mask it is known to be at a 16-byte address."""
        ptr = tl.load(row_ptr + column).to(tl.pointer_type(DTYPE)) + start
        return tl.multiple_of(ptr, 16) if mask is None else ptr

    @triton.jit
    def fetch(ptr, offsets, mask, COMPUTE: tl.constexpr):
        """Elements in the dtype of the computation, 0 where masked."""
        values = tl.load(ptr + offsets) if mask is None else tl.load(ptr + offsets, mask=mask, other=0)
        return values.to(COMPUTE)

    @triton.jit
    def average_(
        row_ptr,
        column,  # of the teacher; its shadow is next
        start,
        offsets,
        mask,
        student,  # values, in the dtype of the computation
        momentum,
        rest,  # 1 - momentum
        TEACHER: tl.constexpr,
        SHADOW: tl.constexpr,
    ):
        """Average ``student`` into the teacher (and its shadow)."""
        teacher_ptr = operand(row_ptr, column, start, mask, TEACHER)
        new = momentum * fetch(teacher_ptr, offsets, mask, student.dtype) + rest * student
        tl.store(teacher_ptr + offsets, new.to(TEACHER), mask=mask)
        if SHADOW is not None:
            shadow_ptr = operand(row_ptr, column + 1, start, mask, SHADOW)
            tl.store(shadow_ptr + offsets, new.to(SHADOW), mask=mask)
