"""The contrastive losses of each backend against float64 definitions; their memory, launches and errors."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fastrm.kernels import (
    FeatureQueue,
    _blocked,
    _fused,
    _sweep,
    _wide,
    enqueue_,
    info_nce,
    residual_info_nce,
    residual_loss,
)
from fastrm.kernels._scoring import Scoring
from fastrm.kernels.dispatch import triton
from tests import oracle
from tests.interpreted import (
    BACKENDS,
    INTERPRETED,
    SLOW_TRITON,
    TRITON,
    Launches,
    device_of,
    often_and_slow,
    run_triton_cases,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FUSED = ["cpu", TRITON]

Array = NDArray[np.float64]


LARGE = [pytest.mark.slow] if INTERPRETED else []  # smaller cases cover the same kernels


class Case(NamedTuple):
    n: int
    size: int
    dim: int
    temperature: float = 0.2
    queued: bool = True
    offset: int = 0
    dtype: torch.dtype = F32

    @property
    def name(self) -> str:
        form = "queue" if self.queued else f"from{self.offset}"
        return f"{self.n}x{self.size}x{self.dim}-{form}-t{self.temperature}-{str(self.dtype)[6:]}"

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries [n, dim] of several lengths, keys [n or size, dim] and a queue of unit rows [size, dim]."""
        query = rows(1, self.n, self.dim) * torch.linspace(0.5, 3, self.n, dtype=F64)[:, None]
        key = rows(2, self.n if self.queued else self.size, self.dim)
        queue = torch.from_numpy(oracle.unit(rows(3, self.size, self.dim))) if self.queued else None
        return tuple(None if x is None else x.to(device, self.dtype) for x in (query, key, queue))  # type: ignore


CASES = [
    Case(1, 1, 3),
    Case(5, 7, 16, 1.0),
    Case(7, 33, 20, 0.07),
    Case(64, 1000, 24),
    Case(33, 257, 64, 0.01),
    Case(64, 999, 128, 0.2, dtype=BF16),
    Case(31, 513, 128, 0.1, dtype=F16),
    Case(3, 130, 129, dtype=F16),
    Case(8, 77, 256, 0.1),
    Case(4, 65, 512, dtype=BF16),
    Case(2, 40, 512),
    Case(2, 50, 515),
    Case(3, 300, 1024, 0.1, dtype=BF16),
    Case(2, 40, 2048, 0.5),
    Case(5, 140, 600, queued=False, offset=77, dtype=F16),
    Case(70, 300, 96, dtype=F64),
    Case(1, 1, 3, queued=False),
    Case(2, 3, 1, 0.5, queued=False, offset=1),
    Case(1, 6, 20, 0.01, queued=False, offset=2),
    Case(17, 129, 96, queued=False, offset=5),
    Case(64, 64, 128, 0.1, queued=False, dtype=BF16),
    Case(130, 333, 64, 0.07, queued=False, offset=77),
    pytest.param(Case(300, 2500, 16, queued=False, offset=1777), marks=LARGE),
    pytest.param(Case(40, 999, 129, queued=False, offset=959, dtype=F16), marks=LARGE),
]


def rows(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Normally distributed numbers of the given shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def numpy(x: Tensor) -> Array:
    return x.detach().cpu().double().numpy().copy()


def unit(x: Array) -> Array:
    """Rows [N, D] divided by their lengths; zero rows stay zero."""
    length = np.sqrt((x * x).sum(axis=1, keepdims=True))
    return np.divide(x, length, out=np.zeros_like(x), where=length != 0)


def definition(query: Array, key: Array, queue: Array | None, temperature: float, offset: int = 0) -> Array:
    """InfoNCE loss per row [N], vectorised; test_the_definition_equals_the_oracle compares it with the oracle."""
    q, k = unit(query), unit(key)
    positives = (q * k[offset : offset + len(q)]).sum(axis=1, keepdims=True) / temperature
    logits = q @ k.T / temperature if queue is None else np.hstack([positives, q @ queue.T / temperature])
    top = logits.max(axis=1, keepdims=True)
    return (top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) - positives)[:, 0]


def slopes(loss: Callable[[Array], Array], at: Array, columns: list[int], step: float = 1e-6) -> Array:
    """Gradient [N, columns] of the losses with respect to some columns of ``at``, by central differences.

    The loss of a row must depend on that row only.
    """
    found = []
    for column in columns:
        ahead, behind = at.copy(), at.copy()
        ahead[:, column] += step
        behind[:, column] -= step
        found.append((loss(ahead) - loss(behind)) / (2 * step))
    return np.stack(found, axis=1)


def tolerances(dtype: torch.dtype, temperature: float, backend: str) -> tuple[float, float]:
    """Absolute tolerance of the loss, and tolerance of the gradient relative to its largest element.

    The float32 paths round cosines. Triton also rounds the queries, and the weights of their candidates, to the dtype
    of a 16-bit bank. A logit has the rounding error of a cosine divided by the temperature.
    """
    if dtype == F64:
        return 1e-9, 1e-6  # the errors of the central differences
    if backend == "triton" and dtype in (BF16, F16):
        rounding = torch.finfo(dtype).eps * (2 if INTERPRETED else 1)  # the interpreter truncates bfloat16
        return 0.5 * rounding / temperature, rounding * (1 + 0.5 / temperature)
    return 2e-6 + 5e-7 / temperature, 1e-5 + 1e-6 / temperature


def assert_gradient(got: Tensor, want: Array, relative: float, floor: float) -> None:
    """Assert that a gradient equals ``want`` within these tolerances and the rounding of its dtype."""
    bound = relative * np.abs(want).max(initial=0) + floor
    if got.dtype in (F16, BF16):
        bound += torch.finfo(got.dtype).eps * np.abs(want)
    assert (np.abs(numpy(got) - want) <= bound).all(), np.abs(numpy(got) - want).max() / np.max(bound)


def test_the_definition_equals_the_oracle() -> None:
    for case in (Case(4, 9, 5), Case(3, 8, 5, queued=False, offset=4)):
        query, key, queue = (None if x is None else numpy(x) for x in case.inputs())
        want = oracle.info_nce(query, key, queue, 0.2, case.offset)
        np.testing.assert_allclose(definition(query, key, queue, 0.2, case.offset), want, rtol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_equal_the_definition(case: Case, backend: str) -> None:
    query, key, queue = case.inputs(device_of(backend))
    query.requires_grad_()
    upstream = torch.linspace(-1, 2, case.n, dtype=F64)
    precision = torch.get_float32_matmul_precision()
    if backend == "triton" and INTERPRETED:  # float32 rows of 512 have a kernel below "highest" only
        torch.set_float32_matmul_precision("high")
    try:
        loss = info_nce(
            query, key, queue, temperature=case.temperature, key_offset=case.offset, reduction="none", backend=backend
        )
    finally:
        torch.set_float32_matmul_precision(precision)
    loss.backward(upstream.to(loss))

    q, k, bank = numpy(query), numpy(key), None if queue is None else numpy(queue)

    def define(at: Array) -> Array:
        return definition(at, k, bank, case.temperature, case.offset)

    of_loss, of_gradient = tolerances(case.dtype, case.temperature, backend)
    assert loss.dtype == (F64 if case.dtype == F64 else F32)
    assert query.grad is not None
    assert query.grad.dtype == case.dtype
    np.testing.assert_allclose(numpy(loss), define(q), rtol=2e-6, atol=of_loss)
    columns = list(range(case.dim)) if case.dim <= 129 else [0, 1, 63, 64, 127, 128, 200, case.dim - 1]
    want = slopes(define, q, columns) * upstream.numpy()[:, None]
    shortest = np.sqrt((q * q).sum(axis=1)).min()
    floor = 1e-6 * max(1.0, of_loss * 1e4) / (case.temperature * shortest)
    assert_gradient(query.grad[:, columns], want, of_gradient, floor)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 64), size=st.integers(1, 1000), dim=st.integers(1, 140), temperature=st.floats(0.02, 1),
    queued=st.booleans(), data=st.data(),
)  # fmt: skip
def test_random_sizes_equal_the_definition(
    n: int, size: int, dim: int, temperature: float, queued: bool, data: st.DataObject
) -> None:
    size = size if queued else size + n
    offset = 0 if queued else data.draw(st.integers(0, size - n))
    case = Case(n, size, dim, temperature, queued, offset)
    query, key, queue = case.inputs()
    query.requires_grad_()
    loss = info_nce(query, key, queue, temperature=temperature, key_offset=offset, reduction="none", backend="cpu")
    loss.sum().backward()
    q, k, bank = numpy(query), numpy(key), None if queue is None else numpy(queue)

    def define(at: Array) -> Array:
        return definition(at, k, bank, temperature, offset)

    of_loss, of_gradient = tolerances(F32, temperature, "cpu")
    np.testing.assert_allclose(numpy(loss), define(q), rtol=2e-6, atol=of_loss)
    columns = [0, dim // 2, dim - 1]
    want = slopes(define, q, columns)
    assert query.grad is not None
    floor = 1e-6 / (temperature * np.sqrt((q * q).sum(axis=1)).min())
    assert_gradient(query.grad[:, columns], want, of_gradient, floor)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_equal_the_definition(backend: str, queued: bool, reduction: str) -> None:
    case = Case(9, 50, 20, queued=queued, offset=0 if queued else 30)
    query, key, queue = case.inputs(device_of(backend))
    query.requires_grad_()
    same = key[: case.n] + query.detach()
    q, k, s, bank = numpy(query), numpy(key), numpy(same), None if queue is None else numpy(queue)
    each = {"mean": np.full(9, 1 / 9), "sum": np.ones(9), "none": np.arange(1.0, 10)}[reduction]
    for loss, define in (
        (
            lambda: info_nce(query, key, queue, key_offset=case.offset, reduction=reduction, backend=backend),
            lambda at: definition(at, k, bank, 0.2, case.offset),
        ),
        (
            lambda: residual_loss(query, same, reduction=reduction, backend=backend),
            lambda at: 2 - 2 * (unit(at) * unit(s)).sum(axis=1),
        ),
    ):
        query.grad = None
        got = loss()
        upstream = -3 * (torch.from_numpy(each) if reduction == "none" else torch.ones((), dtype=F64))
        got.backward(upstream.to(got))
        want = define(q) if reduction == "none" else (define(q) * each).sum()
        np.testing.assert_allclose(numpy(got), want, rtol=1e-5, atol=1e-5)
        assert query.grad is not None
        assert_gradient(query.grad, -3 * slopes(define, q, list(range(20))) * each[:, None], 2e-5, 1e-6)
        with torch.no_grad():
            again = loss()
        np.testing.assert_allclose(numpy(again), numpy(got), rtol=1e-6)
        assert not again.requires_grad


@pytest.mark.parametrize("weights", ["numbers", "tensors"])
@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_info_nce_is_the_weighted_sum_of_its_parts(backend: str, queued: bool, weights: str) -> None:
    case = Case(6, 40, 24, 0.3, queued=queued, offset=0 if queued else 11)
    device = device_of(backend)
    query, key, queue = case.inputs(device)
    query.requires_grad_()
    same = rows(4, 6, 24, dtype=F32).to(device)
    numbers = {"temperature": 0.3, "residual_weight": 0.5, "contrastive_weight": 2.0}
    given = {k: torch.tensor(v, device=device) for k, v in numbers.items()} if weights == "tensors" else numbers
    loss, contrastive, residual = residual_info_nce(
        query, key, same, queue, key_offset=case.offset, backend=backend, **given
    )
    (3 * loss).backward()

    q, k, s, bank = numpy(query), numpy(key), numpy(same), None if queue is None else numpy(queue)
    first = definition(q, k, bank, 0.3, case.offset).mean()
    second = oracle.residual(q, s).mean()
    got = [x.item() for x in (loss, contrastive, residual)]
    np.testing.assert_allclose(got, [2 * first + 0.5 * second, first, second], rtol=1e-5)
    assert not contrastive.requires_grad
    assert not residual.requires_grad

    def define(at: Array) -> Array:
        return 2 * definition(at, k, bank, 0.3, case.offset) + 0.5 * (2 - 2 * (unit(at) * unit(s)).sum(axis=1))

    assert query.grad is not None
    assert_gradient(query.grad, 3 / 6 * slopes(define, q, list(range(24))), 2e-5, 1e-6)


@pytest.mark.parametrize("pointer", [0, 13, 36])
@pytest.mark.parametrize("pushed", [None, 1, 90])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_enter_the_queue_after_the_scores_are_computed(backend: str, pushed: int | None, pointer: int) -> None:
    device = device_of(backend)
    query, key, queue = Case(6, 37, 24).inputs(device)
    assert queue is not None
    before, at = numpy(queue), torch.tensor(pointer, device=device)
    push = None if pushed is None else rows(5, pushed, 24, dtype=F32).to(device)
    query.requires_grad_()
    loss, contrastive, _ = residual_info_nce(query, key, key, queue, at, push=push, backend=backend)
    loss.backward()
    q, k = numpy(query), numpy(key)
    np.testing.assert_allclose(contrastive.item(), definition(q, k, before, 0.2).mean(), rtol=1e-5)
    ring, want = oracle.enqueue(before, pointer, k if push is None else numpy(push))
    np.testing.assert_allclose(numpy(queue), ring, atol=1e-6)
    assert at.item() == want

    def define(at: Array) -> Array:
        return definition(at, k, before, 0.2) + 2 - 2 * (unit(at) * unit(k)).sum(axis=1)

    assert query.grad is not None
    assert_gradient(query.grad, slopes(define, q, list(range(24))) / 6, 2e-5, 1e-6)


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_changed_and_backward_can_run_twice(backend: str, queued: bool) -> None:
    query, key, queue = Case(9, 90, 32, queued=queued).inputs(device_of(backend))
    query.requires_grad_()
    before = [None if x is None else x.detach().clone() for x in (query, key, queue)]
    loss = residual_info_nce(query, key, query.detach().roll(1, 0), queue, backend=backend)[0]
    (first,) = torch.autograd.grad(loss, query, retain_graph=True)
    kept = first.clone()
    if queue is not None:  # a push before the backward pass does not change the gradient
        queue.add_(1)
    (second,) = torch.autograd.grad(loss, query, retain_graph=True)
    assert torch.equal(kept, second)
    assert torch.equal(kept, first)
    for x, old in zip((query, key), before, strict=False):
        assert torch.equal(x, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_push_after_the_loss_does_not_change_its_gradient(backend: str) -> None:
    """The order of MoCo's official code: score, push, and then the backward pass."""
    found = []
    for pushed in (False, True):
        query, key, queue = Case(9, 90, 32).inputs(device_of(backend))
        assert queue is not None
        loss = info_nce(query.requires_grad_(), key, queue, backend=backend)
        if pushed:
            enqueue_(queue, torch.zeros((), dtype=torch.int64, device=queue.device), key, backend=backend)
        loss.backward()
        found.append(query.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_under_inference_mode_gives_the_same_gradient(backend: str, queued: bool) -> None:
    found = []
    for mode in (False, True):
        query = Case(9, 90, 32, queued=queued).inputs(device_of(backend))[0].requires_grad_()
        with torch.inference_mode(mode):
            _, key, queue = Case(9, 90, 32, queued=queued).inputs(device_of(backend))
        (residual_info_nce(query, key, key[:9], queue, backend=backend)[0] + info_nce(query, key, queue)).backward()
        found.append(query.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_have_a_zero_finite_gradient(backend: str, queued: bool, dtype: torch.dtype) -> None:
    query, key, queue = Case(5, 20, 16, 0.1, queued, dtype=dtype).inputs(device_of(backend))
    query[1] = key[2] = 0
    same = query.detach().roll(1, 1)
    same[3] = 0
    query.requires_grad_()
    loss, _, residual = residual_info_nce(query, key, same, queue, temperature=0.1, backend=backend)
    loss.backward()
    assert torch.isfinite(loss)
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()
    assert (query.grad[1] == 0).all()
    assert (query.grad[[0, 2, 3, 4]] != 0).any(dim=1).all()
    np.testing.assert_allclose(residual.item(), oracle.residual(numpy(query), numpy(same)).mean(), rtol=2e-3)


@pytest.mark.parametrize("dim", [16, 300])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_row_that_is_not_finite_shows_in_the_loss(backend: str, queued: bool, value: float, dim: int) -> None:
    query, key, queue = Case(5, 90, dim, queued=queued).inputs(device_of(backend))
    (key if queue is None else queue)[2, 3] = value
    want = np.isfinite(definition(numpy(query), numpy(key), None if queue is None else numpy(queue), 0.2))
    assert not want.all()
    for gradient in (True, False):
        query.requires_grad_(gradient)
        losses = info_nce(query, key, queue, reduction="none", backend=backend)
        np.testing.assert_array_equal(np.isfinite(numpy(losses)), want)
        assert not torch.isfinite(info_nce(query, key, queue, backend=backend))


@pytest.mark.parametrize("length", [1e-16, 1e16])
@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_rows_of_any_length(backend: str, queued: bool, length: float) -> None:
    """It is that of unit rows over the length: 1e-16 to the power of -3 is not in the range of float32."""
    query, key, queue = Case(5, 20, 16, queued=queued).inputs(device_of(backend))
    unit_rows = torch.nn.functional.normalize(query.detach().double())
    gradients = []
    for rows in (unit_rows, (unit_rows * length).float()):
        rows.requires_grad_()
        info_nce(rows, key, queue, reduction="sum", backend=backend).backward()
        gradients.append(rows.grad)
    want = numpy(gradients[0])
    np.testing.assert_allclose(numpy(gradients[1]) * length, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize(
    "case",
    [Case(70, 500, 64), pytest.param(Case(70, 500, 64, queued=False, offset=9), marks=LARGE)],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("backend", FUSED)
def test_two_runs_give_the_same_bits(backend: str, case: Case) -> None:
    query, key, queue = case.inputs(device_of(backend))
    query.requires_grad_()
    found = []
    for _ in range(2):
        losses = residual_info_nce(query, key, key[: case.n], queue, key_offset=case.offset, backend=backend)
        found.append((*losses, *torch.autograd.grad(losses[0], query)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gathered_keys_give_the_gradient_of_one_process(backend: str) -> None:
    query, key, _ = Case(12, 12, 16, queued=False).inputs(device_of(backend))
    query.requires_grad_()
    (want,) = torch.autograd.grad(info_nce(query, key, backend=backend), query)
    shards = query.detach().chunk(3)
    for rank, shard in enumerate(shards):
        part = shard.clone().requires_grad_()
        loss = info_nce(part, key, key_offset=4 * rank, backend=backend)
        (got,) = torch.autograd.grad(loss / 3, part)  # DDP averages over the ranks
        torch.testing.assert_close(got, want[4 * rank : 4 * rank + 4], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_loss_and_queue(backend: str) -> None:
    query, key, queue = Case(6, 30, 16).inputs(device_of(backend))
    assert queue is not None

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=2)[:, :, 0]

    want = residual_info_nce(query, key, key, queue, backend=backend)[0]
    got = residual_info_nce(strided(query), key.T.contiguous().T, strided(key), strided(queue), backend=backend)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    pointer, ring = torch.tensor(28, device=query.device), strided(queue)
    residual_info_nce(query, key, key, ring, pointer, backend=backend)
    np.testing.assert_allclose(numpy(ring), oracle.enqueue(numpy(queue), 28, numpy(key))[0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs_have_zero_loss(backend: str) -> None:
    device = device_of(backend)
    none, some = torch.zeros(0, 8, device=device, requires_grad=True), torch.ones(3, 8, device=device)
    for loss in (info_nce(none, some, backend=backend), info_nce(none, none.detach(), some, backend=backend),
                 residual_loss(none, none.detach(), backend=backend)):  # fmt: skip
        assert loss.item() == 0
        loss.backward()
    assert info_nce(some, some, some[:0], backend=backend).item() == 0  # the positive is the only candidate


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision(backend: str) -> None:
    query, key, queue = Case(6, 60, 64).inputs(device_of(backend))
    want = residual_info_nce(query, key, key, queue, backend=backend)[0]
    with torch.autocast(query.device.type, BF16):
        got = residual_info_nce(query, key, key, queue, backend=backend)[0]
    assert got.dtype == F32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def step(
    query: Tensor, key: Tensor, queue: Tensor, pointer: Tensor, temperature: float | Tensor, backend: str
) -> Tensor:
    """A scalar from all three losses, to be compiled."""
    loss, contrastive, residual = residual_info_nce(
        query * 2, key, query.detach().roll(1, 0), queue, pointer, temperature=temperature, backend=backend
    )
    rows = info_nce(query, key, key, temperature=temperature, reduction="none", backend=backend)
    return loss + rows.sum() + residual_loss(query, key, backend=backend) + 0 * (contrastive + residual)


def compiled_as_eager(compiler: str, backend: str) -> None:
    """Assert that the compiled function returns the losses, gradients and queue of the eager one."""
    device = device_of(backend)
    query, key, _ = Case(6, 20, 16).inputs(device)
    query.requires_grad_()
    ring = FeatureQueue(8, 16).to(device)
    other = copy.deepcopy(ring)
    torch._dynamo.reset()
    fast = torch.compile(step, backend=compiler, fullgraph=True)
    for temperature in (torch.tensor(0.2, device=device), torch.tensor(0.3, device=device), 0.2, 0.3, 0.4):
        found = []
        for queue, call in ((ring, step), (other, fast)):
            loss = call(query, key, queue.features, queue.pointer, temperature, backend)
            found.append((loss.detach(), *torch.autograd.grad(loss, query), queue.features.clone(), queue.pointer))
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", SLOW_TRITON, pytest.param("reference", marks=pytest.mark.slow)])
def test_a_whole_step_compiles_without_graph_breaks(backend: str) -> None:
    compiled_as_eager("aot_eager", backend)


@pytest.mark.slow
def test_a_whole_step_compiles_with_inductor() -> None:
    compiled_as_eager("inductor", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_that_changes_does_not_recompile(backend: str) -> None:
    device = device_of(backend)
    query, key, queue = Case(6, 20, 16).inputs(device)
    count = importlib.import_module("torch._dynamo.testing").CompileCounter()

    def call(temperature: Tensor, weight: Tensor) -> Tensor:
        return residual_info_nce(
            query, key, key, queue, temperature=temperature, residual_weight=weight, backend=backend
        )[0]

    fast = torch.compile(call, backend=count, fullgraph=True)
    found = [fast(torch.tensor(t, device=device), torch.tensor(2 * t, device=device)).item() for t in (0.1, 0.2, 0.3)]
    assert count.frame_count == 1
    want = [call(torch.tensor(t, device=device), torch.tensor(2 * t, device=device)).item() for t in (0.1, 0.2, 0.3)]
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("backend", ["cpu", SLOW_TRITON])
def test_the_operators_pass_opcheck(backend: str, gradient: bool, reduction: str) -> None:
    device = device_of(backend)
    query, key, queue = Case(4, 20, 16).inputs(device)
    assert queue is not None
    tensors = [torch.tensor(0.2, device=device), None, None]
    arguments = (query, key, key, queue, [0.0, 1.0, 2.0], tensors, 0, reduction, gradient, backend)
    torch.library.opcheck(_fused._losses, arguments)
    torch.library.opcheck(_fused._losses_and_push, (*arguments, torch.tensor(18, device=device), key))
    in_batch = (query, key, None, None, [0.2, 0.0, 1.0], [None] * 3, 0, reduction, gradient, backend)
    torch.library.opcheck(_fused._losses, in_batch)


@pytest.mark.parametrize("backend", [TRITON])
def test_loss_gradient_and_queue_take_two_launches_and_in_batch_keys_three(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrm.kernels import _push

    counts: list[str] = []
    for module, name in ((_sweep, "sweep_kernel"), (_sweep, "finish_kernel"), (_push, "push_kernel")):
        monkeypatch.setattr(module, name, Launches(getattr(module, name), counts, name))
    device = device_of(backend)
    query, key, queue = Case(70, 500, 16).inputs(device)
    residual_info_nce(
        query.requires_grad_(), key, key, queue, torch.tensor(3, device=device), backend=backend, temperature=0.1
    )
    assert counts == ["sweep_kernel", "finish_kernel"]
    counts.clear()
    residual_info_nce(query, key, key, backend=backend)
    assert counts == ["push_kernel", "sweep_kernel", "finish_kernel"]


@pytest.mark.parametrize("backend", [TRITON])
def test_wide_rows_take_four_launches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrm.kernels import _push

    counts: list[str] = []
    for module, name in (
        (_push, "push_kernel"), (_wide, "score_kernel"), (_wide, "average_kernel"), (_sweep, "finish_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Launches(getattr(module, name), counts, name))
    query, key, queue = Case(7, 150, 520, dtype=F16).inputs(device_of(backend))
    assert queue is not None
    residual_info_nce(query.requires_grad_(), key, key, queue, torch.tensor(3, device=query.device), backend=backend)
    assert counts == ["push_kernel", "score_kernel", "average_kernel", "finish_kernel"]


@pytest.mark.parametrize("gradient", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [Case(40, 333, 40, 0.1), Case(40, 300, 20, queued=False, offset=200), Case(9, 300, 24, dtype=F16)],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("backend", [TRITON])
def test_wide_and_narrow_kernels_agree(
    backend: str, case: Case, gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrow and the wide Triton path agree on rows that both accept. The wide path works in several parts."""
    query, key, queue = case.inputs(device_of(backend))
    # other strides, which only the wide path accepts
    ring = None if queue is None else torch.cat([queue, queue], dim=1)[:, : case.dim]
    query.requires_grad_(gradient)
    found = []
    for bank in (queue, ring):
        pointer = None if bank is None else torch.tensor(case.size - 3, device=query.device)
        losses = residual_info_nce(
            query, key, key[: case.n], bank, pointer, temperature=case.temperature, key_offset=case.offset,
            backend=backend,
        )  # fmt: skip
        slope = torch.autograd.grad(losses[0], query) if gradient else ()
        found.append((*losses, *slope, *(() if bank is None else (bank.clone(), pointer))))
        monkeypatch.setattr(_wide, "ROWS", 32)
        monkeypatch.setattr(_wide, "ELEMENTS", 32 * 192)
        monkeypatch.setattr(_sweep, "plan", lambda *_: None)
    close = {"rtol": 2e-3, "atol": 2e-4} if case.dtype == F16 else {"rtol": 1e-5, "atol": 1e-6}
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(wide, narrow, **close)


@pytest.mark.parametrize("form", ["queue", "batch"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_float8_banks_equal_the_definition(backend: str, dtype: torch.dtype, form: str) -> None:
    query, key, queue = Case(9, 300, 64, 0.3).inputs(device_of(backend))
    query.requires_grad_()
    bank = None if form == "batch" or queue is None else queue.to(dtype)
    keys = torch.cat([key, key.roll(1, 1)]).to(dtype) if bank is None else key
    loss = info_nce(query, keys, bank, temperature=0.3, reduction="none", backend=backend)
    (slope,) = torch.autograd.grad(loss.sum(), query)
    k, c = numpy(keys.float()), None if bank is None else numpy(bank.float())

    def define(at: Array) -> Array:
        return definition(at, k, c, 0.3)

    q = numpy(query)
    np.testing.assert_allclose(numpy(loss), define(q), rtol=1e-3)
    assert_gradient(slope, slopes(define, q, list(range(64))), 5e-3, 1e-6)


class Counted:
    """A kernel that appends the number of bytes of its tensors to ``launches`` and runs nothing."""

    def __init__(self, launches: list[int]) -> None:
        self.launches = launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            tensors = {id(x): x for x in (*args, *named.values()) if isinstance(x, Tensor)}
            self.launches.append(sum(x.numel() * x.itemsize for x in tensors.values()))

        return launch


@pytest.mark.skipif(triton is None, reason="the plan is that of the Triton kernels")
@pytest.mark.parametrize(
    ("n", "size", "dim", "dtype", "queued", "launches"),
    [
        (256, 65_536, 1_024, BF16, True, 6),
        (256, 65_536, 2_048, BF16, True, 6),
        (256, 65_536, 512, F32, True, 6),
        (256, 65_536, 128, torch.float8_e4m3fn, True, 8),
        (4_096, 4_096, 1_024, BF16, False, 8),
        (16_384, 16_384, 1_024, BF16, False, 68),
    ],
)
def test_wide_rows_take_few_launches_and_bytes(
    n: int, size: int, dim: int, dtype: torch.dtype, queued: bool, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrm.kernels import _push

    counted: list[int] = []
    for module, name in (
        (_push, "push_kernel"), (_wide, "score_kernel"), (_wide, "average_kernel"), (_sweep, "finish_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Counted(counted))
    monkeypatch.setattr(_sweep, "capacity", lambda _: (132, 9))
    query, key = (torch.empty(n, dim, dtype=BF16 if dtype != F32 else F32, device="meta") for _ in range(2))
    queue = torch.empty(size, dim, dtype=dtype, device="meta") if queued else None
    _sweep.swept_losses(Scoring(query, key, key, queue, None, None, 0.2, 1.0, 1.0), True)
    assert len(counted) <= launches
    width = 4 if dtype == F32 else 2  # bytes per element in the matrix products
    products = 2 * width * (size * dim + n * size + n * dim)
    rows = n * dim * (3 * query.itemsize + 4)  # bytes of the queries and keys of two views, and of the gradient
    assert sum(counted) <= 2 * products + rows


def test_float64_takes_at_most_130_operations() -> None:
    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.calls += not (isinstance(out, Tensor) and out._is_view())
            return out

    query, queue = (torch.empty(rows, 1024, dtype=F64, device="meta") for rows in (256, 65_536))
    with Count() as count:
        _blocked.blocked_losses(Scoring(query, query, query, queue, None, None, 0.2, 1.0, 1.0), True)
    assert count.calls <= 130


def test_the_largest_tensor_of_the_cpu_path_does_not_grow_with_the_bank() -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self, given: Tensor) -> None:
            super().__init__()
            self.elements, self.given = 0, given.untyped_storage().data_ptr()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self.given:
                    self.elements = max(self.elements, made.numel())
            return out

    for dtype, queued in ((F32, True), (BF16, True), (F32, False)):
        found = []
        for size in (16384, 65536):
            query, key, queue = Case(300, size, 64, queued=queued).inputs()
            bank = None if queue is None else queue.to(dtype)
            with Largest(key if bank is None else bank) as largest:
                _blocked.blocked_losses(Scoring(query, key, None, bank, None, None, 0.2, 1.0, 1.0), True)
            found.append(largest.elements)
        assert found[0] == found[1] <= max(_blocked.ELEMENTS, _blocked.CONVERTED * (dtype == BF16))


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize(
    "case",
    [Case(5, 1337, 20, 0.05), Case(70, 3000, 16, dtype=BF16), Case(9, 999, 24, 0.5, dtype=F64), Case(2, 10, 7)],
    ids=lambda c: c.name,
)
def test_the_loss_does_not_depend_on_the_number_of_threads(
    case: Case, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_blocked, "CONVERTED", 1700 * case.dim)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    query, key, queue = case.inputs()
    query.requires_grad_()
    found = []
    for backend in ("cpu", "cpu", "reference"):
        loss = info_nce(query, key, queue, temperature=case.temperature, reduction="none", backend=backend)
        found.append((loss, *torch.autograd.grad(loss.sum(), query)))
    for got, again, want in zip(*found, strict=True):
        assert torch.equal(got, again)
        torch.testing.assert_close(got, want, rtol=2e-2 if got.dtype == BF16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["columns", "every second", "a cut"])
def test_gradients_do_not_depend_on_the_layout_of_the_queries(layout: str) -> None:
    query, key, queue = Case(6, 40, 10).inputs()
    wide = torch.randn(12, 30)
    laid_out = {
        "columns": lambda: query.T.contiguous().T,
        "every second": lambda: wide[::2, ::3].copy_(query),
        "a cut": lambda: wide[3:9, 5:15].copy_(query),
    }[layout]()
    slopes = []
    for each in (query, laid_out):
        rows = each.detach().requires_grad_()
        slopes.append(torch.autograd.grad(info_nce(rows, key, queue, backend="cpu"), rows)[0])
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=1e-7)


def test_the_gradient_of_an_almost_certain_positive_is_accurate() -> None:
    """If the positive has all but e^-20 of the probability, the gradient is the rest, and it is accurate."""
    key = torch.eye(4, 8)
    query, queue = key.clone().requires_grad_(), torch.eye(8)[4:]
    loss = info_nce(query, key, queue, temperature=0.05, reduction="none", backend="cpu")
    (slope,) = torch.autograd.grad(loss.sum(), query)
    q, k, c = numpy(query), numpy(key), numpy(queue)
    np.testing.assert_allclose(numpy(loss), definition(q, k, c, 0.05), rtol=1e-5)
    want = slopes(lambda at: definition(at, k, c, 0.05), q, list(range(8)), 1e-4)
    assert_gradient(slope, want, 1e-3, 0)


def test_without_a_gradient_the_second_product_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "addmm_", None)
    monkeypatch.setattr(_blocked, "_ATTENTION", None)
    query, key, queue = Case(6, 20, 16).inputs()
    info_nce(query, key, queue, backend="cpu")
    for bank in (queue, None):
        with pytest.raises(TypeError):
            info_nce(query.clone().requires_grad_(), key, bank, backend="cpu")


@pytest.mark.skipif(triton is None, reason="the plan is that of the Triton kernels")
@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 20_000), size=st.integers(0, 2**21), dim=st.integers(1, 512),
    kind=st.sampled_from(["half", "tf32"]), slots=st.sampled_from([1, 4, 84, 108, 132]), major=st.sampled_from([8, 9]),
)  # fmt: skip
def test_a_plan_covers_the_work(n: int, size: int, dim: int, kind: str, slots: int, major: int) -> None:
    plan = _sweep.plan(n, size, dim, kind, slots, major)
    assert plan is not None
    assert plan.query_blocks * plan.block_n >= n
    assert plan.bank_splits * plan.tiles_per_split * plan.block_k >= size
    assert (plan.bank_splits - 1) * plan.tiles_per_split * plan.block_k <= max(size - 1, 0)  # no split is empty
    finish = _sweep.finishing(dim, plan.bank_splits)
    assert finish["BLOCK_R"] * finish["CHUNK"] * dim <= 4096  # the rows to be finished fit in registers


@pytest.mark.skipif(triton is None, reason="the plan is that of the Triton kernels")
@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 40_000), size=st.integers(1, 2**21), dim=st.integers(1, 8192), gradient=st.booleans(),
    kind=st.sampled_from(["half", "tf32", "tf32x3"]), slots=st.sampled_from([1, 4, 84, 132]), converted=st.booleans(),
)  # fmt: skip
def test_a_plan_for_wide_rows_covers_the_work(
    n: int, size: int, dim: int, kind: str, slots: int, gradient: bool, converted: bool
) -> None:
    plan = _wide.plan(n, size, dim, kind, slots, gradient, converted)
    tiles = plan.columns // plan.tiles.block_k
    assert plan.columns % plan.tiles.block_k == 0
    assert plan.tiles_per_split * plan.splits >= tiles > plan.tiles_per_split * (plan.splits - 1)
    assert plan.bank_splits <= plan.splits * -(-size // plan.columns)
    assert plan.bank_splits > plan.splits * (size // plan.columns) - 1
    assert plan.rows * plan.columns <= max(_wide.ELEMENTS, plan.rows * plan.tiles.block_k)
    if converted:
        assert plan.columns * dim <= max(_wide.ELEMENTS, dim * plan.tiles.block_k)


@pytest.mark.skipif(triton is None, reason="the plan is that of the Triton kernels")
def test_a_plan_fills_a_gpu_in_less_than_4_mib() -> None:
    plan = _sweep.plan(256, 65536, 128, "half", 132, 9)
    assert plan is not None
    assert plan.query_blocks * plan.bank_splits >= 0.9 * 132
    assert plan.bank_splits * 256 * 128 * 2 + 256 * 128 * 4 < 4 * 2**20
    assert _sweep.plan(16384, 16384, 256, "half", 132, 9).bank_splits == 1  # type: ignore[union-attr]


def test_float32_products_follow_the_matmul_precision() -> None:
    precision = torch.get_float32_matmul_precision()
    try:
        for setting, want in (("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert _sweep.product_kind(F32) == want
            assert _sweep.product_kind(BF16) == "half"
    finally:
        torch.set_float32_matmul_precision(precision)


Q, K, POINTER = torch.ones(4, 3), torch.ones(4, 3), torch.tensor(0)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "key grad": (lambda: info_nce(Q, K.clone().requires_grad_()), "key requires grad"),
    "queue grad": (lambda: info_nce(Q, K, K.clone().requires_grad_()), "queue requires grad"),
    "same grad": (lambda: residual_info_nce(Q, K, K.clone().requires_grad_()), "same_view_key requires grad"),
    "temperature grad": (lambda: info_nce(Q, K, temperature=torch.ones((), requires_grad=True)), "requires grad"),
    "dims": (lambda: info_nce(Q, K[:, :2]), r"key has shape \(4, 2\); it must be \[rows, 3\]"),
    "queue dims": (lambda: info_nce(Q, K, K[:, :2]), r"queue has shape \(4, 2\)"),
    "same rows": (lambda: residual_info_nce(Q, K, K[:2]), r"same_view_key has shape \(2, 3\)"),
    "teacher rows": (lambda: residual_loss(Q, K[:2]), r"student has shape \(4, 3\) and teacher \(2, 3\)"),
    "queue rows": (lambda: info_nce(Q, K[:2], K), "key must have 4 rows"),
    "queue offset": (lambda: info_nce(Q, K, K, key_offset=1), "key_offset must be 0"),
    "offset": (lambda: info_nce(Q, K, key_offset=1), "key_offset=1 with 4 queries and 4 keys"),
    "negative offset": (lambda: info_nce(Q, K, key_offset=-1), "key_offset=-1"),
    "temperature 0": (lambda: info_nce(Q, K, temperature=0.0), "temperature=0.0 must be finite, above 0"),
    "temperature below": (lambda: info_nce(Q, K, temperature=-0.1), "temperature=-0.1"),
    "temperature inf": (lambda: info_nce(Q, K, temperature=float("inf")), "temperature=inf"),
    "temperature shape": (lambda: info_nce(Q, K, temperature=torch.ones(1)), r"temperature has shape \(1,\)"),
    "temperature device": (lambda: info_nce(Q, K, temperature=torch.ones((), device="meta")), "temperature is on meta"),
    "weight": (lambda: residual_info_nce(Q, K, K, residual_weight=float("nan")), "residual_weight=nan"),
    "one dimension": (lambda: info_nce(Q[0], K), r"query has shape \(3,\)"),
    "integers": (lambda: info_nce(Q.int(), K), "query is torch.int32"),
    "device": (lambda: info_nce(Q, K.to("meta")), "key is on meta"),
    "push dims": (lambda: residual_info_nce(Q, K, K, K, POINTER, push=K[:, :2]), r"push has shape \(4, 2\)"),
    "empty ring": (lambda: residual_info_nce(Q, K, K, K[:0], POINTER), "at least one row"),
    "no gpu": (lambda: info_nce(Q, K, backend="triton"), "backend='triton' cannot run"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert POINTER.item() == 0


@pytest.mark.gpu
def test_no_operation_makes_the_host_wait() -> None:
    query, key, queue = Case(256, 4096, 128).inputs("cuda")
    pointer = torch.tensor(0, device="cuda")
    weight = torch.tensor(0.5, device="cuda")
    query.requires_grad_()

    def run() -> None:
        residual_info_nce(query, key, key, queue, pointer, residual_weight=weight)[0].backward()
        residual_info_nce(query, key, key, residual_weight=weight)[0].backward()

    run()  # compile the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_extra_memory_for_65536_keys_is_below_4_mib() -> None:
    query, key, queue = Case(256, 65536, 128, dtype=BF16).inputs("cuda")
    query.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    residual_info_nce(query, key, key, queue, torch.tensor(0, device="cuda"))
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**20


@pytest.mark.skipif(triton is None, reason="needs Triton")
@often_and_slow
def test_triton_cases_in_the_interpreter(cases: str) -> None:
    run_triton_cases(__file__, cases)
