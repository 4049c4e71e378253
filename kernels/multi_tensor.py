"""Shared code of the multi-tensor kernels: tables of addresses on the device, and layouts that can be read as flat.

A table has a row of int64 per tensor: the addresses of its operands (such as teacher and student), and other values for
the kernel. A second table, the chunks, assigns elements of a tensor to each program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dispatch import tl, triton, triton_problem

BLOCK = 2048  # elements per program; twice as many would spill registers in some optimizers
WARPS = 8  # so 8 elements per thread: two 128-bit float32 loads, or one of half precision, for each operand
_AS_IT_IS = contextlib.nullcontext()
DTYPES: dict[torch.dtype | None, Any] = {None: None}  # None stands for an operand that is absent
if triton is not None:
    DTYPES |= {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    DTYPES |= {torch.float32: tl.float32, torch.float64: tl.float64}


def layout(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides of the dimensions if the elements fill memory without gaps or overlap, otherwise None.

    Two tensors of one shape with the same layout can be read as flat, element by element.
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
    """Gapless tensors in memory order: contiguous tensors unchanged, others as one dimension."""
    return [t if t is None or t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in tensors]


def launchable(*tensors: Tensor) -> bool:
    """Whether the kernels know the dtypes of ``tensors``, all on one device, and Triton runs there.

    Triton has no conversion between float64 and the half-precision dtypes that is right everywhere.
    """
    sizes = {t.itemsize for t in tensors}
    return triton_problem(tensors[0].device) is None and all(t.dtype in DTYPES for t in tensors) and not sizes >= {2, 8}


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current for a launch: Triton launches on the current one, wherever the tensors are."""
    if device.type != "cuda" or (torch.cuda.is_initialized() and torch.cuda.current_device() == device.index):
        return _AS_IT_IS  # faster than setting the same device again
    return torch.cuda.device(device)


def addresses(*columns: Sequence[Tensor] | None) -> list[list[int]]:
    """The address of every tensor, column by column; 0 for an absent column."""
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


def capturing() -> bool:
    """Whether launches are being recorded into a CUDA graph instead of run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def host_value(op: str, name: str, number: float | Tensor) -> float:
    """The value of a number, or of a tensor that is not on the launch device; it cannot change in a CUDA graph.

    Raises:
        ValueError: it is a tensor, during a capture; replays would keep its current value.
    """
    if isinstance(number, Tensor) and capturing():
        raise ValueError(
            f"{op}: {name} is a tensor on {number.device}, which the CUDA graph being captured cannot read when "
            "it is replayed; pass a tensor on the device of the others, or a number, which is then fixed"
        )
    return float(number)


class Mirror:
    """A small device tensor that mirrors host values; it is uploaded only when they change, without waiting.

    A CUDA graph keeps the tensors that it was captured with. A captured upload runs at each replay and not before, so
    it goes to a separate tensor of the graph. A tensor that a graph reads without an upload is not written again: the
    next values go to a new tensor.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.int64) -> None:
        self.device, self.dtype = device, dtype
        self.tensor = torch.empty(0, dtype=dtype, device=device)
        self._columns: list[Any] | None = None
        self._read_by_graph = False
        self._spare: Tensor | None = None
        self._of_graphs: list[Tensor] = []

    def update(self, columns: list[Any]) -> Tensor:
        """A device tensor [rows, columns] of ``columns``, which are lists of numbers, as long at every call."""
        if capturing():
            if columns != self._columns:
                return self._captured(self._host(columns))
            if not self._read_by_graph:
                self._read_by_graph = True
                self._of_graphs.append(self.tensor)
            return self.tensor
        if columns != self._columns:
            host = self._host(columns)
            if self._columns is None or self._read_by_graph:
                self.tensor = torch.empty_like(host, device=self.device)
                self._read_by_graph = False
            if self.device.type == "cuda":
                if self._spare is None:
                    self._spare = host.pin_memory()  # for a capture, during which pinning may fail
                host = host.pin_memory()
            self.tensor.copy_(host, non_blocking=True)
            self._columns = columns
        return self.tensor

    def _host(self, columns: list[Any]) -> Tensor:
        return torch.tensor(columns, dtype=self.dtype, device="cpu").T.contiguous()

    def _captured(self, host: Tensor) -> Tensor:
        """A separate tensor for the graph, which every replay fills from a persistent host tensor."""
        table = torch.empty_like(host, device=self.device)
        if self.device.type == "cuda":
            pinned = torch.empty_like(host, pin_memory=True) if self._spare is None else self._spare
            host, self._spare = pinned.copy_(host), None
        self._of_graphs += [host, table]
        return table.copy_(host, non_blocking=True)


if triton is not None:

    @triton.jit
    def locate(
        table_ptr,  # [tensors, COLUMNS] int64, of which OPERANDS are addresses
        chunks_ptr,  # [programs, 3] int64: tensor, first element, end
        OPERANDS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """The program's row of the table, first element and end, and whether all addresses are 16-byte aligned."""
        chunk_ptr = chunks_ptr + tl.program_id(0).to(tl.int64) * 3
        row_ptr = table_ptr + tl.load(chunk_ptr) * COLUMNS
        bits = tl.load(row_ptr)
        for column in tl.static_range(1, OPERANDS):
            bits |= tl.load(row_ptr + column)
        return row_ptr, tl.load(chunk_ptr + 1), tl.load(chunk_ptr + 2), bits % 16 == 0

    @triton.jit
    def operand(row_ptr, column, start, mask, DTYPE: tl.constexpr):
        """Pointer to element ``start`` of a row's operand, which is 16-byte aligned if there is no mask."""
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
