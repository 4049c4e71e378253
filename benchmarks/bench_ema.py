"""The teacher update compared with foreach, torch's AveragedModel, timm, lightly, ema-pytorch and apex.

pytest benchmarks/bench_ema.py --benchmark-only
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks._timing import DEVICE, Row, compare, tensors
from fastrm.kernels import EMA, _ema_kernel, dispatch, fused_ema_, multi_tensor

M = 0.99
CASES = [(network, dtype) for network in ("ResNet-50", "ViT-B") for dtype in (torch.float32, torch.bfloat16)]
Contender = tuple[list[Tensor], Callable[[], object]]


class Holder(nn.Module):
    """A module that only holds parameters."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterList(nn.Parameter(p.clone(), requires_grad=False) for p in parameters)


def contenders(
    network: str, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], dict[str, Callable[[], Contender]]]:
    """Initial teacher and student, and by name the functions that make a contender's teacher and its update."""
    teacher, student = tensors(network, seed=0), tensors(network, dtype, seed=1)
    module = Holder(student)
    # All contenders that take a list share one teacher, because its place in memory changes the time by up to a sixth.
    mine = [t.clone() for t in teacher]

    def on_list(update: Callable[[list[Tensor]], Callable[[], object]]) -> Callable[[], Contender]:
        def make() -> Contender:
            torch._foreach_copy_(mine, teacher)
            return mine, update(mine)

        return make

    def foreach(mine: list[Tensor]) -> Callable[[], object]:
        if dtype == torch.float32:
            return lambda: torch._foreach_lerp_(mine, student, 1 - M)
        return lambda: torch._foreach_lerp_(mine, [s.float() for s in student], 1 - M)

    def averaged() -> Contender:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        model = AveragedModel(Holder(teacher), multi_avg_fn=get_ema_multi_avg_fn(M))
        model.n_averaged.fill_(1)
        return list(model.parameters()), lambda: model.update_parameters(module)

    def timm() -> Contender:
        model = importlib.import_module("timm.utils").ModelEmaV3(Holder(teacher), decay=M)
        return list(model.module.parameters()), lambda: model.update(module)

    def lightly() -> Contender:
        mine = Holder(teacher)
        update = importlib.import_module("lightly.models.utils").update_momentum
        return list(mine.parameters()), lambda: update(module, mine, M)

    def ema_pytorch() -> Contender:
        start = Holder(teacher).requires_grad_(True)
        model = importlib.import_module("ema_pytorch").EMA(start, include_online_model=False, use_foreach=True)
        current = Holder(student).requires_grad_(True)
        return list(model.ema_model.parameters()), lambda: model.update_moving_average(model.ema_model, current, M)

    def apex(mine: list[Tensor]) -> Callable[[], object]:
        axpby = importlib.import_module("amp_C").multi_tensor_axpby
        apply = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        overflow = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        return lambda: apply(axpby, overflow, [mine, student, mine], M, 1 - M, -1)

    def prepared(mine: list[Tensor]) -> Callable[[], object]:
        update = EMA(mine, student)
        return lambda: update.update_(M)

    return teacher, student, {
        "fused_ema_": on_list(lambda mine: lambda: fused_ema_(mine, student, M)),
        "EMA.update_": on_list(prepared),
        "_foreach_lerp_" if dtype == torch.float32 else "convert, _foreach_lerp_": on_list(foreach),
        "torch AveragedModel": averaged,
        "timm ModelEmaV3": timm,
        "lightly update_momentum": lightly,
        "ema-pytorch": ema_pytorch,
        "apex multi_tensor_axpby": on_list(apex),
    }  # fmt: skip


def measure(network: str, dtype: torch.dtype, note: Callable[[str], None]) -> list[Row]:
    """Time the contenders that are installed and give correct results."""
    teacher, student, makers = contenders(network, dtype)
    ready: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        try:
            mine, call = make()
            call()
        except (ImportError, RuntimeError, TypeError) as error:  # absent, or not made for mixed dtypes
            note(f"{name} cannot: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        for t, old, s in zip(mine, teacher, student, strict=True):
            want = (M * old.double() + (1 - M) * s.double()).float()
            torch.testing.assert_close(t.detach(), want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        ready[name] = call
    moved = sum(t.numel() for t in teacher) * (8 + dtype.itemsize)
    return compare(f"teacher, {network}, {str(dtype)[6:]} student", ready, moved, rounds=31)


@pytest.mark.parametrize(("network", "dtype"), CASES)
def test_update(network: str, dtype: torch.dtype, enter_rows: Any, note: Any) -> None:
    if DEVICE.type == "cpu" and network == "ViT-B":
        pytest.skip("the CPU shows the same on ResNet-50, in a third of the time")
    enter_rows(measure(network, dtype, note))


def host_seconds() -> dict[str, list[float]]:
    """Host time of repeated calls for ResNet-50's list without the launch, and of reading all addresses once."""
    teacher, student = tensors("ResNet-50", seed=0), tensors("ResNet-50", seed=1)

    class NoLaunch:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: None

    def repeated(call: Callable[[], object]) -> list[float]:
        call()
        times = []
        for _ in range(50):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return times

    anywhere = {"triton_problem": lambda device: None}
    with (
        mock.patch.multiple(dispatch, **anywhere),
        mock.patch.multiple(multi_tensor, **anywhere),
        mock.patch.object(_ema_kernel, "_ema_kernel", NoLaunch()),
    ):
        prepared = EMA(teacher, student, backend="triton")
        modules = Holder(teacher), Holder(student)
        return {
            "fused_ema_ of modules": repeated(lambda: fused_ema_(*modules, M, backend="triton")),
            "names of modules": repeated(lambda: [dict(module.named_parameters()) for module in modules]),
            "fused_ema_": repeated(lambda: fused_ema_(teacher, student, M, backend="triton")),
            "EMA.update_": repeated(lambda: prepared.update_(M)),
            "addresses": repeated(lambda: [*map(Tensor.data_ptr, [*teacher, *student])]),
        }


def test_host_cost_of_a_repeated_call(enter: Any) -> None:
    if dispatch.triton is None:
        pytest.skip("needs Triton")
    enter("host time of a repeated call, launch left out", host_seconds())
