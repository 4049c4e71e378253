"""DINO: one step against the published loss in float64, its schedules, its frozen first epoch, and resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import Tensor
from torch.nn import functional as F

from fastrm import train
from fastrm.data import Batch
from fastrm.errors import UsageError
from fastrm.methods import DINO, build_method
from fastrm.methods.dino import pairs_of
from fastrm.methods.verify import verify
from fastrm.optim import Schedule, build_optimizer
from fastrm.optim.schedules import Rates
from fastrm.run.step import Step
from fastrm.settings.config import Config, build
from tests.test_train import assert_as_uninterrupted

SMALL: dict[str, Any] = {
    "data": "digits", "method": "dino", "arch": "test_resnet", "image_size": 32, "hidden_dim": 24, "output_dim": 8,
    "prototypes": 21, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.04, "weight_decay_end": 0.4,
    "clip_norm": 0.05, "clip_each": True, "batch_size": 16,
}  # fmt: skip


def made(**leaves: Any) -> tuple[Any, Config]:
    """A method with small settings whose teacher and centre differ from the student's, and its settings."""
    torch.manual_seed(0)
    config = build(**{**SMALL, **leaves})
    method = build_method(config)
    with torch.no_grad():
        for parameter in method.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        method.center.normal_()
    return method, config


def views() -> list[Tensor]:
    """Two views [4, 3, 32, 32] and three views [4, 3, 16, 16]."""
    return [torch.randn(4, 3, side, side) for side in (32, 32, 16, 16, 16)]


def published(method: Any, ours: list[Tensor], theirs: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """The published loss in float64 from all logits, view by view, and the mean logits of the teacher [K]."""

    def weight(last: Any) -> Tensor:
        return F.normalize(last.directions.double(), dim=1) * (1 if last.norms is None else last.norms)

    student = [F.normalize(x, dim=1) @ weight(method.student.prototypes).T / 0.1 for x in ours]
    logits = [F.normalize(x, dim=1) @ weight(method.teacher.prototypes).T for x in theirs]
    targets = [((x - method.center.double()) / temperature).softmax(1).detach() for x in logits]
    terms = [
        -(target * s.log_softmax(1)).sum(1).mean()
        for t, target in enumerate(targets)
        for v, s in enumerate(student)
        if v != t
    ]
    return torch.stack(terms).mean(), torch.cat(logits).mean(0).detach()


@pytest.mark.parametrize("leaves", [{"residual_weight": 0.0}, {"residual_weight": 0.5, "norm_prototypes": False}])
def test_loss_gradient_and_centre_equal_the_publication(leaves: dict[str, Any]) -> None:
    method, _ = made(**leaves)
    method.set_rates(Rates(0.0, 0.5, 1.0, teacher_temperature=0.06))
    given = views()
    students, teachers = method.encode(given, measure=False)
    weight = torch.tensor(leaves["residual_weight"])
    inputs = [s.output for s in students]
    for x in inputs:
        x.retain_grad()
    prototypes = list(method.student.prototypes.parameters())
    output = method.losses(students, teachers, weight, True)
    output.loss.backward(inputs=[*inputs, *prototypes])

    ours = [x.detach().double().requires_grad_() for x in inputs]
    theirs = [t.output.double() for t in teachers if t is not None]
    assert len(theirs) == 2
    want, mean = published(method, ours, theirs, 0.06)
    term = torch.stack([(2 - 2 * F.cosine_similarity(ours[v], theirs[v])).mean() for v in (0, 1)]).mean()
    total = want + leaves["residual_weight"] * term
    found = torch.autograd.grad(total, [*ours, *prototypes])
    np.testing.assert_allclose(output.contrastive.item(), want.item(), rtol=1e-5)
    np.testing.assert_allclose(output.loss.item(), total.item(), rtol=1e-5)
    np.testing.assert_allclose(output.residual.item(), term.item(), rtol=1e-4)
    for x, gradient in zip([*inputs, *prototypes], found, strict=True):
        torch.testing.assert_close(x.grad.double(), gradient.double(), rtol=1e-3, atol=1e-6)

    center = method.center.clone()
    method.push(output.keys, skip=torch.tensor(1.0))
    assert torch.equal(method.center, center)
    method.push(output.keys)
    torch.testing.assert_close(method.center.double(), 0.9 * center.double() + 0.1 * mean, rtol=1e-4, atol=1e-6)


def test_pairs_join_rows_of_the_same_image() -> None:
    pairs = pairs_of(3, 2, 2, torch.device("cpu")).tolist()
    assert pairs == [[0, 2], [1, 3], [2, 0], [3, 1], [4, 0], [5, 1], [4, 2], [5, 3]]


def test_schedules_equal_the_publication() -> None:
    config = build(
        **{**SMALL, "epochs": 10, "lr": 0.5, "min_lr": 1e-3, "warmup_epochs": 0.0, "freeze_prototypes_epochs": 1.5},
        teacher_temperature=0.07, teacher_temperature_warmup_epochs=4.0,
    )  # fmt: skip
    plan = Schedule(config.optim, config.method, 128, steps_per_epoch=4)
    for step in (0, 3, 9, 16, 39):
        share = step / 40
        rates, cosine = plan.at(step), (1 + math.cos(math.pi * share)) / 2
        np.testing.assert_allclose(rates.teacher_temperature, min(0.07, 0.04 + 0.03 * step / 16))
        np.testing.assert_allclose(rates.weight_decay, 0.4 - (0.4 - 0.04) * cosine)
        np.testing.assert_allclose(rates.lr, 1e-3 + (0.25 - 1e-3) * cosine)
        assert rates.holds == (step < 6)
    assert Schedule(build(data="x").optim, build(data="x").method, 128, steps_per_epoch=4).at(3).weight_decay is None


def test_a_step_freezes_the_prototypes_and_clips_each_gradient() -> None:
    method, config = made()
    optimizer = build_optimizer(method, config.optim)
    step = Step(
        method,
        optimizer,
        precision="fp32",
        accumulate=1,
        clip_norm=0.05,
        layout=torch.contiguous_format,
        clip_each=True,
    )
    norms: list[list[float]] = []
    optimizer.register_step_pre_hook(
        lambda *_: norms.append([float(p.grad.norm()) for p in step.params if p.grad is not None])
    )
    directions, head = method.student.prototypes.directions, method.student.projector[0].weight
    before, moved = directions.detach().clone(), head.detach().clone()
    batch = Batch(tuple(views()), [0, 1, 2, 3])
    for decay, holds in ((0.1, True), (0.2, False)):
        step([batch], Rates(0.01, 0.1, 0.9, decay, 0.04, holds), measure=False)
        assert torch.equal(directions, before) == holds
        assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]
    assert not torch.equal(head, moved)
    assert len(norms[1]) == len(norms[0]) + 1
    assert max(norms[0] + norms[1]) <= 0.05 * (1 + 1e-4)
    assert sum(norm > 0.049 for norm in norms[1]) > 1  # each gradient is clipped by itself


def test_the_fused_loss_is_verified_with_the_gradient_of_the_prototypes() -> None:
    method, _ = made()
    found = verify(method, tuple(views()), torch.tensor(0.1))
    assert max(found.values()) < 1e-4
    with pytest.MonkeyPatch.context() as patch:
        plain = method.student.prototypes.forward
        patch.setattr(
            method.student.prototypes,
            "forward",
            lambda: plain() if method.backend == "reference" else (plain() + plain().detach()) / 2,
        )
        assert verify(method, tuple(views()), torch.tensor(0.1))["verify_gradient"] > 1e-3


def test_only_the_student_has_stochastic_depth() -> None:
    vit = {"arch": "test_vit", "prototypes": 8, "drop_path": 0.2}
    method, _ = made(**vit)
    rates = [
        [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]
        for network in (method.student, method.teacher)
    ]
    assert max(rates[0]) == pytest.approx(0.2)
    assert set(rates[1]) <= {0.0}
    with pytest.raises(
        UsageError, match=r"--drop-path 0.1 is for timm networks given by name; arch=Linear is a module"
    ):
        build_method(build(**{**SMALL, "drop_path": 0.1}), arch=torch.nn.Linear(2, 2))


def test_defaults_depend_on_the_kind_of_network() -> None:
    vit, resnet, other = (build(data="x", method="dino", arch=a) for a in ("vit_tiny_patch16_224", "resnet18", "xcit"))
    assert (vit.optim.optimizer, vit.model.drop_path, vit.input.crop_min) == ("adamw", 0.1, 0.4)
    assert (resnet.optim.optimizer, resnet.model.drop_path, resnet.input.crop_min) == ("sgd", 0.0, 0.14)
    assert (other.optim.optimizer, other.model.drop_path) == ("adamw", 0.0)
    assert build(data="x", method="dino").model.arch == "vit_small_patch16_224"
    assert DINO.recipes["dino-vits16-300ep"]["teacher_temperature"] == 0.07


def test_a_dino_run_resumes_bit_for_bit(small: Callable[..., Config], tmp_path: Path) -> None:
    options = {
        **SMALL, "epochs": 2, "workers": 0, "log_every": 1, "eval_every": 0, "warmup_epochs": 0.0,
        "freeze_prototypes_epochs": 2 / 89, "augmentation": "2x32,2x16", "stem": "imagenet", "checkpoint_every": 1,
    }  # fmt: skip
    train.train(small(**options, max_steps=4, out=tmp_path / "whole"))
    train.train(small(**options, max_steps=1, out=tmp_path / "cut"))
    train.train(small(**options, max_steps=4, out=tmp_path / "cut"))
    assert_as_uninterrupted(tmp_path / "cut", tmp_path / "whole")
