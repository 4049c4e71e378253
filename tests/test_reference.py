"""The reference operations against float64 NumPy definitions and central differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrm.kernels import EMA, FeatureQueue, enqueue_, fused_ema_, info_nce, residual_info_nce, residual_loss
from tests import oracle

# float32 sums of a few dozen terms of size 1 to 100 have an error of a few units in the last place of the largest term.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normally distributed rows of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


CASES = [
    # n, candidates, dim, temperature, queue form, offset
    (1, 1, 3, 0.2, True, 0),
    (5, 7, 3, 0.2, True, 0),
    (4, 33, 16, 1.0, True, 0),
    (3, 3, 5, 0.07, False, 0),
    (4, 9, 20, 0.2, False, 5),
    (1, 6, 129, 0.01, False, 2),
]


def contrast_inputs(case: tuple[int, int, int, float, bool, int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries, keys and, in the queue form, a queue of unit rows."""
    n, m, dim, _, queued, _ = case
    queue = torch.from_numpy(oracle.unit(rows(3, m, dim).numpy())) if queued else None
    return rows(1, n, dim), rows(2, n if queued else m, dim), queue


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_info_nce_equals_the_definition(case: tuple[int, int, int, float, bool, int], dtype: torch.dtype) -> None:
    query, key, queue = (None if t is None else t.to(dtype) for t in contrast_inputs(case))
    assert query is not None
    assert key is not None
    _, _, _, temperature, _, offset = case
    query.requires_grad_()

    def define(q: oracle.Array) -> float:
        return float(
            oracle.info_nce(q, key.numpy(), None if queue is None else queue.numpy(), temperature, offset).mean()
        )

    loss = info_nce(query, key, queue, temperature=temperature, key_offset=offset, backend="reference")
    (3 * loss).backward()
    want = oracle.central_difference(define, query.detach().numpy())
    # Logits are cosine / temperature, so float32's rounding error is divided by the temperature.
    scale = 1 if dtype == torch.float64 else max(1.0, 0.1 / temperature)
    assert loss.dtype == dtype
    np.testing.assert_allclose(loss.item(), define(query.detach().numpy()), rtol=2e-5, atol=2e-5 * scale)
    np.testing.assert_allclose(query.grad.numpy() / 3, want, rtol=1e-4 * scale, atol=2e-5 * scale)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_of_info_nce_equal_the_definition(reduction: str) -> None:
    query, key, queue = contrast_inputs(CASES[1])
    query.requires_grad_()
    weight = torch.arange(1.0, len(query) + 1, dtype=torch.float64)
    loss = info_nce(query, key, queue, reduction=reduction, backend="reference")
    want = oracle.info_nce(query.detach(), key, queue, 0.2)
    weights = weight if reduction == "none" else torch.ones_like(weight)
    (loss * weights).sum().backward() if reduction == "none" else loss.backward()
    np.testing.assert_allclose(loss.detach().numpy(), want if reduction == "none" else want.sum(), **CLOSE)
    gradient = oracle.central_difference(
        lambda q: float((oracle.info_nce(q, key, queue, 0.2) * weights.numpy()).sum()), query.detach()
    )
    np.testing.assert_allclose(query.grad.numpy(), gradient, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_residual_loss_equals_the_definition(reduction: str) -> None:
    student, teacher = rows(1, 5, 7).requires_grad_(), rows(2, 5, 7)
    weight = torch.arange(1.0, 6.0, dtype=torch.float64)
    loss = residual_loss(student, teacher, reduction=reduction, backend="reference")
    (loss * weight).sum().backward() if reduction == "none" else loss.backward()
    want = oracle.residual(student.detach(), teacher)
    each = {"mean": np.full(5, 0.2), "sum": np.ones(5), "none": weight.numpy()}[reduction]
    expected = want if reduction == "none" else (want * each).sum()
    np.testing.assert_allclose(loss.detach().numpy(), expected, **CLOSE)
    gradient = oracle.central_difference(lambda s: float((oracle.residual(s, teacher) * each).sum()), student.detach())
    np.testing.assert_allclose(student.grad.numpy(), gradient, **CLOSE)


@pytest.mark.parametrize("queued", [True, False])
def test_residual_info_nce_is_the_weighted_sum_and_pushes_after_scoring(queued: bool) -> None:
    query, key, same = rows(1, 4, 6).requires_grad_(), rows(2, 4, 6), rows(4, 4, 6)
    queue = torch.from_numpy(oracle.unit(rows(3, 9, 6))) if queued else None
    before = None if queue is None else queue.clone()
    pointer = torch.tensor(7) if queued else None
    loss, contrastive, residual = residual_info_nce(
        query, key, same, queue, pointer, temperature=0.3, residual_weight=0.5, contrastive_weight=2.0,
        backend="reference",
    )  # fmt: skip
    loss.backward()

    def define(q: oracle.Array) -> float:
        return 2 * oracle.info_nce(q, key, before, 0.3).mean() + 0.5 * oracle.residual(q, same).mean()

    np.testing.assert_allclose(loss.item(), define(query.detach().numpy()), **CLOSE)
    np.testing.assert_allclose(contrastive.item(), oracle.info_nce(query.detach(), key, before, 0.3).mean(), **CLOSE)
    np.testing.assert_allclose(residual.item(), oracle.residual(query.detach(), same).mean(), **CLOSE)
    assert not contrastive.requires_grad
    assert not residual.requires_grad
    np.testing.assert_allclose(query.grad.numpy(), oracle.central_difference(define, query.detach()), **CLOSE)
    if queue is not None and pointer is not None:
        ring, at = oracle.enqueue(before, 7, key)
        np.testing.assert_allclose(queue.numpy(), ring, **CLOSE)
        assert pointer.item() == at == 2


@pytest.mark.parametrize("count", [0, 1, 5, 7, 8, 20])
@pytest.mark.parametrize("pointer", [0, 3, 6])
def test_enqueue_wraps_at_any_size(count: int, pointer: int) -> None:
    queue, at, keys = rows(1, 7, 3), torch.tensor(pointer), rows(2, count, 3)
    ring, want = oracle.enqueue(queue, pointer, keys)
    enqueue_(queue, at, keys, backend="reference")
    np.testing.assert_allclose(queue.numpy(), ring, **CLOSE)
    assert at.item() == want


def test_a_zero_row_has_a_finite_zero_gradient() -> None:
    for dtype in (torch.float32, torch.float16):
        query = rows(1, 3, 8, dtype=dtype)
        query[1] = 0
        query.requires_grad_()
        key, queue = rows(2, 3, 8, dtype=dtype), rows(3, 5, 8)
        (info_nce(query, key, queue.to(dtype), temperature=0.1) + residual_loss(query, key)).backward()
        assert torch.isfinite(query.grad).all()
        assert (query.grad[1] == 0).all()
        assert (query.grad[0] != 0).any()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 1.0])
@pytest.mark.parametrize(
    ("teacher", "student"), [("float32", "float32"), ("float32", "bfloat16"), ("float64", "float32")]
)
def test_ema_equals_the_definition(momentum: float, teacher: str, student: str) -> None:
    t, s = rows(1, 5, 3, dtype=getattr(torch, teacher)), rows(2, 5, 3, dtype=getattr(torch, student))
    want = oracle.ema(t.double(), s.double(), momentum)
    shadow = torch.empty(5, 3, dtype=torch.bfloat16)
    fused_ema_([t], [s], momentum, shadow=[shadow], backend="reference")
    np.testing.assert_allclose(t.double().numpy(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(shadow, t.bfloat16())


def test_ema_copies_integers_and_prepared_form_agrees() -> None:
    tensors = [rows(1, 4, 4), torch.tensor(3), torch.zeros(0)]
    students = [rows(2, 4, 4), torch.tensor(8), torch.zeros(0)]
    other = [t.clone() for t in tensors]
    fused_ema_(tensors, students, 0.9, backend="reference")
    EMA(other, students, backend="reference").update_(torch.tensor(0.9, dtype=torch.float64))
    assert tensors[1].item() == 8
    assert all(torch.equal(a, b) for a, b in zip(tensors, other, strict=True))


def test_ema_matches_wrapped_modules_by_name_and_refuses_leftovers() -> None:
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = oracle.ema(teacher.weight.detach(), student.weight.detach(), 0.9)
    wrapped = torch.nn.Sequential()
    wrapped.add_module("module", student)
    fused_ema_(teacher, wrapped, 0.9)
    np.testing.assert_allclose(teacher.weight.detach().numpy(), want, rtol=1e-6)
    with pytest.raises(ValueError, match="without a partner"):
        fused_ema_(teacher, torch.nn.Linear(2, 2, bias=False), 0.9)


def test_the_queue_is_saved_and_starts_as_unit_rows() -> None:
    queue = FeatureQueue(9, 4, dtype=torch.bfloat16)
    queue.enqueue_(rows(1, 5, 4))
    again = FeatureQueue(9, 4, dtype=torch.bfloat16)
    again.load_state_dict(queue.state_dict())
    assert again.pointer.item() == 5
    assert torch.equal(again.features, queue.features)
    np.testing.assert_allclose(queue.features.float().norm(dim=1), 1, atol=0.01)


def test_autocast_does_not_lower_the_precision() -> None:
    query, key = rows(1, 4, 64, dtype=torch.float32), rows(2, 9, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(query, key, temperature=0.1)
    np.testing.assert_allclose(loss.item(), oracle.info_nce(query, key, None, 0.1).mean(), rtol=1e-5)


def test_losses_and_ema_compile_without_graph_breaks() -> None:
    queue = FeatureQueue(9, 4)

    def step(query: Tensor, key: Tensor, teacher: Tensor) -> Tensor:
        loss, _, _ = residual_info_nce(query, key, key, queue.features, queue.pointer)
        fused_ema_([teacher], [query.detach()], 0.9)
        return loss + residual_loss(query, key)

    query, key, teacher = rows(1, 3, 4), rows(2, 3, 4), rows(3, 3, 4)
    want = step(query, key, teacher.clone())
    queue.load_state_dict(FeatureQueue(9, 4).state_dict())
    before = queue.features.clone()
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(query, key, teacher)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
        got.item(), oracle.info_nce(query, key, before, 0.2).mean() + 2 * oracle.residual(query, key).mean(), rtol=1e-6
    )
    assert queue.pointer.item() == 3


Q, K = torch.ones(4, 3), torch.ones(4, 3)
WRONG = {
    "query requires two dimensions": (lambda: info_nce(Q[0], K), r"query has shape \(3,\)"),
    "dims differ": (lambda: info_nce(Q, K[:, :2]), r"key has shape \(4, 2\); it must be \[rows, 3\]"),
    "rows differ": (lambda: info_nce(Q, K[:2], K), "key must have 4 rows"),
    "too few keys": (lambda: info_nce(Q, K[:2]), "too few rows"),
    "offset": (lambda: info_nce(Q, K, key_offset=1), "key_offset=1"),
    "key grad": (lambda: info_nce(Q, K.clone().requires_grad_()), "key requires grad"),
    "queue grad": (lambda: info_nce(Q, K, K.clone().requires_grad_()), "queue requires grad"),
    "teacher grad": (lambda: residual_loss(Q, K.clone().requires_grad_()), "teacher requires grad"),
    "temperature 0": (lambda: info_nce(Q, K, temperature=0.0), "temperature=0"),
    "temperature nan": (lambda: info_nce(Q, K, temperature=float("nan")), "temperature=nan"),
    "reduction": (lambda: info_nce(Q, K, reduction="avg"), "reduction='avg'"),
    "backend": (lambda: info_nce(Q, K, backend="cuda"), "backend='cuda' is unknown"),
    "no gpu": (lambda: info_nce(Q, K, backend="triton"), "backend='triton'"),
    "pointer without queue": (lambda: residual_info_nce(Q, K, K, pointer=torch.tensor(0)), "without a queue"),
    "push without pointer": (lambda: residual_info_nce(Q, K, K, K, push=K), "without a pointer"),
    "pointer dtype": (lambda: enqueue_(K, torch.tensor(0.0), K), "0-d int64"),
    "empty ring": (lambda: enqueue_(K[:0], torch.tensor(0), K), "at least one row"),
    "queue size": (lambda: FeatureQueue(0, 4), "size=0"),
    "momentum": (lambda: fused_ema_([Q], [K], 1.5), "momentum=1.5"),
    "ema lengths": (lambda: fused_ema_([Q], [K, K], 0.5), "2 student tensors for 1 teacher"),
    "ema shapes": (lambda: fused_ema_([Q], [K[:2]], 0.5), r"student\[0\] has shape \(2, 3\)"),
    "ema expanded": (lambda: fused_ema_([torch.ones(1).expand(4)], [torch.ones(4)], 0.5), "expanded"),
    "ema one tensor": (lambda: fused_ema_(Q, [K], 0.5), "teacher is a Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert (torch.ones(4, 3) == Q).all()
