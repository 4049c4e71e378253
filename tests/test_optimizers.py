"""LARS, SGD and AdamW after every step against float64 NumPy and torch.optim, with the teacher's update in the step."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastrm.kernels import fused_ema_
from fastrm.kernels import optim as launches
from fastrm.optim import LARS, SGD, AdamW, apex_problem, fused_lamb
from tests.interpreted import (
    DEFAULTS,
    SLOW_TRITON,
    TRITON,
    device_of,
    often_and_slow,
    other_defaults,
    run_triton_cases,
    with_backends,
)

Array = NDArray[np.float64]
Rule = Callable[[list[Array], list[Array | None], list[dict[str, Any]], int], None]

SHAPES: list[tuple[int, ...]] = [(3, 5), (70, 131), (17,), (), (4, 3, 2, 2), (2048,), (0, 4), (1, 1)]
BACKENDS = ["cpu", TRITON]


def numpy(tensor: Tensor) -> Array:
    """A float64 NumPy copy of a tensor."""
    return tensor.detach().cpu().double().numpy().copy()


def parameters(device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters of all SHAPES with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int, without: int | None = None, scale: float = 1.0) -> None:
    """Set random gradients that depend on the step; the parameter with the index ``without`` gets none."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator)
        param.grad = None if i == without else (gradient * scale).to(param.device, param.dtype)


class Definition:
    """One update rule and the teacher's average in float64 NumPy, written from the formulas."""

    def __init__(self, rule: str, params: list[nn.Parameter], options: list[dict[str, float]]) -> None:
        self.rule, self.options = rule, options
        self.params = [numpy(p) for p in params]
        self.teacher = [p.copy() for p in self.params]
        self.first: list[Array | None] = [None] * len(params)
        self.second: list[Array] = [np.zeros_like(p) for p in self.params]
        self.steps = [0] * len(params)

    def step(self, gradients: list[Array | None], ema: float) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                getattr(self, f"_{self.rule}")(i, gradient, **self.options[i])
            self.teacher[i] = ema * self.teacher[i] + (1 - ema) * self.params[i]

    def _lars(
        self, i: int, g: Array, lr: float, momentum: float, weight_decay: float, trust_coefficient: float
    ) -> None:
        p = self.params[i]
        if p.ndim > 1:
            g = g + weight_decay * p
            norms = np.sqrt((p**2).sum()), np.sqrt((g**2).sum())
            if min(norms) > 0:
                g = g * trust_coefficient * norms[0] / norms[1]
        before = self.first[i]
        self.first[i] = g if before is None else momentum * before + g
        self.params[i] = p - lr * self.first[i]

    def _sgd(
        self, i: int, g: Array, lr: float, momentum: float = 0, dampening: float = 0, weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        g = g + weight_decay * self.params[i]
        if momentum:
            before = self.first[i]
            buffer = g if before is None else momentum * before + (1 - dampening) * g
            self.first[i] = buffer
            g = g + momentum * buffer if nesterov else buffer
        self.params[i] = self.params[i] - lr * g

    def _adamw(
        self, i: int, g: Array, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
    ) -> None:
        self.steps[i] += 1
        before = self.first[i]
        mean = (1 - betas[0]) * g + (0 if before is None else betas[0] * before)
        self.first[i] = mean
        self.second[i] = betas[1] * self.second[i] + (1 - betas[1]) * g**2
        mean = mean / (1 - betas[0] ** self.steps[i])
        root = np.sqrt(self.second[i] / (1 - betas[1] ** self.steps[i]))
        self.params[i] = self.params[i] * (1 - lr * weight_decay) - lr * mean / (root + eps)


CASES: dict[str, tuple[type[torch.optim.Optimizer], str, dict[str, Any], dict[str, Any]]] = {
    "lars": (LARS, "lars", {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02},
             {"lr": 0.1, "trust_coefficient": 0.01, "momentum": 0.5}),
    "sgd": (SGD, "sgd", {"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.1}),
    "momentum": (SGD, "sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {"lr": 0.2, "momentum": 0.5}),
    "one group without momentum": (SGD, "sgd", {"lr": 0.1, "momentum": 0.9}, {"momentum": 0}),
    "dampening": (SGD, "sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}, {"dampening": 0}),
    "nesterov": (SGD, "sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}, {"nesterov": False}),
    "adamw": (AdamW, "adamw", {"lr": 0.01, "betas": (0.9, 0.999), "weight_decay": 0.1},
              {"weight_decay": 0, "betas": (0.8, 0.95)}),
}  # fmt: skip
THEIRS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def groups(params: list[nn.Parameter], other: dict[str, Any]) -> list[dict[str, Any]]:
    """Two parameter groups, the second with other options."""
    return [{"params": params[::2]}, {"params": params[1::2], **other}]


def grouped(things: list[Any]) -> list[Any]:
    """The items, one per tensor, in the order of the parameter groups."""
    return things[::2] + things[1::2]


@often_and_slow
def test_triton_cases_in_the_interpreter(cases: str) -> None:
    run_triton_cases(__file__, cases)


@pytest.mark.parametrize(
    ("name", "backend"), with_backends(CASES, often=["lars", "one group without momentum", "nesterov", "adamw"])
)
def test_every_step_equals_the_definition_and_torch(name: str, backend: str) -> None:
    device = device_of(backend)
    kind, rule, options, other = CASES[name]
    params, theirs = parameters(device), parameters(device)
    teacher = [p.detach().clone() for p in params]
    shadow = [p.detach().bfloat16() for p in params]
    definition = Definition(rule, params, [{**options, **(other if i % 2 else {})} for i in range(len(params))])
    ours = kind(
        groups(params, other), **options, teacher=grouped(teacher), shadow=grouped(shadow), ema_momentum=0.5,
        backend=backend,
    )  # fmt: skip
    rival = THEIRS[rule](groups(theirs, other), **options) if rule in THEIRS else None
    for step in range(5):
        ema = 0.5 + 0.1 * step
        ours.ema_momentum = ema  # type: ignore[attr-defined]
        for optimizer in (ours, rival):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.9
        definition.options = [{**o, "lr": o["lr"] * 0.9} for o in definition.options]
        for these in (params, theirs):
            set_gradients(these, step, without={2: 1, 3: 4}.get(step))
        definition.step([None if p.grad is None else numpy(p.grad) for p in params], ema)
        ours.step()
        for i, param in enumerate(params):
            np.testing.assert_allclose(numpy(param), definition.params[i], rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(numpy(teacher[i]), definition.teacher[i], rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(numpy(shadow[i]), definition.teacher[i], rtol=2**-7, atol=2e-6)
        if rival is not None:
            rival.step()
            for p, q in zip(params, theirs, strict=True):
                torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "backend"), with_backends(["lars", "dampening", "adamw"], often=["lars"]))
def test_state_round_trip_is_exact(name: str, backend: str) -> None:
    device = device_of(backend)
    kind, _, options, other = CASES[name]

    def run(reload: bool) -> list[Tensor]:
        params = parameters(device)
        teacher = [p.detach().clone() for p in params]
        together = {"teacher": grouped(teacher), "ema_momentum": 0.9, "backend": backend}
        optimizer = kind(groups(params, other), **options, **together)
        for step in range(4):
            if reload and step == 2:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = kind(groups(params, {}), lr=7.0, **{**together, "ema_momentum": 0.1})
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            set_gradients(params, step)
            optimizer.step()
        return [*(p.detach() for p in params), *teacher]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_training_continues_from_the_state_of_torch(name: str, backend: str) -> None:
    device = device_of(backend)
    kind, rule, options, _ = CASES[name]
    params = parameters(device)
    rival = THEIRS[rule](params, **options)
    set_gradients(params, 0)
    rival.step()
    mine = [nn.Parameter(p.detach().clone()) for p in params]
    ours = kind(mine, **options, backend=backend)
    ours.load_state_dict(copy.deepcopy(rival.state_dict()))
    for step in (1, 2):
        set_gradients(params, step)
        set_gradients(mine, step)
        rival.step()
        ours.step()
        for p, q in zip(mine, params, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "backend"), with_backends(["lars", "momentum", "dampening", "adamw"], often=["dampening"])
)
def test_a_step_that_the_scaler_skips_changes_nothing(name: str, backend: str) -> None:
    device = device_of(backend)
    kind, _, options, _ = CASES[name]
    params, plain = parameters(device), parameters(device)
    frozen = nn.Parameter(torch.ones(5, device=device))
    teacher = [torch.zeros_like(p) for p in [*params, frozen]]
    plain_teacher = [torch.zeros_like(p) for p in plain]
    together = {"ema_momentum": 0.5, "backend": backend}
    optimizer = kind([*params, frozen], **options, teacher=teacher, **together)
    unscaled = kind(plain, **options, teacher=plain_teacher, **together)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    assert scaler._scale is None
    scaler.scale(torch.zeros((), device=device))  # creates the scale
    for step, broken in enumerate((True, False, True, False)):
        set_gradients(params, step, scale=scaler.get_scale())
        if broken:
            assert params[1].grad is not None
            params[1].grad[3, 4] = float("inf")
        before = [x.detach().clone() for x in (*params, frozen, *teacher)]
        scaler.step(optimizer)
        scaler.update()
        if broken:
            for x, old in zip((*params, frozen, *teacher), before, strict=True):
                assert torch.equal(x, old)
            continue
        set_gradients(plain, step)
        unscaled.step()
        for p, q in zip([*params, *teacher[:-1]], [*plain, *plain_teacher], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert (teacher[-1] == 0.75).all()  # two steps were made


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_without_gradient_or_teacher_with_a_scaler(backend: str) -> None:
    moved, still = (nn.Parameter(torch.ones(3, device=device_of(backend))) for _ in "12")
    optimizer = SGD([moved, still], 0.5, backend=backend)
    moved.grad = torch.ones_like(moved)
    for found, want in ((1.0, 1.0), (0.0, 0.5)):
        optimizer.found_inf = torch.tensor([found], device=moved.device)
        optimizer.step()
        assert moved.tolist() == [want] * 3
    assert still.tolist() == [1] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_momentum_of_the_teacher_in_a_group_changes_nothing(backend: str) -> None:
    device = device_of(backend)
    param, teacher = nn.Parameter(torch.ones(3, device=device)), torch.zeros(3, device=device)
    optimizer = SGD([param], 0.1, teacher=[teacher], ema_momentum=0.5, backend=backend)
    for value in (None, 1.5, float("nan"), "0.5"):
        optimizer.param_groups[0]["ema_momentum"] = value
        param.grad = torch.ones_like(param)
        with pytest.raises((ValueError, TypeError), match="SGD: ema_momentum"):
            optimizer.step()
    assert (param == 1).all()
    assert (teacher == 0).all()


@pytest.mark.parametrize("momenta", [(0.0, 0.9, 0.9, 0.9), (0.9, 0.0, 0.0, 0.9), (0.0, 0.9, 0.0, 0.9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_may_start_and_stop(backend: str, momenta: tuple[float, ...]) -> None:
    """As in a warm-up of the momentum from 0; torch keeps a buffer for later steps while the momentum is 0."""
    device = device_of(backend)
    params, theirs = parameters(device), parameters(device)
    ours = SGD(params, 0.1, backend=backend)
    rival = torch.optim.SGD(theirs, 0.1)
    for step, momentum in enumerate(momenta):
        for these, optimizer in ((params, ours), (theirs, rival)):
            optimizer.param_groups[0]["momentum"] = momentum
            set_gradients(these, step)
            optimizer.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def cleared(state: Any) -> None:
    state.clear()


def offloaded(state: Any) -> None:
    """Replace all tensors, as moving them to the host and back does."""
    for values in state.values():
        values.update({name: value.clone() for name, value in values.items()})


@pytest.mark.parametrize("change", [cleared, offloaded])
@pytest.mark.parametrize("kind", [LARS, SGD, AdamW])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_is_cleared_or_replaced_is_followed(backend: str, kind: Any, change: Any) -> None:
    device, found = device_of(backend), []
    options = {"momentum": 0.9} if kind is SGD else {}
    for changed in (True, False):
        params = parameters(device)
        optimizer = kind(params, lr=0.1, backend=backend, **options)
        for step in range(3):
            if step == 2 and changed:
                change(optimizer.state)
            if step == 2 and not changed and change is cleared:
                optimizer = kind(params, lr=0.1, backend=backend, **options)
            set_gradients(params, step)
            optimizer.step()
        found.append([*params, *(value for p in params for value in optimizer.state[p].values())])
    for mine, right in zip(*found, strict=True):
        assert torch.equal(mine, right)


def ordered(network: nn.Module) -> None:
    network.to(memory_format=torch.channels_last)


def moved(network: nn.Module) -> None:
    for p in network.parameters():
        p.data = p.data.clone()


def halved(network: nn.Module) -> None:
    network.bfloat16()


CONVERSIONS: dict[str, tuple[Any, ...]] = {
    "both channels last": (ordered, ordered), "student channels last": (ordered, None),
    "teacher channels last": (None, ordered), "new memory": (moved, moved), "teacher in half precision": (None, halved),
}  # fmt: skip


@pytest.mark.parametrize("change", CONVERSIONS)
@pytest.mark.parametrize("kind", [LARS, SGD, AdamW])
@pytest.mark.parametrize("backend", BACKENDS)
def test_networks_that_are_converted_after_a_step_are_followed(backend: str, kind: Any, change: str) -> None:
    device, found = device_of(backend), []
    options = {"momentum": 0.9} if kind is SGD else {}
    for changed in (True, False):
        torch.manual_seed(0)
        student = nn.Conv2d(3, 4, 2).to(device)
        teacher = copy.deepcopy(student)
        together = {"teacher": teacher.parameters(), "ema_momentum": 0.5, "backend": backend}
        optimizer = kind(student.parameters(), lr=0.1, **together, **options)
        for step in range(3):
            for do, network in zip(CONVERSIONS[change], (student, teacher), strict=True):
                if step == 2 and changed and do is not None:
                    do(network)
            set_gradients([*student.parameters()], step)
            optimizer.step()
        found.append([*map(numpy, (*student.parameters(), *teacher.parameters()))])
    for mine, right in zip(*found, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=2e-2 if "half" in change else 1e-6)


@pytest.mark.parametrize("kind", [LARS, SGD, AdamW])
@pytest.mark.parametrize("backend", [TRITON])
def test_a_state_of_another_form_than_its_parameter_is_refused(backend: str, kind: Any) -> None:
    """Its memory has another size, and a kernel would write beyond its end."""
    device = device_of(backend)
    options = {"momentum": 0.9} if kind is SGD else {}
    for change in ("dtype", "shape", "teacher"):
        param = nn.Parameter(torch.ones(6, 4, device=device))
        teacher = torch.ones(6, 4, device=device)
        together = {"teacher": [teacher], "ema_momentum": 0.5, "backend": backend}
        optimizer = kind([param], lr=0.1, **together, **options)
        set_gradients([param], 0)
        optimizer.step()
        if change == "dtype":
            param.data = param.data.bfloat16()
        elif change == "shape":
            param.data = torch.ones(9, 4, device=device)
        else:
            teacher.data = teacher.data[:3]
        param.grad = torch.ones_like(param)
        before = numpy(param)
        with pytest.raises(ValueError, match=f"{kind.__name__}: a parameter is .*, as after a conversion of the model"):
            optimizer.step()
        np.testing.assert_array_equal(numpy(param), before)
        if change == "dtype":
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            assert (numpy(param) != before).any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_are_split_are_followed(backend: str, momentum: float) -> None:
    device = device_of(backend)
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = SGD(params, 0.0, momentum, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    (group,) = optimizer.param_groups
    optimizer.param_groups[:] = [{**group, "params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.5), strict=True)]
    optimizer.step()
    speed = 1 + momentum
    for p, lr in zip(params, (0.1, 0.5), strict=True):
        np.testing.assert_allclose(numpy(p), 1 - lr * speed, rtol=1e-6)


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_of_torch_do_not_change_a_step(backend: str, kind: str) -> None:
    """Nor the average, which a parameter without a gradient gets from fused_ema_."""
    device, found = device_of(backend), []
    for changed in (False, True):
        params = parameters(device)
        teacher = [p.detach().clone() + 1 for p in params]
        set_gradients(params, 0, without=1)
        zero = torch.zeros(1, device=device)
        with other_defaults(kind) if changed else contextlib.nullcontext():
            for rule, options in ((SGD, {"momentum": 0.9}), (LARS, {}), (AdamW, {})):
                optimizer = rule(params, lr=0.1, teacher=teacher, ema_momentum=0.5, backend=backend, **options)
                optimizer.found_inf = zero
                optimizer.step()
        found.append([numpy(x) for x in (*params, *teacher)])
    for mine, right in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_as_tensors_are_read_at_each_step(backend: str) -> None:
    device = device_of(backend)
    params, plain = parameters(device), parameters(device)
    teacher, plain_teacher = ([p.detach().clone() for p in params] for _ in range(2))
    lr, ema = torch.tensor(0.1, device=device), torch.tensor(0.5, device=device)
    optimizer = SGD(params, lr, 0.9, teacher=teacher, ema_momentum=ema, backend=backend)
    rival = SGD(plain, 0.1, 0.9, teacher=plain_teacher, ema_momentum=0.5, backend=backend)
    for step, (rate, momentum) in enumerate([(0.1, 0.5), (0.3, 0.25)]):
        lr.fill_(rate)
        ema.fill_(momentum)
        rival.param_groups[0]["lr"], rival.ema_momentum = rate, momentum
        for these, o in ((params, optimizer), (plain, rival)):
            set_gradients(these, step)
            o.step()
        for p, q in zip([*params, *teacher], [*plain, *plain_teacher], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lars", "nesterov", "adamw"])
def test_steps_with_different_layouts_equal_the_definition(name: str, backend: str) -> None:
    """Parameters, gradients and teachers have different layouts or dtypes; one parameter lies in a larger block."""
    device = device_of(backend)
    kind, rule, options, _ = CASES[name]
    block = torch.zeros(6, 20, device=device)
    shape = (6, 4, 3, 5)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator).to(device)
    params = [
        nn.Parameter(first.clone(memory_format=torch.channels_last)),
        nn.Parameter(first.clone()),
        nn.Parameter(block[:, 3:12:2]),
    ]
    teacher = [first.clone(), first.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), block[:, 4:13:2]]
    definition = Definition(rule, params, [options] * 3)
    definition.teacher = [numpy(t) for t in teacher]
    optimizer = kind(params, **options, teacher=teacher, ema_momentum=0.5, backend=backend)
    for step in range(2):
        set_layout = (torch.contiguous_format, torch.channels_last)[step]
        for param in params:
            gradient = torch.randn(param.shape, generator=generator).to(device)
            param.grad = gradient.contiguous(memory_format=set_layout) if param.ndim == 4 else gradient
        definition.step([numpy(p.grad) for p in params if p.grad is not None], 0.5)
        optimizer.step()
        for i, param in enumerate(params):
            np.testing.assert_allclose(numpy(param), definition.params[i], rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(numpy(teacher[i]), definition.teacher[i], rtol=2e-5, atol=2e-6)
    assert (block[:, [0, 1, 2, *range(13, 20)]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_several_dtypes_equal_the_definition(backend: str) -> None:
    """One optimizer has half-precision parameters with a float32 teacher, and float64 parameters."""
    device = device_of(backend)
    half, double = parameters(device, dtype=torch.float16), parameters(device, dtype=torch.float64)
    teacher = [p.detach().float() for p in half] + [p.detach().clone() for p in double]
    definition = Definition("sgd", double, [{"lr": 0.1, "momentum": 0.9}] * len(double))
    optimizer = SGD([*half, *double], 0.1, 0.9, teacher=teacher, ema_momentum=0.75, backend=backend)
    for step in range(3):
        set_gradients(half, step)
        set_gradients(double, step)
        old = [numpy(t) for t in teacher[: len(half)]]
        definition.step([numpy(p.grad) for p in double if p.grad is not None], 0.75)
        optimizer.step()
        for i, p in enumerate(half):
            # The average is of the stored parameter, as in a later fused_ema_.
            np.testing.assert_allclose(numpy(teacher[i]), 0.75 * old[i] + 0.25 * numpy(p), rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(numpy(p), definition.params[i], rtol=1e-2, atol=1e-2)
        for i, p in enumerate(double):
            np.testing.assert_allclose(numpy(p), definition.params[i], rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(numpy(teacher[len(half) + i]), definition.teacher[i], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["cpu", SLOW_TRITON])
def test_lars_with_zero_norms_and_reproducible_bits(backend: str) -> None:
    device = device_of(backend)
    zero, still = (nn.Parameter(torch.full((2, 2), v, device=device)) for v in (0.0, 1.0))
    zero.grad, still.grad = torch.ones(2, 2, device=device), torch.zeros(2, 2, device=device)
    LARS([zero, still], lr=0.5, trust_coefficient=0.001, backend=backend).step()
    assert (zero == -0.5).all()
    assert (still == 1).all()

    def run() -> Tensor:
        large = nn.Parameter(torch.randn(70, 1000, generator=torch.Generator().manual_seed(0)).to(device))
        large.grad = large.detach().sin()
        LARS([large], lr=0.5, weight_decay=0.1, backend=backend).step()
        return large.detach()

    assert torch.equal(run(), run())


@pytest.mark.parametrize("backend", [TRITON])
def test_a_whole_model_takes_one_or_two_launches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(backend)
    counted: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launches, name)

        def __getitem__(self, grid: Any) -> Any:
            counted.append(self.name)
            return self.kernel[grid]

    for name in ("_norms_kernel", "_momentum_kernel", "_adamw_kernel"):
        monkeypatch.setattr(launches, name, Counted(name))
    for kind, expected in (
        (LARS, ["_norms_kernel", "_momentum_kernel"]), (SGD, ["_momentum_kernel"]), (AdamW, ["_adamw_kernel"])
    ):  # fmt: skip
        params = parameters(device)
        teacher = [p.detach().clone() for p in params]
        options: dict[str, Any] = {"lr": 0.1, "teacher": grouped(teacher), "ema_momentum": 0.5, "backend": backend}
        optimizer = kind(groups(params, {"lr": 0.2}), **options)  # type: ignore[operator]
        for step in range(2):
            set_gradients(params, step)
            counted.clear()
            optimizer.step()
            assert counted == expected


def test_the_teacher_equals_that_of_fused_ema() -> None:
    params = parameters(torch.device("cpu"))
    teacher = [p.detach().clone() for p in params]
    apart = [t.clone() for t in teacher]
    optimizer = AdamW(params, teacher=teacher, ema_momentum=0.99)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        fused_ema_(apart, params, 0.99)
        for a, b in zip(teacher, apart, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "backend"), with_backends(CASES, often=["adamw"]))
def test_a_parameter_without_a_teacher_is_updated(name: str, backend: str) -> None:
    """The parameters of a predictor, for example, have no teacher. One parameter with a teacher has no gradient."""
    kind, _, options, other = CASES[name]
    device = device_of(backend)
    params, twins = parameters(device), parameters(device)
    led = [i for i in range(len(params)) if i % 3]
    teacher = [params[i].detach().clone() if i in led else None for i in range(len(params))]
    want = [numpy(p) for p in params]
    optimizer: Any = kind(groups(params, other), teacher=grouped(teacher), ema_momentum=0.9, backend=backend, **options)
    plain: Any = kind(groups(twins, other), backend=backend, **options)
    for step in range(3):
        for mine, single in ((params, optimizer), (twins, plain)):
            set_gradients(mine, step, without=1)
            single.step()
        for i in led:
            want[i] = 0.9 * want[i] + 0.1 * numpy(params[i])
    for i, (param, twin) in enumerate(zip(params, twins, strict=True)):
        assert torch.equal(param, twin)
        if (follower := teacher[i]) is not None:
            np.testing.assert_allclose(numpy(follower), want[i], rtol=1e-5, atol=1e-6)


def test_copies_keep_the_teacher_and_closures_run() -> None:
    params = parameters(torch.device("cpu"))
    optimizer = LARS(params, 0.1, teacher=[torch.zeros_like(p) for p in params], ema_momentum=0.5)
    twin = copy.deepcopy(optimizer)
    for p in itertools.chain(*(g["params"] for g in twin.param_groups)):
        p.grad = torch.zeros_like(p)
    assert twin.step(lambda: 3) == 3
    for p in twin.param_groups[0]["params"]:
        np.testing.assert_allclose(numpy(twin._teacher[p]), numpy(p) / 2)
    assert all((t == 0).all() for t in optimizer._teacher.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [LARS, SGD, AdamW])
def test_a_state_that_torch_makes_for_a_checkpoint_leaves_the_teacher(kind: Any, backend: str) -> None:
    """torch.distributed.checkpoint steps a new optimizer at learning rate 0, in an order that nobody expects."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    device = device_of(backend)

    def make() -> tuple[nn.Module, nn.Module, Any]:
        student, teacher = nn.Linear(3, 4).to(device), nn.Linear(3, 4).to(device)
        options = {"teacher": teacher.parameters(), "ema_momentum": 0.5, "backend": backend}
        return student, teacher, kind(student.parameters(), 0.1, **options)

    def advance(student: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        student(torch.ones(2, 3, device=device)).square().sum().backward()
        optimizer.step()

    student, teacher, optimizer = make()
    before = [numpy(p) for p in (*student.parameters(), *teacher.parameters())]
    get_optimizer_state_dict(student, optimizer)
    for now, then in zip((*student.parameters(), *teacher.parameters()), before, strict=True):
        np.testing.assert_array_equal(numpy(now), then)
    assert optimizer.ema_momentum == 0.5
    advance(student, optimizer)
    ours, theirs, twin = make()
    ours.load_state_dict(student.state_dict())
    theirs.load_state_dict(teacher.state_dict())
    set_optimizer_state_dict(ours, twin, copy.deepcopy(get_optimizer_state_dict(student, optimizer)))
    advance(student, optimizer)
    advance(ours, twin)
    for first, second in zip((student, teacher), (ours, theirs), strict=True):
        assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_a_wrapper_replaces(backend: str) -> None:
    """Accelerate puts FSDP2's parameters into the groups of an optimizer that was made before."""
    device = device_of(backend)
    params = parameters(device)
    teacher: list[Any] = [torch.zeros_like(p) for p in params]
    followed = SGD(params, 0.1, teacher=teacher, ema_momentum=0.5, backend=backend)
    alone = SGD(params, 0.1, backend=backend)
    set_gradients(params, 0)
    followed.step()
    alone.step()
    others = parameters(device)
    before, kept = [numpy(p) for p in others], [numpy(t) for t in teacher]
    set_gradients(others, 1)
    for optimizer in (followed, alone):
        optimizer.param_groups[0]["params"] = others
    with pytest.raises(RuntimeError, match="SGD: 8 of the 8 parameters with a teacher are not in the groups"):
        followed.step()
    for now, then in zip([*others, *teacher], [*before, *kept], strict=True):
        np.testing.assert_array_equal(numpy(now), then)
    alone.step()
    for p, then in zip(others, before, strict=True):
        np.testing.assert_allclose(numpy(p), then - 0.1 * numpy(p.grad), rtol=1e-5, atol=1e-6)


def test_wrong_options_are_named() -> None:
    def make(**options: Any) -> LARS:
        return LARS([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))], **{"lr": 0.1, **options})

    two = [torch.zeros(2, 2), torch.zeros(3)]
    same = torch.zeros(2, 2)
    for options, message in (
        ({"teacher": two}, "teacher needs ema_momentum"),
        ({"ema_momentum": 0.5}, "need a teacher"),
        ({"teacher": two[:1], "ema_momentum": 0.5}, "1 teacher tensors for 2 parameters"),
        ({"teacher": two[::-1], "ema_momentum": 0.5}, r"teacher\[0\] has \(3,\)"),
        ({"teacher": two, "ema_momentum": 1.5}, "ema_momentum=1.5"),
        ({"teacher": two, "shadow": two[:1], "ema_momentum": 0.5}, "1 shadow tensors for 2 parameters"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"lr": -1}, "lr=-1"),
        ({"trust_coefficient": float("nan")}, "trust_coefficient=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match=r"one tensor with two students|twice"):
        LARS([nn.Parameter(torch.ones(2, 2)) for _ in "12"], 0.1, teacher=[same, same], ema_momentum=0.5)
    optimizer = make(teacher=two, ema_momentum=0.5)
    with pytest.raises(ValueError, match="ema_momentum=2"):
        optimizer.ema_momentum = 2
    with pytest.raises(ValueError, match="no group can be added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="nesterov needs"):
        SGD([nn.Parameter(torch.ones(1))], 0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"betas\[1\]=1"):
        AdamW([nn.Parameter(torch.ones(1))], betas=(0.9, 1))
    sparse, dense = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    sparse.grad, dense.grad = torch.eye(2).to_sparse(), torch.ones(2)
    with pytest.raises(TypeError, match="sparse"):
        SGD([{"params": [dense]}, {"params": [sparse]}], 0.1).step()
    assert (sparse == 1).all()
    assert (dense == 1).all()


def test_a_missing_or_unrelated_apex_is_reported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("apex", "apex.optimizers", "amp_C"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "not installed" in (apex_problem() or "")
    with pytest.raises(ImportError, match=r"github\.com/NVIDIA/apex"):
        fused_lamb()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert "another package of that name" in (apex_problem() or "")
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "__init__.py").write_text("class FusedLAMB: pass")
    importlib.invalidate_caches()
    assert "without its CUDA extensions" in (apex_problem() or "")
    (tmp_path / "amp_C.py").write_text("")
    importlib.invalidate_caches()
    assert apex_problem() is None
    assert fused_lamb().__name__ == "FusedLAMB"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lars", "momentum", "adamw"])
def test_it_runs_in_a_cuda_graph_and_without_synchronisation(name: str) -> None:
    kind, _, options, _ = CASES[name]
    device = torch.device("cuda")
    params, plain = parameters(device), parameters(device)
    teacher, plain_teacher = ([p.detach().clone() for p in params] for _ in range(2))
    lr, ema = torch.tensor(0.1, device=device), torch.tensor(0.5, device=device)
    found_inf = torch.zeros(1, device=device)
    graphed: Any = kind(params, **{**options, "lr": lr}, teacher=teacher, ema_momentum=ema)
    eager: Any = kind(plain, **{**options, "lr": 0.1}, teacher=plain_teacher, ema_momentum=0.5)
    graphed.found_inf = found_inf
    for these in (params, plain):
        set_gradients(these, 0)
    graphed.step()
    eager.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for step, (rate, momentum, inf) in enumerate([(0.1, 0.5, 0), (0.3, 0.25, 0), (0.3, 0.25, 1)], start=1):
        lr.fill_(rate)
        ema.fill_(momentum)
        found_inf.fill_(inf)
        set_gradients(plain, step)
        for p, q in zip(params, plain, strict=True):
            p.grad.copy_(q.grad)  # type: ignore[union-attr,arg-type]
        graph.replay()
        if not inf:
            eager.param_groups[0]["lr"], eager.ema_momentum = rate, momentum
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                eager.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for p, q in zip([*params, *teacher], [*plain, *plain_teacher], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
