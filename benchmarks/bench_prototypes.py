"""DINO's loss over prototypes with its gradients, compared with the usual form on logits, and its growth.

pytest benchmarks/bench_prototypes.py --benchmark-only
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._timing import DEVICE, available, compare, extra_memory, repeated, table_with_memory
from fastrm.kernels import prototype_cross_entropy

OF_STUDENT, OF_TEACHER = 0.1, 0.04
GPU = DEVICE.type == "cuda"
# (rows of the student, views of the student or None to pair row i with row i, prototypes, width)
CASES = [(640, None, 65_536, 256), (640, 10, 65_536, 256)]
CASES += [(12_544, None, 65_536, 256), (10_240, 10, 65_536, 256)] if GPU else []
Call = Callable[[], Tensor]


class Inputs:
    """Rows of student and teacher, and the weights of their last layers."""

    def __init__(self, n: int, views: int | None, size: int, dim: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, width: int) -> Tensor:
            return torch.randn(rows, width, generator=generator).to(DEVICE)

        self.views, self.batch = views, n if views is None else n // views
        self.student = draw(n, dim).requires_grad_()
        self.teacher = draw(n if views is None else 2 * self.batch, dim)
        self.own = F.normalize(draw(size, dim), dim=1)
        self.its = F.normalize(self.own + 0.01 * draw(size, dim), dim=1)
        self.own.requires_grad_()
        self.center = 0.1 * torch.randn(size, generator=generator).to(DEVICE)
        self.pairs = None
        if views is not None:
            both = [(v, u) for u in range(2) for v in range(views) if u != v]
            rows = [(v * self.batch + i, u * self.batch + i) for v, u in both for i in range(self.batch)]
            self.pairs = torch.tensor(rows).to(DEVICE)

    def backward(self, loss: Tensor) -> Tensor:
        self.student.grad = self.own.grad = None
        loss.backward()
        return loss.detach()

    def logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            its = F.normalize(self.teacher, dim=1) @ self.its.T
        return F.normalize(self.student, dim=1) @ self.own.T, its


def ours(inputs: Inputs) -> Call:
    dtype = torch.bfloat16 if GPU else torch.float32  # the dtype of the products, as in a mixed-precision run

    def call() -> Tensor:
        loss, _ = prototype_cross_entropy(
            inputs.student, inputs.teacher, inputs.own.to(dtype), inputs.center, student_temperature=OF_STUDENT,
            teacher_temperature=OF_TEACHER, pairs=inputs.pairs, teacher_prototypes=inputs.its.to(dtype),
        )  # fmt: skip
        return inputs.backward(loss)

    return call


def usual_loss(student: Tensor, its: Tensor, center: Tensor, views: int | None) -> Tensor:
    """Softmax, log-softmax and their product, for each pair of views."""
    targets = F.softmax((its - center) / OF_TEACHER, dim=-1)
    if views is None:
        return -(targets * F.log_softmax(student / OF_STUDENT, dim=-1)).sum(dim=-1).mean()
    terms = [
        -(q * F.log_softmax(p / OF_STUDENT, dim=-1)).sum(dim=-1).mean()
        for u, q in enumerate(targets.chunk(2))
        for v, p in enumerate(student.chunk(views))
        if u != v
    ]
    return torch.stack(terms).mean()


def usual(inputs: Inputs) -> Call:
    def call() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            student, its = inputs.logits()
        loss = usual_loss(student.float(), its.float(), inputs.center, inputs.views)
        its.mean(dim=0)
        return inputs.backward(loss)

    return call


def lightly(inputs: Inputs) -> Call:
    views = inputs.views
    if views is None:
        raise ImportError("lightly's form takes views")
    loss = importlib.import_module("lightly.loss").DINOLoss(len(inputs.own), teacher_temp=OF_TEACHER).to(DEVICE)

    def call() -> Tensor:
        loss.center.data.copy_(inputs.center)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            student, its = inputs.logits()
        return inputs.backward(loss(list(its.float().chunk(2)), list(student.float().chunk(views))))

    return call


RIVALS: dict[str, Callable[[Inputs], Call]] = {"softmax on logits": usual, "lightly DINOLoss": lightly}


def gradients_mib(inputs: Inputs) -> float:
    """MiB of the gradients, which every contender returns."""
    return sum(x.numel() * x.itemsize for x in (inputs.student, inputs.own)) / 2**20


@pytest.mark.parametrize(("n", "views", "size", "dim"), CASES)
def test_loss(n: int, views: int | None, size: int, dim: int, enter: Any, note: Any) -> None:
    inputs = Inputs(n, views, size, dim)
    mine = ours(inputs)
    want_loss, want = mine(), (inputs.student.grad, inputs.own.grad)
    contenders: dict[str, Callable[[], object]] = {"fastrm prototype_cross_entropy": mine}
    for name, call, loss in available(RIVALS, inputs, note):
        # lightly sums the four million products of a pair of views in float32, which costs it three digits.
        torch.testing.assert_close(loss, want_loss, rtol=1e-2 if GPU else 5e-3, atol=0)
        for got, right in zip((inputs.student.grad, inputs.own.grad), want, strict=True):
            assert got is not None
            assert right is not None
            bound = (5e-2 if GPU else 1e-4) * float(right.abs().max())
            torch.testing.assert_close(got, right, rtol=0, atol=bound)
        contenders[name] = call
    memory = {name: extra_memory(call) - gradients_mib(inputs) for name, call in contenders.items()}
    case = f"loss over prototypes, N {n}, {'row with row' if views is None else f'{views} views'}, K {size}, D {dim}"
    rows = {row.name: row for row in compare(case, contenders, 0, rounds=5) if row.name in contenders}
    note(table_with_memory(case, rows.values(), memory, "MiB beside the gradients"))
    figures = {name: {**row.figures, "extra_mib": memory[name]} for name, row in rows.items()}
    enter(case, {name: row.seconds for name, row in rows.items()}, figures)
    if not GPU:
        assert memory["fastrm prototype_cross_entropy"] < 0.1 * memory["softmax on logits"]


def test_growth(enter: Any) -> None:
    """Time grows in proportion to the prototypes; memory grows only by their gradient."""
    times, memory = {}, {}
    for size in (2**14, 2**15, 2**16):
        inputs = Inputs(256, None, size, 64)
        call = ours(inputs)
        name = f"N 256, K {size}"
        times[name], memory[name] = repeated(call, 5), extra_memory(call) - gradients_mib(inputs)
    enter("loss over prototypes, growth", times, {name: {"extra_mib": mib} for name, mib in memory.items()})
    if not GPU:
        assert memory[f"N 256, K {2**16}"] <= memory[f"N 256, K {2**14}"] + 2
