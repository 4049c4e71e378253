"""MoCo-v3, MoCo-v2, BYOL and DenseCL: losses against definitions, forward passes, queues, heads and the teacher."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrm.errors import UsageError
from fastrm.machine.device import choose_queue_dtype
from fastrm.methods import Method, build_method
from fastrm.methods.densecl import matched
from fastrm.optim import build_optimizer
from fastrm.settings.config import Config, build
from tests import oracle

METHODS = ["mocov3", "mocov2", "byol", "densecl"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def settings(method: str, **leaves: Any) -> Config:
    """Settings of a small method."""
    small = {"hidden_dim": 24, "output_dim": 8, "predictor_hidden_dim": 24, "queue_size": 11, "image_size": 32}
    return build(**{"data": "digits", "arch": "test_resnet", "method": method, "temperature": 0.3, **small, **leaves})


def made(method: str, **leaves: Any) -> tuple[Method[Any], Tensor, Tensor]:
    """A method whose teacher differs from its student, and two views."""
    torch.manual_seed(0)
    built = build_method(settings(method, **leaves))
    with torch.no_grad():
        for parameter in built.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built, torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)


def weight(value: float = 1.0) -> Tensor:
    """A loss weight as a tensor."""
    return torch.tensor(value)


def encodings(method: Method[Any], *views: Tensor) -> tuple[list[Any], list[Any]]:
    """Encodings of both networks in training mode; the statistics of BatchNorm are restored."""
    state = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        result = [method.encode_student(v) for v in views], [method.teacher(v) for v in views]
    method.load_state_dict(state)
    return result


def own_loss(name: str, method: Method[Any], students: list[Any], teachers: list[Any]) -> float:
    """The published loss in float64, computed from the encodings."""
    s, t = [e.output.double().numpy() for e in students], [e.output.double().numpy() for e in teachers]
    if name == "mocov3":
        return sum(2 * 0.3 * oracle.info_nce(s[d], t[1 - d], None, 0.3).mean() for d in (0, 1))
    if name == "byol":
        return sum(oracle.residual(s[d], t[1 - d]).mean() for d in (0, 1))
    queues = [queue.features.double().numpy() for queue in method.queues]
    if name == "mocov2":
        directions = len(queues)
        return sum(oracle.info_nce(s[d], t[1 - d], queues[d], 0.3).mean() for d in range(directions)) / directions
    dense_queries, positives = [], []
    for b in range(4):
        ours, theirs = students[0].positions[b].double().numpy(), teachers[1].positions[b].double().numpy()
        nearest = (oracle.unit(ours) @ oracle.unit(theirs).T).argmax(axis=1)
        dense_queries.append(students[0].dense[b].double().numpy())
        positives.append(teachers[1].dense[b].double().numpy()[nearest])
    whole = oracle.info_nce(s[0], t[1], queues[0], 0.3).mean()
    dense = oracle.info_nce(np.concatenate(dense_queries), np.concatenate(positives), queues[1], 0.3).mean()
    return 0.7 * whole + 0.3 * dense


CASES = [
    ("mocov3", {}),
    ("mocov2", {}),
    ("mocov2", {"symmetric": True}),
    ("byol", {}),
    ("densecl", {"dense_weight": 0.3}),
]


@pytest.mark.parametrize(("name", "leaves"), CASES, ids=str)
def test_the_loss_without_residual_term_equals_the_publication(name: str, leaves: dict[str, Any]) -> None:
    method, first, second = made(name, residual_weight=0.0, **leaves)
    students, teachers = encodings(method, first, second)
    output = method(first, second, weight())
    np.testing.assert_allclose(output.loss.item(), own_loss(name, method, students, teachers), **CLOSE)
    assert output.loss.item() == output.contrastive.item()
    assert output.residual is None
    assert output.gap is None


@pytest.mark.parametrize("place", ["output", "projector", "backbone"])
@pytest.mark.parametrize(("name", "leaves"), CASES, ids=str)
def test_the_residual_term_is_added_at_its_place(name: str, leaves: dict[str, Any], place: str) -> None:
    method, first, second = made(name, residual_weight=1.0, residual_at=place, **leaves)
    students, teachers = encodings(method, first, second)
    output = method(first, second, weight(0.5), measure=True)
    seen = range(2 if name in ("mocov3", "byol") or leaves.get("symmetric") else 1)

    def term(where: str) -> float:
        values = []
        for d in seen:
            value = oracle.residual(getattr(students[d], where).double(), getattr(teachers[d], where).double()).mean()
            if name == "densecl" and where != "backbone":
                ours, theirs = students[d].dense.flatten(0, 1), teachers[d].dense.flatten(0, 1)
                value = 0.7 * value + 0.3 * oracle.residual(ours.double(), theirs.double()).mean()
            values.append(value)
        return float(np.mean(values))

    own = own_loss(name, method, students, teachers)
    np.testing.assert_allclose(output.contrastive.item(), own, **CLOSE)
    np.testing.assert_allclose(output.residual.item(), term(place), **CLOSE)
    np.testing.assert_allclose(output.loss.item(), own + 0.5 * term(place), **CLOSE)
    at_output = [oracle.residual(students[d].output.double(), teachers[d].output.double()).mean() for d in seen]
    np.testing.assert_allclose(output.gap.item(), np.mean(at_output) / 2, **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_reaches_every_trained_parameter_of_the_student_only(name: str) -> None:
    method, first, second = made(name)
    method(first, second, weight()).loss.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


@pytest.mark.parametrize(
    ("name", "leaves", "student", "teacher"),
    [
        ("mocov3", {"residual_weight": 0.0}, 2, 2),
        ("mocov3", {"residual_weight": 1.0}, 2, 2),  # the same-view keys need no further pass
        ("byol", {"residual_weight": 1.0}, 2, 2),
        ("mocov2", {"residual_weight": 0.0}, 1, 1),
        ("mocov2", {"residual_weight": 1.0}, 1, 2),
        ("mocov2", {"residual_weight": 1.0, "symmetric": True}, 2, 2),
        ("densecl", {"residual_weight": 0.0}, 1, 1),
        ("densecl", {"residual_weight": 1.0}, 1, 2),
    ],
)
def test_each_network_runs_only_as_often_as_needed(
    name: str, leaves: dict[str, Any], student: int, teacher: int
) -> None:
    method, first, second = made(name, **leaves)
    runs = {"student": 0, "teacher": 0}
    for which in runs:

        def count(*_: object, which: str = which) -> None:
            runs[which] += 1

        getattr(method, which).backbone.net.conv1.register_forward_hook(count)
    method(first, second, weight())
    assert runs == {"student": student, "teacher": teacher}


def test_measuring_does_not_change_the_run() -> None:
    method, first, second = made("mocov2", residual_weight=0.0)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    plain = method(first, second, weight())
    after_plain = {name: value.clone() for name, value in method.state_dict().items()}
    method.load_state_dict(state)
    measured = method(first, second, weight(), measure=True)
    assert measured.gap is not None
    assert torch.equal(plain.loss, measured.loss)
    assert all(torch.equal(value, after_plain[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_is_the_averaged_student_over_three_steps(name: str, kind: str) -> None:
    torch.manual_seed(0)
    method = build_method(settings(name))
    optimizer: Any = build_optimizer(method, build(data="x", optimizer=kind).optim)
    by_hand = {n: p.detach().double().numpy().copy() for n, p in method.student.named_parameters()}
    for momentum in (0.9, 0.95, 0.99):
        method(torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32), weight()).loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.ema_momentum = momentum
        optimizer.step()
        optimizer.zero_grad()
        for n, p in method.student.named_parameters():
            by_hand[n] = momentum * by_hand[n] + (1 - momentum) * p.detach().double().numpy()
    moved = 0.0
    for n, p in method.teacher.named_parameters():
        np.testing.assert_allclose(p.numpy(), by_hand[n], rtol=1e-5, atol=1e-6, err_msg=n)
        student = dict(method.student.named_parameters())[n]
        moved = max(moved, float((p - student).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("name", ["mocov2", "densecl"])
def test_keys_enter_the_queues_only_when_they_are_pushed(name: str) -> None:
    method, first, second = made(name)
    before = [queue.features.clone() for queue in method.queues]
    key = encodings(method, second)[1][0]
    output = method(first, second, weight())
    assert torch.equal(output.keys[0], key.output)
    if name == "densecl":
        torch.testing.assert_close(output.keys[1], key.dense.mean(dim=1))
    assert all(torch.equal(queue.features, old) for queue, old in zip(method.queues, before, strict=True))
    method.push(output.keys)
    for queue, old, keys in zip(method.queues, before, output.keys, strict=True):
        ring, pointer = oracle.enqueue(old.double(), 0, keys.double())
        np.testing.assert_allclose(queue.features.numpy(), ring, **CLOSE)
        assert queue.pointer.item() == pointer


def test_dense_positives_are_the_nearest_positions() -> None:
    torch.manual_seed(0)
    ours, theirs, dense = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    found = matched(ours, theirs, dense)
    for b in range(2):
        for i in range(5):
            cosines = [float(nn.functional.cosine_similarity(ours[b, i], theirs[b, j], dim=0)) for j in range(5)]
            assert torch.equal(found[b, i], dense[b, int(np.argmax(cosines))])


def kinds(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.modules() if not list(layer.children())]


def test_heads_are_built_as_published() -> None:
    norm = ["Linear", "BatchNorm1d", "ReLU"]
    mocov3 = build_method(settings("mocov3"))
    assert kinds(mocov3.student.projector) == [*norm, "Linear", "BatchNorm1d"]
    assert mocov3.student.projector[-1].affine is False
    assert kinds(mocov3.predictor) == [*norm, "Linear"]
    assert all(layer.bias is None for layer in mocov3.modules() if isinstance(layer, nn.Linear))
    vit = build_method(settings("mocov3", arch="test_vit"))
    assert kinds(vit.student.projector) == [*norm, *norm, "Linear", "BatchNorm1d"]
    assert kinds(vit.predictor) == [*norm, "Linear", "BatchNorm1d"]
    mocov2 = build_method(settings("mocov2"))
    assert kinds(mocov2.student.projector) == ["Linear", "ReLU", "Linear"]
    assert kinds(mocov2.predictor) == ["Identity"]
    byol = build_method(settings("byol"))
    assert kinds(byol.student.projector) == kinds(byol.predictor) == [*norm, "Linear"]
    densecl = build_method(settings("densecl"))
    assert kinds(densecl.student.dense_projector) == ["Linear", "ReLU", "Linear"]


def test_densecl_needs_a_feature_map() -> None:
    with pytest.raises(ValueError, match="--method densecl needs a backbone with a feature map"):
        build_method(settings("densecl", arch="test_vit"))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_bf16_keeps_losses_and_teacher_in_float32(name: str) -> None:
    method, first, second = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        output = method(first, second, weight(), measure=True)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
    assert {p.dtype for p in method.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("arch", "leaves", "behind"),
    [
        ("test_convnext", {}, {"head.norm.weight", "head.norm.bias"}),
        ("test_convnext", {"residual_weight": 1.0, "residual_at": "backbone"}, set()),
        ("mobilenetv3_small_050", {}, {"conv_head.weight", "conv_head.bias"}),
        ("test_resnet", {}, set()),
    ],
)
def test_parameters_that_the_loss_does_not_reach_are_frozen_and_reported(
    arch: str, leaves: dict[str, Any], behind: set[str]
) -> None:
    method = build_method(settings("densecl", arch=arch, **leaves))
    frozen = {name for name, p in method.student.backbone.net.named_parameters() if not p.requires_grad}
    assert frozen == behind
    said = [note for note in method.notes if "does not reach" in note]
    assert len(said) == bool(behind)
    assert all(f"does not reach {len(behind)} tensors (student.backbone.net." in note for note in said)
    method(torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), weight()).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
    before = {name: p.clone() for name, p in method.named_parameters()}
    optimizer: Any = build_optimizer(method, settings("densecl", weight_decay=0.5, optimizer="sgd").optim)
    optimizer.param_groups[0]["lr"], optimizer.ema_momentum = 0.1, 0.5
    optimizer.step()
    for name, p in method.named_parameters():
        if name.rpartition("backbone.net.")[2] in behind:
            assert torch.equal(p, before[name]), name  # not even by weight decay


def test_the_search_for_unused_parameters_changes_nothing() -> None:
    configured = settings("mocov2", arch="test_resnet")
    torch.manual_seed(3)
    plain = build_method(configured, trained=False)
    after_plain = torch.rand(3)
    torch.manual_seed(3)
    looked = build_method(configured)
    assert torch.equal(torch.rand(3), after_plain)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in looked.state_dict().items())
    assert all(p.grad is None for p in looked.parameters())


def test_a_method_that_cannot_be_trained_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"test_resnet cannot be trained with --method byol .*1 images per process"):
        build_method(settings("byol", batch_size=4, accumulate=4))
    with pytest.raises(UsageError, match="densecl needs a backbone with a feature map"):
        build_method(settings("densecl", arch="test_vit"))


def test_densecl_accepts_a_channels_last_map() -> None:
    """Swin returns [B, H, W, C]; the positions of the loss are those of its map."""
    method = build_method(settings("densecl", arch="swin_tiny_patch4_window7_224", image_size=64))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = method.student.eval().backbone.net.forward_features(images)
        encoding = method.student(images)
    assert features.shape == (2, 2, 2, 768)
    torch.testing.assert_close(encoding.positions, features.flatten(1, 2))


@pytest.mark.parametrize("name", ["mocov2", "densecl"])
def test_a_bfloat16_queue_changes_the_loss_only_by_rounding(name: str) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        method = build_method(settings(name, queue_dtype=dtype)).train()
        assert {queue.features.dtype for queue in method.queues} == {getattr(torch, dtype)}
        views = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        output = method(*views, torch.tensor(0.5))
        method.push(output.keys)
        assert all(int(queue.pointer) == 8 for queue in method.queues)
        losses.append(float(output.loss))
    # Rounding a key by a relative 2^-9 changes a similarity by at most 2^-9, which is divided by the temperature of
    # 0.3.
    assert abs(losses[0] - losses[1]) < 2**-9 / 0.3


def test_queues_are_bfloat16_on_gpus_by_default() -> None:
    assert choose_queue_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_queue_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_queue_dtype("float32", torch.device("cuda")) == torch.float32
