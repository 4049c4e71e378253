"""Schedules of learning rate, teacher momentum and residual weight, and parameter groups."""

from __future__ import annotations

import numpy as np
import pytest

from fastrm.errors import UsageError
from fastrm.methods import build_method
from fastrm.optim import Schedule, build_optimizer
from fastrm.settings.config import build, resolved


def schedule(**leaves: object) -> Schedule:
    """A schedule of 10 steps per epoch with a batch size of 512."""
    config = resolved(build(**{"data": "digits", "batch_size": 512, **leaves}), 1)
    return Schedule(config.optim, config.method, 512, steps_per_epoch=10)


def test_learning_rate_warms_up_and_follows_a_half_cosine() -> None:
    plan = schedule(epochs=20, warmup_epochs=5.0, lr=0.3, warmup_start_lr=0.01)
    rates = [plan.lr(step) for step in range(plan.total)]
    peak = 0.3 * 512 / 256
    np.testing.assert_allclose(rates[0], 0.02)
    np.testing.assert_allclose(rates[25], (0.01 + 0.29 / 2) * 2)
    np.testing.assert_allclose(rates[50], peak)
    np.testing.assert_allclose(rates[125], peak / 2)  # half of the steps after the warm-up
    assert max(rates) == rates[50]
    assert rates[-1] < 1e-3 * peak


def test_teacher_momentum_follows_a_half_cosine() -> None:
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


def test_max_steps_stops_early_and_does_not_change_the_schedules() -> None:
    whole, cut = schedule(epochs=4), schedule(epochs=4, max_steps=7)
    assert (whole.total, cut.total) == (40, 7)
    assert [whole.lr(s) for s in range(7)] == [cut.lr(s) for s in range(7)]


def test_parameter_groups_and_weight_decay() -> None:
    small = {"arch": "test_vit", "image_size": 48, "hidden_dim": 8, "output_dim": 4, "predictor_hidden_dim": 8}
    method = build_method(build(data="x", weight_decay=0.1, **small))
    trained = {p: n for n, p in method.named_parameters() if p.requires_grad}
    assert not any("teacher" in name or "pos_embed" in name or "patch_embed" in name for name in trained.values())
    for kind, decays in (("sgd", [0.1]), ("lars", [0.1]), ("adamw", [0.1, 0.0])):
        optimizer = build_optimizer(method, build(data="x", optimizer=kind, weight_decay=0.1).optim)
        assert [group["weight_decay"] for group in optimizer.param_groups] == decays
        assert {p for group in optimizer.param_groups for p in group["params"]} == trained.keys()
    wide, narrow = (group["params"] for group in optimizer.param_groups)
    assert min(p.ndim for p in wide) == 2
    assert max(p.ndim for p in narrow) == 1
    with pytest.raises(UsageError, match="--optimizer lamb"):
        build_optimizer(method, build(data="x", optimizer="lamb").optim)
