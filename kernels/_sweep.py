"""The one-sweep contrastive kernel: InfoNCE, its gradient, the residual term and the push in two or three launches.

For unit queries q, bank rows c and logits s = q·c/τ, a program accumulates tile by tile, as in flash attention, the
running maximum m, the sum Σ exp(s − m), and Σ exp(s − m) c. The keys carry no gradient, so the gradient needs no more
sums: with the positive p among the candidates, dL/dq = (average of the candidates by probability − p) / τ, followed by
the derivative of the normalisation. The kernels keep logits in units of log 2.

The bank is split among programs, so that few queries also fill a GPU. A last launch combines their results and pushes;
the sweep has read the whole queue by then. In-batch keys are normalised first, in a separate launch. All sums have a
fixed order, so the bits are the same each time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import _blocked, _tiles, _wide
from ._push import DTYPES, WIDEST, apart, block_d, block_r, enqueue_, launch_push, row_warps
from ._scoring import Scoring, numbers_of
from ._tiles import Tile
from .dispatch import INTERPRETED, compute_dtype, triton
from .multi_tensor import guard, host_value

if triton is not None:
    from ._finish import finish_kernel
    from ._sweep_kernel import sweep_kernel


def product_kind(dtype: torch.dtype) -> str:
    """How rows of ``dtype`` are multiplied. Float32 follows ``torch.set_float32_matmul_precision``.

    "highest" computes each product as three TF32 products, with an error of about 1e-6, like float32 itself.
    """
    if _wide.multiplied(dtype) != torch.float32:
        return "half"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Plan(NamedTuple):
    """The division of the work among programs."""

    block_n: int
    """Queries per program of the sweep."""
    block_k: int
    """Bank rows per tile."""
    warps: int
    stages: int
    query_blocks: int
    """Number of blocks of ``block_n`` queries."""
    bank_splits: int
    """Number of splits of the bank, each with one program per block of queries."""
    tiles_per_split: int


def finishing(dim: int, bank_splits: int) -> dict[str, int]:
    """Compile-time arguments of the last launch: rows per program, and the splits of the bank that it combines."""
    chunk = min(block_r(dim), triton.next_power_of_2(bank_splits))
    every = triton.next_power_of_2(bank_splits)
    return {"BLOCK_R": block_r(dim, chunk), "BLOCK_S": every, "CHUNK": chunk, "num_warps": row_warps(dim)}


@functools.lru_cache(maxsize=1024)
def plan(
    n: int, size: int, dim: int, kind: str, slots: int, major: int, two: bool = False, tile: Tile | None = None
) -> Plan | None:
    """Divide ``n`` queries and a bank of ``size`` rows among the programs that run at a time.

    Args:
        n, size, dim: rows of the queries and of the bank, and their width.
        kind: kind of product.
        slots: multiprocessors of the device.
        major: major version of the compute capability.
        two: whether other rows are averaged than those that are multiplied.
        tile: the tile; None means the usual one.

    Returns:
        The plan, or None if rows of ``dim`` are too wide for the registers.
    """
    usual = _tiles.usual(n, dim, kind, major, two)
    if usual is None:
        return None
    block_n, block_k, warps, stages = tile = tile or usual
    query_blocks, tiles = -(-n // block_n), -(-size // block_k)
    if tile == _tiles.WIDE_TILES.get(_tiles.width(dim)):
        slots *= 8 // warps  # those of four warps run two at a time

    def time(bank_splits: int) -> int:
        """Rounds of programs times the length of a program: its tiles, plus one for its start and end."""
        return -(-query_blocks * bank_splits // slots) * (-(-tiles // bank_splits) + 1)

    tiles_per_split = -(-tiles // min(range(1, max(2, min(tiles, max(slots // query_blocks, 4)) + 1)), key=time))
    bank_splits = -(-tiles // max(tiles_per_split, 1)) or 1
    return Plan(block_n, block_k, warps, stages, query_blocks, bank_splits, tiles_per_split)


def capacity(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the major version of the compute capability."""
    if INTERPRETED:
        return 4, 0  # more than one, so that the interpreter also splits banks
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def measured_tile(n: int, dim: int, kind: str, device: torch.device) -> Tile | None:
    """The tile that ``tune_losses`` found for such a case on this GPU; None if it was not asked."""
    tiles = _tiles.measured()
    return tiles.get(_tiles.key(gpu(device), n, dim, kind)) if tiles else None


def gpu(device: torch.device) -> str:
    """The name of the GPU."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


def readable(x: Tensor) -> Tensor:
    """``x`` in a dtype that the kernels can read."""
    return x if x.dtype in DTYPES else x.to(_wide.multiplied(x.dtype))


def launched(number: float | Tensor, name: str, device: torch.device) -> float | Tensor:
    """A host number as a float; a tensor on the device unchanged, so that the host does not wait for its value."""
    if isinstance(number, Tensor) and number.device == device:
        return number
    return host_value("the loss", name, number)


@torch.no_grad()
def swept_losses(scoring: Scoring, gradient: bool) -> tuple[Tensor, Tensor]:
    """The same as :func:`._blocked.blocked_losses`, which it calls for inputs that the kernels do not take."""
    query, key, same, queue, pointer, push = scoring[:6]
    key_offset, reduction = scoring.key_offset, scoring.reduction
    (n, dim), device = query.shape, query.device
    double = compute_dtype(query, key, same, queue, push) == torch.float64
    if double or n == 0 or (queue is not None and len(queue) == 0) or not 0 < dim <= WIDEST:
        return _blocked.blocked_losses(scoring, gradient)

    query = readable(query)
    key, same, push = (None if x is None else readable(x) for x in (key, same, push))
    bank = key if queue is None else queue
    size = 0 if bank is None else len(bank)
    # Other queues are converted part by part, and a separate launch pushes into them.
    direct = queue is None or (queue.dtype in DTYPES and queue.is_contiguous())
    kind = "half" if bank is None else product_kind(bank.dtype)
    slots, major = capacity(device)
    tile = measured_tile(n, dim, kind, device)
    work = plan(n, size, dim, kind, slots, major, False, tile) if direct and bank is not None else None
    wide = _wide.plan(n, size, dim, kind, slots, gradient, not direct) if work is None and bank is not None else None
    bank_splits = work.bank_splits if work is not None else wide.bank_splits if wide is not None else 1
    finish = finishing(dim, bank_splits)
    groups = triton.cdiv(n, finish["BLOCK_R"])

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    values = empty(n if reduction == "none" else 3)
    to_query = empty(n, dim) if gradient else empty(0)
    tickets = empty(2, dtype=torch.int64)
    temperature, residual_weight, contrastive_weight = (
        launched(number, "temperature, or a weight,", device) for number in numbers_of(scoring)
    )
    written = queue if pointer is not None else None
    query = apart(query, written)
    logsums = averages = None
    if bank is not None:
        logsums = empty(bank_splits, n)
        averages = empty(bank_splits, n, dim, dtype=_wide.multiplied(bank.dtype)) if gradient else None
    shared = {
        "query_ptr": query,
        "logsums_ptr": logsums,
        "averages_ptr": averages,
        "tickets_ptr": tickets,
        "temperature": temperature,
        "n": n,
        "size": size,
        "key_offset": key_offset,
        "D": dim,
        "BLOCK_D": block_d(dim),
        "GRADIENT": gradient,
    }
    pushed = 0 if pointer is None or push is None or not direct else len(push)
    with guard(device):
        if key is None or bank is None:
            tickets.zero_()  # otherwise the sweep does this
        elif queue is None:
            bank = torch.empty_like(key, memory_format=torch.contiguous_format)
            launch_push(bank, key, None, None)
        sent = pointer if pushed else None
        if bank is not None and work is not None:
            sweep_kernel[(work.query_blocks * work.bank_splits,)](
                **shared,
                bank_ptr=bank,
                values_ptr=None,
                shift_ptr=None,
                pointer_ptr=sent,
                tiles_per_split=work.tiles_per_split,
                BLOCK_N=work.block_n,
                BLOCK_K=work.block_k,
                IN_BATCH=queue is None,
                PRECISION="tf32" if kind == "half" else kind,
                UPCAST=INTERPRETED and bank.dtype == torch.bfloat16,
                num_warps=work.warps,
                num_stages=work.stages,
            )
        elif bank is not None and logsums is not None and wide is not None:
            offset = key_offset if queue is None else None
            _wide.sweep(query, bank, averages, logsums, tickets, sent, temperature, offset, kind, wide)
        finish_kernel[(groups + triton.cdiv(pushed, block_r(dim)),)](
            **shared,
            key_ptr=None if key is None else apart(key, written),
            same_ptr=None if same is None else apart(same, written),
            gradient_ptr=to_query if gradient else None,
            losses_ptr=values,
            sums_ptr=None if reduction == "none" else empty(2, groups),
            residual_weight=residual_weight,
            contrastive_weight=contrastive_weight,
            scale=1 / n if reduction == "mean" else 1.0,
            splits=bank_splits,
            queue_ptr=queue if pushed else None,
            pointer_ptr=pointer if pushed else None,
            push_ptr=apart(push, written) if push is not None and pushed else None,
            count=pushed,
            **finish,
            PUSH_R=block_r(dim),
        )
    if queue is not None and pointer is not None and push is not None and not pushed:
        enqueue_(queue, pointer, push)
    return values, to_query
