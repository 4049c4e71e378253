"""Schedules, parameter groups and LARS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastrm.config import build, resolved
from fastrm.optim import LARS, AdamW, Schedule, build_optimizer


def schedule(**leaves: object) -> Schedule:
    return Schedule(resolved(build(**{"data": "digits", "batch_size": 512, **leaves}), 1), steps_per_epoch=10)


def test_learning_rate_warms_up_and_follows_a_half_cosine() -> None:
    plan = schedule(epochs=20, warmup_epochs=5.0, lr=0.3, warmup_start_lr=0.01)
    rates = [plan.lr(step) for step in range(plan.total)]
    peak = 0.3 * 512 / 256
    np.testing.assert_allclose(rates[0], 0.02)
    np.testing.assert_allclose(rates[25], (0.01 + 0.29 / 2) * 2)
    np.testing.assert_allclose(rates[50], peak)
    np.testing.assert_allclose(rates[125], peak / 2)  # half of what follows the warm-up
    assert max(rates) == rates[50]
    assert rates[-1] < 1e-3 * peak


def test_teacher_momentum_goes_from_its_start_to_its_end() -> None:
    plan = schedule(epochs=4, teacher_momentum=0.9, teacher_momentum_end=1.0)
    values = [plan.teacher_momentum(step) for step in (0, 10, 20, 40)]
    # 1 - 0.1 * (1 + cos(pi * share)) / 2
    np.testing.assert_allclose(values, [0.9, 1 - 0.05 * (1 + np.sqrt(0.5)), 0.95, 1.0])
    constant = schedule(epochs=4, teacher_momentum=0.999, teacher_momentum_end=0.999)
    assert {constant.teacher_momentum(step) for step in range(40)} == {0.999}


def test_residual_weight_warms_up() -> None:
    plan = schedule(epochs=4, residual_weight=0.5, residual_warmup_epochs=2.0)
    np.testing.assert_allclose([plan.residual_weight(s) for s in (0, 10, 20, 30)], [0, 0.25, 0.5, 0.5])
    assert schedule(epochs=4, residual_weight=0.5).residual_weight(0) == 0.5


def test_max_steps_stops_early_and_leaves_the_schedules() -> None:
    whole, cut = schedule(epochs=4), schedule(epochs=4, max_steps=7)
    assert (whole.total, cut.total) == (40, 7)
    assert [whole.lr(s) for s in range(7)] == [cut.lr(s) for s in range(7)]


def test_lars_against_its_formula() -> None:
    """Weights, a bias and a scalar over five steps, against float64 NumPy."""
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (5, 2, 3, 3), (6,), ()]
    params = [nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=torch.float32)) for shape in shapes]
    want = [p.detach().double().numpy().copy() for p in params]
    buffers = [np.zeros_like(w) for w in want]
    optimizer = LARS(params, lr=0.3, momentum=0.9, weight_decay=0.01, trust_coefficient=0.02)
    for _ in range(5):
        for i, param in enumerate(params):
            gradient = rng.normal(size=shapes[i])
            param.grad = torch.tensor(gradient, dtype=torch.float32)
            update = gradient
            if len(shapes[i]) > 1:
                update = update + 0.01 * want[i]
                update = update * 0.02 * np.linalg.norm(want[i].ravel()) / np.linalg.norm(update.ravel())
            buffers[i] = 0.9 * buffers[i] + update
            want[i] = want[i] - 0.3 * buffers[i]
        optimizer.step()
        for param, expected in zip(params, want, strict=True):
            np.testing.assert_allclose(param.detach().numpy(), expected, rtol=2e-5, atol=2e-6)


def test_lars_of_a_zero_weight_or_gradient_is_not_scaled() -> None:
    zero, still, absent = (nn.Parameter(torch.full((2, 2), v)) for v in (0.0, 1.0, 1.0))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still, absent], lr=0.5, trust_coefficient=0.001).step()
    assert (zero == -0.5).all()
    assert (still == 1).all()
    assert (absent == 1).all()


def test_lars_state_round_trip() -> None:
    def run(reload_after: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(3, 3))
        optimizer = LARS([param], lr=0.1)
        for step in range(4):
            if step == reload_after:
                state = optimizer.state_dict()
                optimizer = LARS([param], lr=0.1)
                optimizer.load_state_dict(state)
            param.grad = torch.full((3, 3), float(step + 1))
            optimizer.step()
        return param.detach()

    assert torch.equal(run(None), run(2))


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient"])
def test_lars_refuses_what_is_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-1"):
        LARS([nn.Parameter(torch.ones(1))], **{"lr": 0.1, name: -1})


def test_parameter_groups() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).requires_grad_(False))
    adamw = build_optimizer(module, build(data="x", optimizer="adamw", weight_decay=0.1).optim)
    assert isinstance(adamw, AdamW)
    assert [(g["weight_decay"], len(g["params"])) for g in adamw.param_groups] == [(0.1, 1), (0.0, 3)]
    sgd = build_optimizer(module, build(data="x", optimizer="sgd", weight_decay=0.1).optim)
    assert [(g["weight_decay"], g["momentum"], len(g["params"])) for g in sgd.param_groups] == [(0.1, 0.9, 4)]
    lars = build_optimizer(module, build(data="x", optimizer="lars", trust_coefficient=0.02).optim)
    assert [(g["trust_coefficient"], len(g["params"])) for g in lars.param_groups] == [(0.02, 4)]
