"""Every launch of the library compiles for an H100, with its own specialisations, pointers and dtypes.

Triton's interpreter accepts code that the compiler refuses, for example a variable that is a pointer in one branch and
a number in the other. The kernel report compiles only a few cases.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrm.kernels import (
    EMA,
    FeatureQueue,
    ViewParameters,
    _sweep,
    augment_views,
    dispatch,
    info_nce,
    multi_tensor,
    prototype_cross_entropy,
    residual_info_nce,
    residual_loss,
)
from fastrm.kernels.dispatch import triton
from fastrm.optim import LARS, SGD, AdamW
from tests.interpreted import INTERPRETED

if triton is None or INTERPRETED:
    pytest.skip("needs Triton's compiler", allow_module_level=True)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class H100:
    """A stand-in for Triton's driver that reports an H100 and runs nothing."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 90

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Launches only compile their kernels; the fixture is the set of names of compiled kernels."""
    names: set[str] = set()
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.metadata.shared <= 227 * 1024
        names.add(self.__name__)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", H100())
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: None)
    monkeypatch.setattr(multi_tensor, "triton_problem", lambda device: None)
    monkeypatch.setattr(_sweep, "capacity", lambda device: (132, 9))
    return names


def rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Normally distributed rows [count, width]."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(dtype)


# Dtypes of queries and bank, width, number of queries, rows of the bank, keys of the batch or a queue, gradient,
# temperature as a tensor, and reduction.
@pytest.mark.parametrize(
    ("query", "bank", "width", "n", "size", "in_batch", "gradient", "in_memory", "reduction"),
    [
        pytest.param(F32, BF16, 128, 256, 65_536, False, True, True, "mean", marks=pytest.mark.slow),
        (BF16, BF16, 256, 1_100, 4_400, True, True, True, "mean"),
        (F32, F32, 100, 70, 500, False, True, False, "sum"),
        (F32, F32, 16, 1, 1, True, False, True, "none"),
        pytest.param(F16, F16, 512, 5, 7, False, True, True, "none", marks=pytest.mark.slow),
        pytest.param(BF16, BF16, 128, 1_100, 3_000, False, False, False, "mean", marks=pytest.mark.slow),
        pytest.param(F32, F32, 256, 70, 500, True, True, True, "none", marks=pytest.mark.slow),
    ],
)
def test_launches_of_the_losses_compile(
    query: torch.dtype, bank: torch.dtype, width: int, n: int, size: int, in_batch: bool, gradient: bool,
    in_memory: bool, reduction: str, compiled: set[str],
) -> None:  # fmt: skip
    q = rows(n, width, query).requires_grad_(gradient)
    key, same = rows(size if in_batch else n, width, bank if in_batch else query), rows(n, width, query)
    numbers: Any = {"temperature": torch.tensor(0.2) if in_memory else 0.2, "backend": "triton"}
    queue = None if in_batch else rows(size, width, bank)
    info_nce(q, key, queue, reduction=reduction, **numbers)
    if reduction == "mean":
        ring = () if queue is None else (queue, torch.tensor(0))
        numbers["residual_weight"] = torch.tensor(0.5) if in_memory else 0.5
        residual_info_nce(q, key, same, *ring, **numbers)
    else:
        residual_loss(q, same, reduction=reduction, backend="triton")
    assert compiled == {"sweep_kernel", "finish_kernel"} | ({"push_kernel"} if in_batch else set())


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    ("bank", "width", "n", "size", "in_batch"),
    [(BF16, 1024, 256, 65_536, False), (F32, 600, 70, 500, True), (torch.float8_e4m3fn, 128, 5, 70, False)],
)
def test_launches_of_the_losses_of_wide_rows_compile(
    bank: torch.dtype, width: int, n: int, size: int, in_batch: bool, gradient: bool, compiled: set[str]
) -> None:
    q = rows(n, width, F32).requires_grad_(gradient)
    key = rows(size if in_batch else n, width, F32)
    queue = None if in_batch else rows(size, width, bank)
    pointer = torch.tensor(0) if bank == BF16 else None
    residual_info_nce(q, key, rows(n, width, F32), queue, pointer, temperature=torch.tensor(0.2), backend="triton")
    assert compiled == {"push_kernel", "score_kernel", "average_kernel", "finish_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows_dtype", "prototypes", "width", "n", "pairs", "in_memory"),
    [(BF16, BF16, 256, 1_100, True, True), (F32, F32, 100, 1, False, False), (F16, F16, 512, 5, True, False)],
)
def test_launches_of_the_prototype_loss_compile(
    rows_dtype: torch.dtype, prototypes: torch.dtype, width: int, n: int, pairs: bool, in_memory: bool,
    compiled: set[str],
) -> None:  # fmt: skip
    student = rows(n, width, rows_dtype).requires_grad_()
    own = rows(300, width, prototypes).requires_grad_()
    temperature: Any = torch.tensor(0.04) if in_memory else 0.04
    index = torch.arange(n)
    loss, _ = prototype_cross_entropy(
        student, rows(n, width, rows_dtype), own, torch.zeros(300) if pairs else None, student_temperature=0.1,
        teacher_temperature=temperature, pairs=torch.stack([index, index], dim=1) if pairs else None,
        teacher_prototypes=own.detach().clone() if pairs else None, backend="triton",
    )  # fmt: skip
    loss.backward()
    assert compiled == {"sweep_kernel", "gather_kernel", "push_prototypes_kernel"}


def test_launches_of_the_queue_compile(compiled: set[str]) -> None:
    queue = FeatureQueue(500, 100, dtype=BF16)
    for skip in (None, torch.tensor(0.0)):
        queue.enqueue_(rows(7, 100, F32), skip=skip, backend="triton")
    assert compiled == {"push_kernel"}


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9)], ids=["number", "tensor"])
@pytest.mark.parametrize(
    ("teacher", "student", "shadow"),
    [(F32, F32, None), (F32, BF16, BF16), (F32, F16, F16), (BF16, BF16, None), (torch.float64, F32, None)],
)
def test_launches_of_the_teacher_compile(
    teacher: torch.dtype, student: torch.dtype, shadow: torch.dtype | None, momentum: Any, compiled: set[str]
) -> None:
    shadows = None if shadow is None else [torch.zeros(5000, dtype=shadow)]
    teachers, students = [torch.zeros(5000, dtype=teacher)], [torch.zeros(5000, dtype=student)]
    EMA(teachers, students, shadow=shadows, backend="triton").update_(momentum)
    assert compiled == {"_ema_kernel"}


@pytest.mark.parametrize(
    ("with_teacher", "scaled"),
    [(False, False), (True, True), *(pytest.param(t, not t, marks=pytest.mark.slow) for t in (False, True))],
)
@pytest.mark.parametrize(("kind", "dtype"), list(itertools.product([SGD, LARS, AdamW], [F32, BF16])))
def test_launches_of_the_optimizers_compile(
    kind: Any, dtype: torch.dtype, with_teacher: bool, scaled: bool, compiled: set[str]
) -> None:
    parameters = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((50, 100), (7,))]
    teacher = {"teacher": [p.detach().float() for p in parameters], "ema_momentum": torch.tensor(0.9)}
    optimizer = kind(parameters, lr=0.1, backend="triton", **(teacher if with_teacher else {}))
    for p in parameters:
        p.grad = torch.zeros_like(p)
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.step()
    want = {LARS: {"_norms_kernel", "_momentum_kernel"}, SGD: {"_momentum_kernel"}, AdamW: {"_adamw_kernel"}}
    assert compiled == want[kind]


@pytest.mark.parametrize(
    ("side", "whole", "bands", "channels", "planar", "dtype"),
    [
        (16, None, 1, 1, False, BF16),
        pytest.param(224, None, 3, 3, False, BF16, marks=pytest.mark.slow),
        pytest.param(96, 70, 3, 3, True, F32, marks=pytest.mark.slow),
        pytest.param(33, 28, 1, 3, True, F16, marks=pytest.mark.slow),
        pytest.param(40, 40, 5, 5, False, F32, marks=pytest.mark.slow),
        pytest.param(65, None, 2, 2, True, BF16, marks=pytest.mark.slow),
    ],
)
def test_launches_of_the_views_compile(
    side: int, whole: int | None, bands: int, channels: int, planar: bool, dtype: torch.dtype, compiled: set[str]
) -> None:
    pixels = whole or side
    images = torch.zeros(4, bands, pixels, pixels, dtype=torch.uint8)
    images = images.permute(0, 2, 3, 1) if planar else images.view(4, pixels, pixels, bands)
    drawn = ViewParameters(
        factors=torch.ones(4, 4) / 4,
        sigma=torch.tensor([0.0, 1.0, 0.0, 1.0]),
        jitter=torch.tensor([True, True, False, False]),
        box=torch.tensor([[0, 0, pixels, pixels]] * 4) if whole else None,
    )
    augment_views(
        images, drawn, out_size=side, dtype=dtype, mean=[0.5] * channels, std=[0.5] * channels, blur_radius=2,
        interpolation="bicubic", backend="triton",
    )  # fmt: skip
    summed = side > 64 or bands not in (1, 3)
    assert compiled == {"view_kernel"} | ({"gray_kernel"} if summed else set())
