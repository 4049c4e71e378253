"""InfoNCE with gradient, residual term and push, compared with the usual form, and its growth.

pytest benchmarks/bench_contrastive.py --benchmark-only
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._timing import DEVICE, available, compare, extra_memory, gpu_us, repeated, table_with_memory
from fastrm.kernels import FeatureQueue, enqueue_, residual_info_nce

T = 0.2
GPU = DEVICE.type == "cuda"
# (queries, queue rows or None for in-batch keys, width)
CASES = [(256, 65_536, 128), (512, 4_096, 128), (4_096, None, 256), (16_384, None, 256)]
# Rows wider than one program of a GPU can hold.
CASES += [(256, 65_536, 1_024), (256, 65_536, 2_048), (4_096, None, 1_024)]
Call = Callable[[], Tensor]


class Inputs:
    """Queries and keys of one case, and a separate queue for each contender."""

    def __init__(self, n: int, size: int | None, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        # In-batch keys are multiplied in their own dtype, which is the one of mixed precision on a GPU.
        dtype = torch.bfloat16 if GPU and size is None else torch.float32
        draw = [torch.randn(n, dim, generator=generator).to(DEVICE, dtype) for _ in range(3)]
        self.query, self.key, self.same = draw[0].requires_grad_(), draw[1], draw[2]
        rows = None if size is None else F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.rows = None if rows is None else rows.to(DEVICE, torch.bfloat16 if GPU else torch.float32)

    def queue(self) -> FeatureQueue | None:
        if self.rows is None:
            return None
        queue = FeatureQueue(*self.rows.shape, dtype=self.rows.dtype).to(DEVICE)
        queue.features.copy_(self.rows)
        return queue

    def backward(self, loss: Tensor) -> Tensor:
        self.query.grad = None
        loss.backward()
        return loss.detach()


def ours(inputs: Inputs) -> Call:
    queue = inputs.queue()
    ring = (None, None) if queue is None else (queue.features, queue.pointer)
    return lambda: inputs.backward(residual_info_nce(inputs.query, inputs.key, inputs.same, *ring, temperature=T)[0])


def usual_loss(query: Tensor, key: Tensor, same: Tensor, features: Tensor | None) -> Tensor:
    """The einsum–cat–cross-entropy form of the official code bases, with the residual term."""
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    if features is None:
        logits, target = torch.einsum("nc,mc->nm", q, k), torch.arange(len(q), device=q.device)
    else:
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
        logits = torch.cat([positive, torch.einsum("nc,kc->nk", q, features.clone().to(q.dtype))], dim=1)
        target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    return F.cross_entropy(logits / T, target) + (2 - 2 * (q * F.normalize(same, dim=1)).sum(dim=1)).mean()


def usual(inputs: Inputs, *, compiled: bool = False) -> Call:
    queue = inputs.queue()
    loss = torch.compile(usual_loss) if compiled else usual_loss

    def call() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):  # as in a mixed-precision run
            value = loss(inputs.query, inputs.key, inputs.same, None if queue is None else queue.features)
        result = inputs.backward(value)
        if queue is not None:
            enqueue_(queue.features, queue.pointer, inputs.key, backend="reference")
        return result

    return call


def lightly(inputs: Inputs) -> Call:
    """NTXentLoss with its memory bank, and the residual term."""
    if inputs.rows is None:
        raise ImportError("lightly's in-batch form has other negatives")
    kind = importlib.import_module("lightly.loss").NTXentLoss
    loss = kind(temperature=T, memory_bank_size=tuple(inputs.rows.shape)).to(DEVICE)
    loss.memory_bank.bank.copy_(inputs.rows)

    def call() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            cosine = F.cosine_similarity(inputs.query, inputs.same, dim=1)
            value = loss(inputs.query, inputs.key) + (2 - 2 * cosine).mean()
        return inputs.backward(value)

    return call


def inf_cl(inputs: Inputs) -> Call:
    if inputs.rows is not None or not GPU:
        raise ImportError("inf_cl is for in-batch keys on a GPU")
    flash = importlib.import_module("inf_cl").cal_flash_loss
    scale = torch.tensor(1 / T, device=DEVICE)

    def call() -> Tensor:
        q, k = F.normalize(inputs.query, dim=1), F.normalize(inputs.key, dim=1)
        residual = (2 - 2 * (q * F.normalize(inputs.same, dim=1)).sum(dim=1)).mean()
        return inputs.backward(flash(q, k, None, scale).mean() + residual)

    return call


RIVALS: dict[str, Callable[[Inputs], Call]] = {
    "einsum, cat, cross-entropy": usual,
    "the same, torch.compile": lambda inputs: usual(inputs, compiled=True),
    "lightly NTXentLoss": lightly,
    "inf_cl": inf_cl,
}


def products(inputs: Inputs) -> Callable[[], object]:
    """Only the two matrix products that every form needs."""
    bank = inputs.key if inputs.rows is None else inputs.rows
    query = inputs.query.detach().to(bank.dtype)
    return lambda: torch.mm(torch.mm(query, bank.T), bank)


def matrix_rate() -> float:
    """TFLOP/s of a large matrix product in bf16."""
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    return 2 * 8192**3 / gpu_us(lambda: torch.mm(a, b)) / 1e6


@pytest.mark.parametrize(("n", "size", "dim"), CASES)
def test_loss(n: int, size: int | None, dim: int, enter: Any, note: Any) -> None:
    if not GPU and (n > 4_096 or dim > 512):
        pytest.skip("takes seconds per call on the CPU, where smaller cases show the same")
    inputs = Inputs(n, size, dim)
    mine = ours(inputs)
    want_loss, want = mine(), inputs.query.grad
    assert want is not None
    contenders: dict[str, Callable[[], object]] = {"fastrm residual_info_nce": mine}
    memory = {"fastrm residual_info_nce": extra_memory(mine)}
    for name, call, loss in available(RIVALS, inputs, note):
        # On a GPU, the rivals' logits are bf16 with values up to 1 / T = 5, and so have errors up to 5 * 2^-9 = 0.01.
        # The gradients have relative errors of 0.01 from this, and again as much from the rounding of the rows.
        close = {"rtol": 2e-2, "atol": 2e-2 * float(want.abs().max())} if GPU else {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(loss.float(), want_loss, rtol=1e-2 if GPU else 1e-5, atol=0)
        torch.testing.assert_close(inputs.query.grad, want, **close)
        contenders[name] = call
        memory[name] = extra_memory(call)
    contenders["the two products alone"] = products(inputs)
    case = f"contrastive loss, N {n}, {'in batch' if size is None else f'K {size}'}, D {dim}"
    rows = {row.name: row for row in compare(case, contenders, 0, rounds=9) if row.name in contenders}
    note(table_with_memory(case, rows.values(), memory))
    figures = {name: {**row.figures, "extra_mib": memory.get(name)} for name, row in rows.items()}
    enter(case, {name: row.seconds for name, row in rows.items()}, figures)
    if GPU:
        done = 4 * n * (size or n) * dim / rows["fastrm residual_info_nce"].gpu_us / 1e6
        note(f"in its products {done:.0f} TFLOP/s; a plain bf16 product of 8,192 cubed {matrix_rate():.0f}")
    if not GPU and (n, size) == CASES[0][:2]:
        assert memory["fastrm residual_info_nce"] < 0.15 * memory["einsum, cat, cross-entropy"]


def test_growth(enter: Any) -> None:
    """Time grows in proportion to the queue and to the queries; memory does not grow."""
    times, memory = {}, {}
    shapes = [(256, 2**p) for p in range(12, 21, 2 if not GPU else 1)] + [(256, 2**17)]
    shapes += [(n, 65_536) for n in (64, 1_024, 4_096, 16_384) if GPU or n <= 1_024]
    for n, size in shapes:
        call = ours(Inputs(n, size, 128))
        call()
        memory[n, size], times[n, size] = extra_memory(call), repeated(call)
    named = {f"N {n}, K {size}": key for key in times for n, size in [key]}
    figures = {name: {"extra_mib": memory[key]} for name, key in named.items()}
    enter("contrastive loss, growth", {name: times[key] for name, key in named.items()}, figures)
    assert memory[256, 2**20] <= memory[256, 2**16] + 4
