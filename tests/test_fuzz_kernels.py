"""Every public operation on random shapes, layouts, dtypes and aliases, against definitions in float64 NumPy.

A case ends with the right numbers and no other change, or with a ValueError or TypeError and no change at all. The
latter is allowed only if elements to be written share memory with others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrm.kernels import EMA, enqueue_, fused_ema_, info_nce, residual_info_nce, residual_loss
from tests import oracle
from tests.cuts import (
    APART,
    BF16,
    DIMS,
    F16,
    F32,
    F64,
    SHAPES,
    Cut,
    assert_only_written,
    attempt,
    close,
    computed,
    cut,
    cuts,
    numpy,
    stored,
)
from tests.interpreted import BACKENDS, device_of, run_triton_cases
from tests.test_optimizers import CASES, Definition


def test_triton_cases_in_the_interpreter() -> None:
    run_triton_cases(__file__)


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_random_averages_equal_the_definition(backend: str, data: st.DataObject) -> None:
    device, draw = device_of(backend), data.draw
    teacher, student, shadow = [], [], []
    for _ in range(draw(st.integers(0, 3), "pairs")):
        shape = draw(SHAPES)
        teacher.append(draw(cuts(shape, device)))
        student.append(draw(cuts(shape, device)))
        shadow.append(draw(cuts(shape, device, APART)))
    alias = draw(st.sampled_from(["none", "itself", "shifted", "tied", "crossed", "shadow"])) if teacher else "none"
    clash = False
    if alias == "itself":
        student[0] = teacher[0]
    elif alias == "shifted":  # teacher and student in one block, an element apart
        size = draw(st.integers(1, 100))
        block = torch.randn(size + 1, device=device)
        teacher[0], student[0] = (Cut(block[i : i + size], block, torch.arange(i, i + size)) for i in (0, 1))
        shadow[0] = cut((size,), BF16, "plain", 0, device)
        clash = size > 1
    elif alias == "tied":
        teacher, student, shadow = ([*column, column[0]] for column in (teacher, student, shadow))
    elif alias == "crossed" and len(teacher) > 1:  # the student of one pair is the teacher of the other
        student[1] = teacher[0]
        teacher[1] = cut(tuple(student[1].tensor.shape), F32, "plain", 5, device)
        shadow[1] = cut(tuple(student[1].tensor.shape), F32, "plain", 6, device)
        clash = student[1].tensor.numel() > 0
    with_shadow = alias == "shadow" or draw(st.booleans())
    if alias == "shadow":
        shadow[0] = student[0] if draw(st.booleans()) else teacher[0]
        clash = shadow[0] is student[0] and student[0].tensor.numel() > 0
    written = teacher + (shadow if with_shadow else [])
    if draw(st.booleans(), "requires grad"):
        student = [s._replace(tensor=s.tensor.detach().requires_grad_()) for s in student]
    momentum = draw(st.sampled_from([0.0, 0.5, 0.996, 1.0]) | st.floats(0, 1))
    value = torch.tensor(momentum, dtype=F64) if draw(st.booleans()) else momentum
    lists = [[c.tensor for c in column] for column in (teacher, student, shadow)]
    shadows = lists[2] if with_shadow else None

    def run() -> bool:
        if draw(st.booleans(), "prepared"):
            EMA(lists[0], lists[1], shadow=shadows, backend=backend).update_(value)
        else:
            fused_ema_(lists[0], lists[1], value, shadow=shadows, backend=backend)
        return True

    old, source = [numpy(t) for t in lists[0]], [numpy(s) for s in lists[1]]
    blocks = [c.block for c in (*teacher, *student, *shadow)]
    before = [block.clone() for block in blocks]
    refusable = clash or any(c.overlaps() for c in written)
    if attempt(run, blocks, refusable=refusable, names=("teacher", "student", "shadow")) is None:
        return
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        want = oracle.ema(old[i], source[i], momentum)
        # Two products and a sum, or a difference, a product and a sum: two roundings, each relative to the larger
        # operand.
        slack = 2 * computed(t.tensor.dtype, s.tensor.dtype) * (np.abs(old[i]) + np.abs(source[i])) + 1e-38
        for c in (t, shadow[i]) if with_shadow else (t,):
            close(c.tensor, want, slack + stored(c.tensor.dtype) * slack)
    assert_only_written(written, blocks, before)


@st.composite
def contrast(draw: st.DrawFn, device: torch.device, *, queued: bool | None = None) -> dict[str, Any]:
    """Arguments of info_nce: rows in any layout, some of them zero, and keys that may be rows of the bank."""
    n, d = draw(st.integers(0, 9)), draw(DIMS)
    with_queue = draw(st.booleans()) if queued is None else queued
    m = n if with_queue else n + draw(st.integers(0, 8))
    layouts = [*APART, "expanded", "windows"]
    query, key = draw(cuts((n, d), device, layouts)).tensor, draw(cuts((m, d), device, layouts)).tensor
    queue = draw(cuts((draw(st.integers(0, 40)), d), device, APART)).tensor if with_queue else None
    if queue is not None and len(queue) >= n and draw(st.booleans(), "keys in the bank"):
        key = queue[len(queue) - n :]
    if n and draw(st.booleans(), "a zero row"):
        query = query.clone()
        query[0] = 0
    offset = 0 if with_queue else draw(st.integers(0, m - n))
    return {"query": query, "key": key, "queue": queue, "key_offset": offset}


REDUCE: dict[str, Any] = {"none": lambda x: x, "sum": np.sum, "mean": lambda x: np.sum(x) / max(len(x), 1)}


def errors(
    case: dict[str, Any], temperature: float, dtypes: list[torch.dtype], backend: str
) -> tuple[float, oracle.Array]:
    """Tolerances of the loss per row and of its gradient, against float64.

    A logit is a sum of D products, at most as large as the length of the longest row divided by the temperature. Its
    error is D units of rounding of that size, and the exponentials and the logarithm add a few. The gradient is a sum
    of rows weighted by probabilities, divided by the temperature and by the length of the query. Triton multiplies with
    a bank of half precision in that precision, as tensor cores do.
    """
    query, queue = numpy(case["query"]), case["queue"]
    longest = max([1.0, *np.linalg.norm(numpy(queue), axis=1)] if queue is not None else [1.0])
    count = len(case["key"]) + (0 if queue is None else len(queue))
    bank = case["key"] if queue is None else queue
    spacing = max(computed(*dtypes), torch.finfo(bank.dtype).eps if backend == "triton" else 0)
    error = 2 * spacing * (query.shape[1] + np.log1p(count) + 8) * (1 + longest / temperature)
    lengths = np.linalg.norm(query, axis=1)
    return error, 4 * error * (longest / temperature + 1) / np.where(lengths > 0, lengths, 1)[:, None]


def check_gradient(query: Tensor, loss: Tensor, upstream: Tensor, want: oracle.Array, slack: oracle.Array) -> None:
    """Assert that the gradient is right, and that a second backward pass gives the same bits."""
    (gradient,) = torch.autograd.grad(loss, query, upstream, retain_graph=True)
    (again,) = torch.autograd.grad(loss, query, upstream)
    assert torch.equal(gradient, again)  # no saved tensor has changed
    assert gradient.dtype == query.dtype
    close(gradient, want, slack)


TEMPERATURES = st.sampled_from([0.05, 0.2, 1.0, 7.0])


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_random_info_nce_equals_the_definition(backend: str, data: st.DataObject) -> None:
    device, draw = device_of(backend), data.draw
    case, temperature = draw(contrast(device)), draw(TEMPERATURES)
    reduction, with_gradient = draw(st.sampled_from(sorted(REDUCE))), draw(st.booleans())
    query = case["query"] = case["query"].detach().requires_grad_(with_gradient)
    value = torch.tensor(temperature, dtype=F64) if draw(st.booleans()) else temperature
    before = {name: x.detach().clone() for name, x in case.items() if isinstance(x, Tensor)}
    loss = info_nce(**case, temperature=value, reduction=reduction, backend=backend)
    rows = [numpy(case[name]) if case[name] is not None else None for name in ("query", "key", "queue")]
    dtypes = [x.dtype for x in before.values()]
    error, steep = errors(case, temperature, dtypes, backend)
    n = len(query)
    reduced = REDUCE[reduction]
    close(
        loss, np.asarray(reduced(oracle.info_nce(*rows, temperature, case["key_offset"]))), reduced(np.full(n, error))
    )
    assert loss.dtype == (F64 if F64 in dtypes else F32)
    assert loss.requires_grad == with_gradient
    if with_gradient:
        upstream = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype, device=device)[: loss.numel()]
        scale = numpy(upstream).reshape(-1, 1) / (max(n, 1) if reduction == "mean" else 1)
        want = oracle.info_nce_gradient(*rows, temperature, case["key_offset"]) * scale
        check_gradient(query, loss, upstream.view(loss.shape), want, steep * scale)
    assert all(torch.equal(case[name], x) for name, x in before.items())


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_random_residual_losses_equal_the_definition(backend: str, data: st.DataObject) -> None:
    device, draw = device_of(backend), data.draw
    shape = draw(st.integers(0, 20)), draw(DIMS)
    student, teacher = draw(cuts(shape, device)).tensor, draw(cuts(shape, device)).tensor
    if draw(st.booleans(), "teacher is student"):
        teacher = student
    reduction = draw(st.sampled_from(sorted(REDUCE)))
    query = student.detach().requires_grad_()
    before = student.clone(), teacher.clone()
    loss = residual_loss(query, teacher, reduction=reduction, backend=backend)
    case = {"query": query, "key": teacher, "queue": None}
    error, steep = errors(case, 1.0, [student.dtype, teacher.dtype], backend)
    reduced = REDUCE[reduction]
    want = oracle.residual(numpy(student), numpy(teacher))
    close(loss, np.asarray(reduced(want)), reduced(np.full(len(want), error)))
    upstream = torch.ones_like(loss)
    pull = oracle.through_unit(numpy(student), -2 * oracle.unit(numpy(teacher)))
    scale = 1 / max(len(want), 1) if reduction == "mean" else 1
    check_gradient(query, loss, upstream, pull * scale, steep * scale)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_random_residual_info_nce_equals_the_definition(backend: str, data: st.DataObject) -> None:
    device, draw = device_of(backend), data.draw
    case, temperature = draw(contrast(device)), draw(TEMPERATURES)
    weights = draw(st.sampled_from([0.0, 0.3, 1.0, -2.0])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    queue: Tensor | None = case["queue"]
    query = case["query"] = case["query"].detach().requires_grad_()
    (n, d), key = query.shape, case["key"]
    same = draw(cuts((n, d), device)).tensor
    if queue is not None and len(queue) >= n and draw(st.booleans(), "same view in the bank"):
        same = queue[:n]
    extra: dict[str, Any] = {}
    if queue is not None and len(queue) and draw(st.booleans(), "push"):
        extra["pointer"] = torch.tensor(draw(st.integers(0, len(queue) - 1)), device=device)
        if draw(st.booleans()):
            extra["push"] = draw(cuts((draw(st.integers(0, 60)), d), device)).tensor
    rows = [numpy(query), numpy(key), None if queue is None else numpy(queue)]
    same_rows = numpy(same)
    dtypes = [x.dtype for x in (query, key, same, queue) if x is not None]
    error, steep = errors(case, temperature, dtypes, backend)
    ring = None
    if extra and queue is not None:
        ring = oracle.enqueue(rows[2], int(extra["pointer"]), numpy(extra.get("push", key)))
    loss, contrastive, residual = residual_info_nce(
        **case, same_view_key=same, **extra, temperature=temperature, residual_weight=weights[0],
        contrastive_weight=weights[1], backend=backend,
    )  # fmt: skip
    mean, offset = REDUCE["mean"], case["key_offset"]
    want = mean(oracle.info_nce(*rows, temperature, offset)), mean(oracle.residual(rows[0], same_rows))
    for got, value in ((contrastive, want[0]), (residual, want[1])):
        close(got, np.asarray(value), error)
        assert not got.requires_grad
    close(loss, np.asarray(weights[1] * want[0] + weights[0] * want[1]), 4 * error)
    pull = weights[1] * oracle.info_nce_gradient(*rows, temperature, offset)
    pull = pull + weights[0] * oracle.through_unit(rows[0], -2 * oracle.unit(same_rows))
    check_gradient(query, loss, torch.ones_like(loss), pull / max(n, 1), 4 * steep / max(n, 1))
    if ring is not None and queue is not None:
        close(queue, ring[0], 8 * computed(queue.dtype, extra.get("push", key).dtype))
        assert int(extra["pointer"]) == ring[1]
    elif queue is not None:
        assert np.array_equal(numpy(queue), rows[2])


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_random_pushes_equal_the_definition(backend: str, data: st.DataObject) -> None:
    device, draw = device_of(backend), data.draw
    size, count, d = draw(st.integers(0, 12)), draw(st.integers(0, 30)), draw(DIMS)
    queue = draw(cuts((size, d), device))
    keys = draw(cuts((count, d), device))
    if draw(st.booleans(), "keys in the queue"):
        keys = queue._replace(tensor=queue.tensor[draw(st.integers(0, size)) :])
    if draw(st.booleans(), "requires grad"):
        keys = keys._replace(tensor=keys.tensor.detach().requires_grad_())
    first = draw(st.integers(0, max(size - 1, 0)))
    pointer = torch.tensor(first, device=device)
    skip = draw(st.sampled_from([None, 0.0, 1.0]))
    flag = None if skip is None else torch.tensor([skip], device=device)
    before, source = queue.block.clone(), numpy(keys.tensor)
    old = numpy(queue.tensor)

    def run() -> bool:
        enqueue_(queue.tensor, pointer, keys.tensor, skip=flag, backend=backend)
        return True

    refusable = size == 0 or queue.overlaps()
    if attempt(run, [queue.block, keys.block, pointer], refusable=refusable, names=("queue",)) is None:
        return
    ring, at = (old, first) if skip else oracle.enqueue(old, first, source)
    close(queue.tensor, ring, 8 * computed(queue.tensor.dtype, keys.tensor.dtype))
    assert int(pointer) == at
    assert_only_written([queue], [queue.block], [before])


@pytest.mark.parametrize("rule", ["lars", "momentum", "adamw"])
@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_random_optimizer_steps_equal_the_definition(backend: str, rule: str, data: st.DataObject) -> None:
    device, draw = device_of(backend), data.draw
    kind, name, options, _ = CASES[rule]
    wide = draw(st.booleans())
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=3))
    layouts = st.sampled_from(APART)
    params, teacher, gradients = [], [], []
    for i, shape in enumerate(shapes):
        dtype = F64 if wide else F32
        params.append(cut(shape, dtype, draw(layouts), i, device))
        teacher.append(cut(shape, dtype if wide else draw(st.sampled_from([F32, BF16, F16])), draw(layouts), i, device))
        gradients.append([cut(shape, dtype, draw(st.sampled_from([*APART, "expanded"])), 9 * step + i, device).tensor
                          for step in range(2)])  # fmt: skip
    leaves = [nn.Parameter(p.tensor) for p in params]
    definition = Definition(name, leaves, [options] * len(leaves))
    definition.teacher = [numpy(t.tensor) for t in teacher]
    optimizer: Any = kind(leaves, **options, teacher=[t.tensor for t in teacher], ema_momentum=0.9, backend=backend)  # type: ignore[call-arg]
    before = [c.block.clone() for c in params + teacher]
    for step in range(2):
        for leaf, per_step in zip(leaves, gradients, strict=True):
            leaf.grad = per_step[step]
        sources = [numpy(per_step[step]) for per_step in gradients]
        optimizer.step()
        definition.step(sources, 0.9)
    for i, leaf in enumerate(leaves):
        # Each step has a few operations on numbers around 1 and the sums of LARS' norms. AdamW divides by a root that
        # may be near zero, but its update is at most the learning rate.
        slack = 64 * computed(leaf.dtype) * (1 + np.abs(definition.params[i]))
        close(leaf, definition.params[i], slack)
        close(teacher[i].tensor, definition.teacher[i], slack + 2 * stored(teacher[i].tensor.dtype) * 4)
    written = params + teacher
    assert_only_written(written, [c.block for c in written], before)
