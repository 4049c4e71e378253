"""Optimizer steps that include the teacher update, compared with the usual step followed by a foreach average.

pytest benchmarks/bench_optim.py --benchmark-only
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._timing import DEVICE, Row, compare, tensors
from fastrm.optim import LARS, SGD, AdamW

M = 0.99
CASES = [(network, rule) for network in ("ResNet-50", "ViT-B") for rule in ("lars", "sgd", "adamw")]
FLOOR = {"lars": 36, "sgd": 28, "adamw": 36}  # bytes per float32 parameter, including the teacher


def per_parameter_lars(params: list[Tensor]) -> Callable[[], object]:
    """The Python loop over parameters that most code bases have."""
    buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step() -> None:
        for p, mu in zip(params, buffers, strict=True):
            update = p.grad
            assert update is not None
            if p.ndim > 1:
                update = update.add(p, alpha=1e-6)
                p_norm, u_norm = torch.norm(p), torch.norm(update)
                one = torch.ones_like(p_norm)
                ratio = torch.where(p_norm > 0, torch.where(u_norm > 0, 0.001 * p_norm / u_norm, one), one)
                update = update.mul(ratio)
            mu.mul_(0.9).add_(update)
            p.add_(mu, alpha=-0.1)

    return step


def timm_lars(params: list[Tensor]) -> Callable[[], object]:
    wide, narrow = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    rule = importlib.import_module("timm.optim").Lars
    groups = [{"params": wide, "weight_decay": 1e-6}, {"params": narrow, "weight_decay": 0.0}]
    return rule(groups, lr=0.1, momentum=0.9).step


def apex_sgd(params: list[Tensor]) -> Callable[[], object]:
    return importlib.import_module("apex.optimizers").FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4).step


SGD_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
ADAMW_OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
OURS: dict[str, Any] = {
    "lars": lambda params, **teacher: LARS(params, 0.1, weight_decay=1e-6, **teacher),
    "sgd": lambda params, **teacher: SGD(params, **SGD_OPTIONS, **teacher),
    "adamw": lambda params, **teacher: AdamW(params, **ADAMW_OPTIONS, **teacher),
}
RIVALS: dict[str, dict[str, Callable[[list[Tensor]], Callable[[], object]]]] = {
    "lars": {"loop": per_parameter_lars, "timm Lars": timm_lars},
    "sgd": {
        "torch SGD foreach": lambda params: torch.optim.SGD(params, **SGD_OPTIONS, foreach=True).step,
        "torch SGD fused": lambda params: torch.optim.SGD(params, **SGD_OPTIONS, fused=True).step,
        "apex FusedSGD": apex_sgd,
    },
    "adamw": {
        "torch AdamW foreach": lambda params: torch.optim.AdamW(params, **ADAMW_OPTIONS, foreach=True).step,
        "torch AdamW fused": lambda params: torch.optim.AdamW(params, **ADAMW_OPTIONS, fused=True).step,
    },
}


def apex_adam_swa(params: list[Tensor], teacher: list[Tensor]) -> Callable[[], object]:
    """apex's Triton kernel for Adam, a copy of the parameters (here the parameters themselves) and the average."""
    if DEVICE.type != "cuda":
        raise ImportError("its kernel needs a GPU")
    module = importlib.import_module("apex.contrib.openfold_triton.fused_adam_swa")
    options = {**ADAMW_OPTIONS, "adam_math_mode": module.AdamMathType.ApexAdamW, "swa_decay_rate": M}
    optimizer = module.FusedAdamSWA(params, params, teacher, **options)
    optimizer.swa_param_groups[0]["n_averaged"] = 1  # otherwise the first step copies
    return optimizer.step


# Rivals whose step also updates the teacher.
INSIDE: dict[str, dict[str, Callable[[list[Tensor], list[Tensor]], Callable[[], object]]]] = {
    "adamw": {"apex FusedAdamSWA, teacher inside": apex_adam_swa}
}


def measure(network: str, rule: str, note: Callable[[str], None]) -> list[Row]:
    """Time the contenders that are installed and match the first one's parameters and teacher over two steps."""
    start, gradients = tensors(network, seed=0), tensors(network, seed=1)

    def tensors_of_one() -> tuple[list[Tensor], list[Tensor]]:
        params = [p.clone().requires_grad_() for p in start]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        return params, [p.clone() for p in start]

    def then_averaged(
        kind: Callable[[list[Tensor]], Callable[[], object]], params: list[Tensor], teacher: list[Tensor]
    ) -> Callable[[], object]:
        step = kind(params)

        def both() -> None:
            step()
            with torch.no_grad():
                torch._foreach_lerp_(teacher, params, 1 - M)

        return both

    params, teacher = tensors_of_one()
    ours = OURS[rule](params, teacher=teacher, ema_momentum=M).step
    for _ in range(2):
        ours()
    want = [p.detach().clone() for p in (*params, *teacher)]
    ready: dict[str, Callable[[], object]] = {f"fastrm {rule}, teacher inside": ours}
    outside = {**RIVALS[rule], f"fastrm {rule}": lambda params: OURS[rule](params).step}
    makers = {f"{name}, then _foreach_lerp_": partial(then_averaged, kind) for name, kind in outside.items()}
    for name, make in (INSIDE.get(rule, {}) | makers).items():
        params, teacher = tensors_of_one()
        try:
            step = make(params, teacher)
            for _ in range(2):
                step()
        except Exception as error:  # not installed, or not compatible with this Triton; reported in either case
            note(f"{name} cannot: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        for got, expected in zip((*params, *teacher), want, strict=True):
            torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-5, msg=f"{name} is different")
        ready[name] = step
    moved = sum(p.numel() for p in start) * FLOOR[rule]
    return compare(f"{network} {rule}", ready, moved, rounds=15 if DEVICE.type == "cuda" else 7)


@pytest.mark.parametrize(("network", "rule"), CASES)
def test_step(network: str, rule: str, enter_rows: Any, note: Any) -> None:
    if DEVICE.type == "cpu" and network == "ViT-B":
        pytest.skip("the CPU shows the same on ResNet-50, in a third of the time")
    enter_rows(measure(network, rule, note))
