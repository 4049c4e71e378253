"""The ring queue of keys: any number of keys at any pointer, skipped pushes, dtypes, layouts and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrm.kernels import FeatureQueue, enqueue_, queue
from fastrm.kernels.dispatch import triton
from tests import oracle
from tests.interpreted import BACKENDS, INTERPRETED, SLOW_TRITON, TRITON, device_of, often_and_slow, run_triton_cases

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def rows(seed: int, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Normally distributed rows of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def check(ring: Tensor, pointer: Tensor, keys: Tensor, backend: str) -> None:
    """Push keys, and compare with keys written one by one; the keys must not change."""
    before, source, first = ring.cpu().double().numpy().copy(), keys.clone(), int(pointer)
    enqueue_(ring, pointer, keys, backend=backend)
    want, at = oracle.enqueue(before, first, keys.cpu().double().numpy())
    spacing = torch.finfo(ring.dtype).eps * (2 if INTERPRETED else 1)  # the interpreter truncates bfloat16
    np.testing.assert_allclose(ring.cpu().double().numpy(), want, rtol=spacing, atol=1e-7)
    assert pointer.item() == at
    assert torch.equal(keys, source)


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 14, 40])
@pytest.mark.parametrize("pointer", [0, 3, 6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_count_wraps_at_any_pointer(backend: str, pointer: int, count: int) -> None:
    device = device_of(backend)
    check(rows(1, 7, 5).to(device), torch.tensor(pointer, device=device), rows(2, count, 5).to(device), backend)


@pytest.mark.parametrize("dim", [32, 600])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skipped_push_changes_nothing(backend: str, dim: int) -> None:
    device = device_of(backend)
    ring, pointer = rows(1, 50, dim).to(device), torch.tensor(45, device=device)
    before = ring.clone()
    for skip in (torch.ones(1), torch.tensor(True), torch.tensor(3.0)):
        keys = torch.full((20, dim), float("nan"), device=device)
        enqueue_(ring, pointer, keys, skip=skip.to(device), backend=backend)
        assert torch.equal(ring, before)
        assert pointer.item() == 45
    other, at = before.clone(), pointer.clone()
    enqueue_(ring, pointer, rows(2, 20, dim).to(device), skip=torch.zeros((), device=device), backend=backend)
    enqueue_(other, at, rows(2, 20, dim).to(device), backend=backend)
    assert torch.equal(ring, other)
    assert pointer.item() == 15
    with pytest.raises(ValueError, match="skip has shape"):
        enqueue_(ring, pointer, rows(2, 2, dim).to(device), skip=torch.zeros(2, device=device), backend=backend)


@pytest.mark.parametrize("dim", [1, 3, 16, 96, 128, 129, 512, 600])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_width(backend: str, dim: int) -> None:
    device = device_of(backend)
    check(rows(1, 300, dim).to(device), torch.tensor(290, device=device), rows(2, 130, dim).to(device), backend)


@pytest.mark.parametrize("keys", [F32, F16, BF16, F64])
@pytest.mark.parametrize("ring", [F32, F16, BF16, F64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rings_and_keys_of_any_dtype(backend: str, ring: torch.dtype, keys: torch.dtype) -> None:
    device = device_of(backend)
    check(
        rows(1, 50, 32, dtype=ring).to(device), torch.tensor(40, device=device),
        rows(2, 30, 32, dtype=keys).to(device), backend,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_row_is_stored_as_zeros(backend: str) -> None:
    device = device_of(backend)
    ring, keys = rows(1, 9, 8, dtype=F16).to(device), rows(2, 3, 8, dtype=F16).to(device)
    keys[1] = 0
    enqueue_(ring, torch.tensor(2, device=device), keys, backend=backend)
    assert torch.isfinite(ring).all()
    assert (ring[3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rings_and_keys(backend: str) -> None:
    device = device_of(backend)
    every_other = torch.stack([rows(1, 20, 6), rows(3, 20, 6)], dim=2).to(device)
    neighbour = every_other[:, :, 1].clone()
    check(every_other[:, :, 0], torch.tensor(15, device=device), rows(2, 6, 8).to(device).T, backend)
    assert torch.equal(every_other[:, :, 1], neighbour)
    part = rows(1, 40, 6).to(device)
    check(part[10:30], torch.tensor(15, device=device), rows(2, 8, 6).to(device), backend)
    assert torch.equal(part[30:], rows(1, 40, 6).to(device)[30:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_wraps_many_times(backend: str) -> None:
    device = device_of(backend)
    module = FeatureQueue(23, 4).to(device)
    ring, at = module.features.cpu().double().numpy().copy(), 0
    for step in range(12):
        keys = rows(step, 7, 4).to(device)
        module.enqueue_(keys, backend=backend)
        ring, at = oracle.enqueue(ring, at, keys.cpu().numpy())
    np.testing.assert_allclose(module.features.cpu().numpy(), ring, atol=1e-6)
    assert module.pointer.item() == at == 12 * 7 % 23


@pytest.mark.parametrize("backend", ["reference", "cpu", SLOW_TRITON])
def test_a_push_compiles_without_graph_breaks(backend: str) -> None:
    module = FeatureQueue(10, 4).to(device_of(backend))
    other = copy.deepcopy(module)

    def push(queue: FeatureQueue, keys: Tensor) -> Tensor:
        queue.enqueue_(keys * 2, backend=backend)
        return queue.features.sum()

    fast = torch.compile(push, backend="aot_eager", fullgraph=True)
    for step in range(4):
        keys = rows(step, 3, 4).to(module.features.device)
        torch.testing.assert_close(fast(other, keys), push(module, keys))
    assert torch.equal(module.features, other.features)
    assert module.pointer == other.pointer == 2


@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_the_operator_passes_opcheck(backend: str) -> None:
    device = device_of(backend)
    ring, pointer = rows(1, 9, 4).to(device), torch.tensor(7, device=device)
    for skip in (None, torch.zeros((), device=device)):
        torch.library.opcheck(queue._enqueue, (ring, pointer, rows(2, 5, 4).to(device), skip, backend))


@pytest.mark.parametrize("backend", ["cpu", TRITON])
def test_autograd_knows_that_the_ring_has_changed(backend: str) -> None:
    device = device_of(backend)
    ring, pointer = rows(1, 9, 4).to(device), torch.tensor(0, device=device)
    weight = torch.ones(9, 4, device=device, requires_grad=True)
    saved = (weight * ring).sum()
    enqueue_(ring, pointer, rows(2, 5, 4).to(device), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_ring_and_pointer_are_saved_with_a_model() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"queue": FeatureQueue(9, 4, dtype=BF16)})

    first, second = model(), model()
    first["queue"].enqueue_(rows(1, 5, 4))
    assert set(first.state_dict()) == {"queue.features", "queue.pointer"}
    second.load_state_dict(first.state_dict())
    assert second["queue"].pointer.item() == 5
    assert torch.equal(second["queue"].features, first["queue"].features)


def test_it_starts_as_random_unit_rows() -> None:
    torch.manual_seed(3)
    first = FeatureQueue(64, 16)
    torch.manual_seed(3)
    assert torch.equal(first.features, FeatureQueue(64, 16).features)
    torch.testing.assert_close(first.features.norm(dim=1), torch.ones(64))
    assert not torch.equal(first.features, FeatureQueue(64, 16).features)
    assert repr(first) == "FeatureQueue(size=64, dim=16, dtype=torch.float32)"


RING, POINTER, KEYS = torch.ones(5, 3), torch.tensor(1), torch.ones(2, 3)
with torch.inference_mode():
    INFERRED = torch.ones(5, 3)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "width": (lambda: enqueue_(RING, POINTER, KEYS[:, :2]), r"keys has shape \(2, 2\); it must be \[rows, 3\]"),
    "one key": (lambda: enqueue_(RING, POINTER, KEYS[0]), r"keys has shape \(3,\)"),
    "integers": (lambda: enqueue_(RING, POINTER, KEYS.int()), "keys is torch.int32"),
    "empty ring": (lambda: enqueue_(RING[:0], POINTER, KEYS), "at least one row"),
    "ring of inference mode": (lambda: enqueue_(INFERRED, POINTER, KEYS), "queue was made in torch.inference_mode"),
    "ring that trains": (lambda: enqueue_(RING.clone().requires_grad_(), POINTER, KEYS), "queue requires grad"),
    "pointer": (lambda: enqueue_(RING, 1, KEYS), "pointer is a int"),  # type: ignore[arg-type]
    "pointer dtype": (lambda: enqueue_(RING, POINTER.int(), KEYS), "0-d int64"),
    "pointer shape": (lambda: enqueue_(RING, POINTER[None], KEYS), "0-d int64"),
    "device": (lambda: enqueue_(RING, POINTER, KEYS.to("meta")), "keys is on meta"),
    "size": (lambda: FeatureQueue(0, 4), "size=0"),
    "dim": (lambda: FeatureQueue(4, 0), "dim=0"),
    "dtype": (lambda: FeatureQueue(4, 4, dtype=torch.int64), "floating"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named_and_writes_nothing(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert (RING == 1).all()
    assert POINTER.item() == 1


@pytest.mark.skipif(triton is None, reason="needs Triton")
@often_and_slow
def test_triton_cases_in_the_interpreter(cases: str) -> None:
    run_triton_cases(__file__, cases)
