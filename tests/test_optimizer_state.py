"""States of other optimizers: training continues exactly from them, or they are refused with the name of the
difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrm.optim import LARS, SGD, AdamW

timm_optim = pytest.importorskip("timm.optim")


def parameters() -> list[nn.Parameter]:
    """Two parameters with random numbers."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 2), (4,))]


def stepped(optimizer: Any, seed: int = 1) -> Any:
    """Make one step with random gradients, and return the optimizer."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return optimizer


Make = Callable[[list[nn.Parameter]], Any]
CONTINUED: dict[str, tuple[Make, Make]] = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: SGD(p)),
    "SGD without momentum": (lambda p: torch.optim.SGD(p, 0.1), lambda p: SGD(p)),
    "SGD foreach": (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True, foreach=True), lambda p: SGD(p)),
    "AdamW": (lambda p: torch.optim.AdamW(p, 0.1), lambda p: AdamW(p)),
    "AdamW fused": (lambda p: torch.optim.AdamW(p, torch.tensor(0.1), fused=True), lambda p: AdamW(p)),
    "Adam without decay": (lambda p: torch.optim.Adam(p, 0.1), lambda p: AdamW(p, weight_decay=0.3)),
    "named": (lambda p: torch.optim.SGD([("a", p[0]), ("b", p[1])], 0.1, 0.9), lambda p: SGD(p)),
    "own groups": (
        lambda p: torch.optim.SGD([{"params": p, "name": "all"}], 0.1),
        lambda p: SGD([{"params": p, "name": "mine"}]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTINUED)
def test_training_continues_exactly_from_the_state_of_torch(name: str) -> None:
    theirs, ours = CONTINUED[name]
    params = parameters()
    rival = stepped(theirs(params))
    mine = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = ours(mine)
    optimizer.load_state_dict(copy.deepcopy(rival.state_dict()))
    for seed in (2, 3):
        stepped(rival, seed)
        stepped(optimizer, seed)
        torch.testing.assert_close(mine, params, rtol=2e-5, atol=2e-6)


def test_entries_of_a_scheduler_are_accepted() -> None:
    params = parameters()
    rival = torch.optim.SGD(params, 0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(rival, 0.3, total_steps=5)
    optimizer = SGD(parameters())
    optimizer.load_state_dict(stepped(rival).state_dict())
    assert optimizer.param_groups[0]["lr"] == rival.param_groups[0]["lr"]


REFUSED: dict[str, tuple[Make, Make, str]] = {
    "SGD maximize": (lambda p: torch.optim.SGD(p, 0.1, maximize=True), lambda p: SGD(p), "maximize=True"),
    "SGD differentiable": (lambda p: torch.optim.SGD(p, differentiable=True), lambda p: SGD(p), "differentiable=True"),
    "AdamW maximize": (lambda p: torch.optim.AdamW(p, maximize=True), lambda p: AdamW(p), "maximize=True"),
    "AdamW amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), lambda p: AdamW(p), "amsgrad=True"),
    "Adam": (lambda p: torch.optim.Adam(p, weight_decay=0.1), lambda p: AdamW(p), r"weight_decay=0\.1 .*\(Adam's\)"),
    "NAdam": (lambda p: torch.optim.NAdam(p), lambda p: AdamW(p), "'amsgrad'"),
    "NAdam decoupled": (lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True), lambda p: AdamW(p), "'amsgrad'"),
    "RAdam": (lambda p: torch.optim.RAdam(p), lambda p: AdamW(p), "'amsgrad'"),
    "Adamax": (lambda p: torch.optim.Adamax(p), lambda p: AdamW(p), "'amsgrad'"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p), lambda p: AdamW(p), "'amsgrad'"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, momentum=0.9), lambda p: SGD(p), "'dampening'"),
    "Rprop": (lambda p: torch.optim.Rprop(p), lambda p: SGD(p), "'dampening'"),
    "SGD into LARS": (lambda p: torch.optim.SGD(p), lambda p: LARS(p, 0.1), "'trust_coefficient'"),
    "LARS into SGD": (lambda p: LARS(p, 0.1), lambda p: SGD(p), "'dampening'"),
    "SGD into AdamW": (lambda p: SGD(p), lambda p: AdamW(p), "'betas'"),
    "timm's Lars": (lambda p: timm_optim.Lars(p), lambda p: LARS(p, 0.1), "'trust_coefficient'"),
    "timm's Lars into SGD": (lambda p: timm_optim.Lars(p), lambda p: SGD(p), "always_adapt=False"),
    "timm's Lion": (lambda p: timm_optim.Lion(p), lambda p: AdamW(p), "'amsgrad'"),
    "timm's SGDP": (lambda p: timm_optim.SGDP(p, lr=0.1), lambda p: SGD(p), "caution=False"),
    "timm's NAdamW": (lambda p: timm_optim.NAdamW(p), lambda p: AdamW(p), "'amsgrad'"),
    "timm's LAMB": (lambda p: timm_optim.Lamb(p), lambda p: AdamW(p), "'amsgrad'"),
    "an option of one's own": (
        lambda p: torch.optim.SGD([{"params": p, "lr_scale": 2}]), lambda p: SGD(p), "lr_scale=2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_state_of_another_rule_is_refused_by_name(name: str) -> None:
    theirs, ours, message = REFUSED[name]
    rival = theirs(parameters())
    state = (rival if name == "SGD differentiable" else stepped(rival)).state_dict()
    optimizer = stepped(ours(parameters()))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rf"{type(optimizer).__name__}\.load_state_dict: param_groups\[0\].*{message}"):
        optimizer.load_state_dict(state)
    assert str(optimizer.state_dict()) == str(before)


def test_a_damaged_state_is_refused() -> None:
    def damaged(kind: Any, change: Callable[[dict[str, Any]], object]) -> None:
        state = copy.deepcopy(stepped(kind(parameters(), lr=0.1)).state_dict())
        change(state)
        kind(parameters(), lr=0.1).load_state_dict(state)

    for kind, change, message in (
        (AdamW, lambda s: s["state"][0].pop("exp_avg_sq"), r"state\[0\] has no 'exp_avg_sq'"),
        (AdamW, lambda s: s["state"][1].update(exp_avg=torch.zeros(5)), r"\['exp_avg'\] has shape \(5,\).*\(4,\)"),
        (AdamW, lambda s: s["state"][1].update(step=None), r"\['step'\] is None"),
        (AdamW, lambda s: s["state"][1].update(mu_product=torch.ones(())), "'mu_product'"),
        (AdamW, lambda s: s["state"].update({9: {}}), r"state\[9\] is for a parameter"),
        (AdamW, lambda s: s["param_groups"][0].pop("eps"), r"param_groups\[0\] has no 'eps'"),
        (AdamW, lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)), r"betas\[1\]=1\.0"),
        (LARS, lambda s: s["state"][0].update(momentum_buffer=torch.zeros(2, 3)), r"has shape \(2, 3\)"),
        (LARS, lambda s: s["state"][0].update(mu=torch.zeros(3, 2)), "'mu'"),
        (LARS, lambda s: s["param_groups"][0].update(lr=-1.0), r"lr=-1\.0"),
        (LARS, lambda s: s["param_groups"][0].update(ema_momentum=2), "ema_momentum=2"),
    ):
        with pytest.raises(ValueError, match=message):
            damaged(kind, change)
    with pytest.raises(TypeError, match=r"momentum_buffer.* is a NoneType"):
        damaged(LARS, lambda s: s["state"][0].update(momentum_buffer=None))


def test_a_state_without_a_teacher_keeps_the_teacher_momentum() -> None:
    teacher = [torch.zeros(3, 2), torch.zeros(4)]
    optimizer = LARS(parameters(), 0.1, teacher=teacher, ema_momentum=0.5)
    optimizer.load_state_dict(stepped(LARS(parameters(), 0.1)).state_dict())
    assert optimizer.ema_momentum == 0.5
    stepped(optimizer)
    torch.testing.assert_close(teacher, [p.detach() / 2 for p in optimizer.param_groups[0]["params"]])


@pytest.mark.parametrize("kind", [LARS, SGD, AdamW])
def test_empty_groups_are_allowed(kind: Any) -> None:
    param = parameters()[0]
    optimizer = stepped(
        kind([{"params": []}, {"params": [param]}], lr=0.1, teacher=[torch.zeros(3, 2)], ema_momentum=0.5)
    )
    assert not torch.equal(param, parameters()[0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert stepped(kind([{"params": []}, {"params": iter([])}], lr=0.1)).state == {}
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match="empty parameter list"):  # torch raises this
            kind(empty, lr=0.1)


@pytest.mark.parametrize("kind", [LARS, SGD, AdamW])
def test_groups_on_several_devices_are_allowed_without_a_backend(kind: Any) -> None:
    here, meta = parameters()[0], nn.Parameter(torch.ones(3, device="meta"))
    alone = parameters()[0]
    for params in ([alone], [meta, here]):
        optimizer = kind([{"params": [p]} for p in params], lr=torch.tensor(0.1))
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(here, alone)
    with pytest.raises(ValueError, match="backend='cpu' cannot run"):
        kind([{"params": [p]} for p in (here, meta)], lr=0.1, backend="cpu")


def test_step_counts_may_be_numbers() -> None:
    params = parameters()
    optimizer = stepped(AdamW(params))
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["step"] = int(values["step"])  # as torch 1.11 stored them
    other: list[Tensor] = [nn.Parameter(p.detach().clone()) for p in params]
    twin = AdamW(other)
    twin.load_state_dict(state)
    stepped(optimizer, 2)
    stepped(twin, 2)
    torch.testing.assert_close(other, params, rtol=0, atol=0)
