"""The sweep over rows that are too wide for one program, as two matrix products per part of the bank.

A program of ``_sweep`` keeps its queries, and an average of the same width, in registers. For wider rows the bank is
processed in parts. One launch multiplies the queries by the rows of a part and stores exp(logit - top of its tile) in
the dtype of the products; a second launch multiplies these by the rows. Both are tiled in every dimension, and the
intermediate result stays in the cache of a GPU. The last launch is the same as in ``_sweep``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._push import launch_push
from .dispatch import INTERPRETED, triton
from .multi_tensor import guard

if triton is not None:
    from ._wide_kernels import average_kernel, score_kernel

ROWS = 2048  # queries per launch
ELEMENTS = 1 << 23  # weights between the two launches: 16 MiB in half precision


class Tiles(NamedTuple):
    """Tile sizes of the two products, by kind of product; see ``_sweep.product_kind``."""

    block_n: int
    """Queries."""
    block_k: int
    """Bank rows per tile of logits."""
    inner: int
    """Columns per step of the product for logits."""
    block_d: int
    """Columns per tile of averages."""
    step: int
    """Bank rows per step of the product for averages."""
    warps: int
    stages: int


# All fit the shared memory and the registers of any GPU from sm_80 on (benchmarks/kernel_report.py).
TILES = {
    "half": Tiles(128, 128, 64, 128, 64, 8, 3),
    "tf32": Tiles(64, 64, 32, 64, 32, 4, 3),
    "tf32x3": Tiles(64, 64, 32, 64, 32, 8, 2),
}
_SMALL = {"half": Tiles(64, 128, 64, 128, 64, 4, 3)}  # up to 64 queries

_HALVES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


def multiplied(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of ``dtype`` are multiplied; it holds all of their values."""
    if dtype in (torch.float16, torch.bfloat16):
        return dtype
    return torch.float16 if dtype in _HALVES else torch.float32


class Plan(NamedTuple):
    """The division of the work among launches, and of the second product among programs."""

    tiles: Tiles
    rows: int
    """Queries per launch."""
    columns: int
    """Bank rows per launch."""
    splits: int
    """Splits of the bank rows of a launch."""
    tiles_per_split: int
    bank_splits: int
    """Splits of all launches over the bank."""


def plan(n: int, size: int, dim: int, kind: str, slots: int, gradient: bool, converted: bool = False) -> Plan:
    """Divide ``n`` queries and a bank of ``size`` rows.

    Args:
        n, size, dim: rows of the queries and of the bank, and their width.
        kind: kind of product.
        slots: multiprocessors of the device.
        gradient: whether there is a second product.
        converted: whether a part of the bank also needs memory, for rows in another dtype.
    """
    tiles = _SMALL[kind] if kind in _SMALL and n <= 64 else TILES[kind]
    rows = min(n, ROWS)
    columns = ELEMENTS // max(rows, dim if converted else 1)
    columns = min(max(columns // tiles.block_k, 1), -(-size // tiles.block_k)) * tiles.block_k
    count = columns // tiles.block_k
    programs = -(-rows // tiles.block_n) * (-(-dim // tiles.block_d) if gradient else 1)
    tiles_per_split = -(-count // max(1, min(count, slots // programs)))
    splits = -(-count // tiles_per_split)
    rest = -(-(size % columns) // tiles.block_k)  # tiles of the last part
    return Plan(tiles, rows, columns, splits, tiles_per_split, size // columns * splits + -(-rest // tiles_per_split))


def sweep(
    query: Tensor,
    bank: Tensor,
    averages: Tensor | None,
    logsums: Tensor,
    tickets: Tensor,
    pointer: Tensor | None,
    temperature: float | Tensor,
    key_offset: int | None,
    kind: str,
    work: Plan,
) -> None:
    """Score ``query`` [N, D] against ``bank`` [K, D], of any floating dtype up to 32 bits; two launches per part.

    Args:
        query, bank: queries, which are normalised, and bank rows, which are used as they are.
        averages: [bank_splits, N, D] in the dtype of the products, written, or None if there is no gradient.
        logsums: [bank_splits, N], written.
        tickets: [2], written: 0, and the pointer.
        pointer: None if nothing will be pushed.
        temperature: a number, or a tensor on the device.
        key_offset: None with a queue.
        kind: kind of product.
        work: division of the work.
    """
    (n, dim), size, tiles = query.shape, len(bank), work.tiles
    dtype = multiplied(bank.dtype)
    unit = torch.empty(n, dim, dtype=dtype, device=query.device)
    launch_push(unit, query, None, None)
    weights = None if averages is None else torch.empty(work.rows, work.columns, dtype=dtype, device=query.device)
    tops, totals = torch.empty(2, work.columns // tiles.block_k, work.rows, device=query.device).unbind()
    shared: dict[str, object] = {"D": dim, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "num_warps": tiles.warps}
    shared |= {"PRECISION": "tf32" if kind == "half" else kind, "num_stages": tiles.stages}
    shared |= {"UPCAST": INTERPRETED and dtype == torch.bfloat16, "weights_ptr": weights, "width": work.columns}
    first = True
    for c in range(0, size, work.columns):
        part = bank[c : c + work.columns].to(dtype).contiguous()
        count = triton.cdiv(len(part), tiles.block_k)
        at = c // work.columns * work.splits
        splits = triton.cdiv(count, work.tiles_per_split)
        for r in range(0, n, work.rows):
            rows = min(work.rows, n - r)
            these = slice(at, at + splits), slice(r, r + rows)
            blocks = triton.cdiv(rows, tiles.block_n)
            with guard(query.device):
                score_kernel[(blocks * count,)](
                    unit[these[1]], part, tops_ptr=tops, totals_ptr=totals, tickets_ptr=tickets if first else None,
                    pointer_ptr=pointer if first else None, temperature=temperature, n=rows, columns=len(part),
                    shift=0 if key_offset is None else r + key_offset - c, BLOCK_D=tiles.inner,
                    IN_BATCH=key_offset is not None, **shared,
                )  # fmt: skip
                slices = 1 if averages is None else triton.cdiv(dim, tiles.block_d)
                average_kernel[(blocks * slices * splits,)](
                    bank_ptr=part, tops_ptr=tops, totals_ptr=totals,
                    averages_ptr=None if averages is None else averages[these], logsums_ptr=logsums[these], n=rows,
                    columns=len(part), tiles=count, tiles_per_split=work.tiles_per_split, every=n,
                    BLOCK_D=tiles.block_d, STEP=tiles.step, **shared,
                )  # fmt: skip
            first = False
