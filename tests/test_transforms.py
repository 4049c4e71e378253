"""Other parts of PyTorch with the operations: derivatives of every kind, torch.func, compilation and checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

from fastrm.kernels import EMA, FeatureQueue, fused_ema_, info_nce, residual_info_nce, residual_loss
from fastrm.optim import SGD

F64 = torch.float64
Loss = Callable[[Tensor], Tensor]


def rows(seed: int, *shape: int) -> Tensor:
    """Normally distributed float64 rows of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


QUERY, KEY, SAME, TOWARD = (rows(i, 3, 4) for i in range(4))
QUEUE = torch.nn.functional.normalize(rows(4, 6, 4))


def losses(backend: str | None) -> dict[str, Loss]:
    """The losses of a backend as functions of the queries."""
    return {
        "info_nce": lambda x: info_nce(x, KEY, QUEUE, backend=backend),
        "in batch": lambda x: info_nce(x, KEY, reduction="sum", backend=backend),
        "rows": lambda x: info_nce(x, KEY, QUEUE, reduction="none", backend=backend),
        "residual_loss": lambda x: residual_loss(x, SAME, backend=backend),
        "residual_info_nce": lambda x: residual_info_nce(x, KEY, SAME, QUEUE, residual_weight=0.7, backend=backend)[0],
    }


def defined(name: str) -> Loss:
    """A loss in plain PyTorch, written from its formula."""

    def unit(x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def nce(x: Tensor) -> Tensor:
        positive = (unit(x) * unit(KEY)).sum(-1, keepdim=True)
        logits = positive if name == "in batch" else torch.cat([positive, unit(x) @ QUEUE.T], dim=-1)
        all_logits = unit(x) @ unit(KEY).T if name == "in batch" else logits
        return (all_logits / 0.2).logsumexp(-1) - positive[..., 0] / 0.2

    def residual(x: Tensor) -> Tensor:
        return (2 - 2 * (unit(x) * unit(SAME)).sum(-1)).mean()

    return {
        "info_nce": lambda x: nce(x).mean(),
        "in batch": lambda x: nce(x).sum(),
        "rows": nce,
        "residual_loss": residual,
        "residual_info_nce": lambda x: nce(x).mean() + 0.7 * residual(x),
    }[name]


def dual(loss: Loss) -> Any:
    """The directional derivative by forward-mode differentiation."""
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(QUERY, TOWARD))).tangent


TRANSFORMS: dict[str, Callable[[Loss], Any]] = {
    "grad": lambda loss: torch.func.grad(lambda x: loss(x).sum())(QUERY),
    "vmap": lambda loss: torch.vmap(loss)(torch.stack([QUERY, TOWARD])),
    "vmap of grad": lambda loss: torch.vmap(torch.func.grad(lambda x: loss(x).sum()))(torch.stack([QUERY, TOWARD])),
    "jvp": lambda loss: torch.func.jvp(loss, (QUERY,), (TOWARD,))[1],
    "jacfwd": lambda loss: torch.func.jacfwd(loss)(QUERY),
    "jacrev": lambda loss: torch.func.jacrev(loss)(QUERY),
    "hessian": lambda loss: torch.func.hessian(loss)(QUERY),
    "forward AD": dual,
    "forward jacobian": lambda loss: functional.jacobian(loss, QUERY, vectorize=True, strategy="forward-mode"),
}


@pytest.mark.parametrize("name", losses(None))
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_right_on_the_reference_and_refused_on_other_backends(transform: str, name: str) -> None:
    want = TRANSFORMS[transform](defined(name))
    for backend in (None, "reference"):
        torch.testing.assert_close(TRANSFORMS[transform](losses(backend)[name]), want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"backend='cpu' has no rule for torch.func.*pass backend='reference'"):
        TRANSFORMS[transform](losses("cpu")[name])


def penalty(loss: Loss, power: int = 1) -> Tensor:
    """The gradient of the squared norm of the gradient."""
    query = QUERY.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(query).sum() ** power, query, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), query)[0]


TWICE: dict[str, Callable[[Loss], Any]] = {
    "penalty": penalty,
    "penalty of a square": lambda loss: penalty(loss, 2),
    "hessian": lambda loss: functional.hessian(lambda x: loss(x).sum(), QUERY),
    "hvp": lambda loss: functional.hvp(lambda x: loss(x).sum(), QUERY, TOWARD)[1],
    "vhp": lambda loss: functional.vhp(lambda x: loss(x).sum(), QUERY, TOWARD)[1],
    "jvp": lambda loss: functional.jvp(loss, QUERY, torch.ones_like(QUERY))[1],
}


@pytest.mark.parametrize("name", losses(None))
@pytest.mark.parametrize("derivative", TWICE)
def test_second_derivatives_are_right_on_the_reference_and_refused_on_other_backends(
    derivative: str, name: str
) -> None:
    want = TWICE[derivative](defined(name))
    torch.testing.assert_close(TWICE[derivative](losses("reference")[name]), want, rtol=1e-9, atol=1e-9)
    for backend in (None, "cpu"):
        with pytest.raises(RuntimeError, match=r"no second derivative, .*pass backend='reference'"):
            TWICE[derivative](losses(backend)[name])


@pytest.mark.parametrize("name", losses(None))
def test_first_derivatives_equal_the_definition(name: str) -> None:
    loss, query = losses("cpu")[name], QUERY.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (query,), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(losses("reference")[name], (query,))
    (want,) = torch.autograd.grad(defined(name)(query).sum(), query)
    with torch.autograd.graph.save_on_cpu():
        value = loss(query)
    for keep in (True, False):  # backward twice through one graph
        (found,) = torch.autograd.grad(value.sum(), query, retain_graph=keep)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    halved = loss(query)
    halved /= 2
    torch.testing.assert_close(torch.autograd.grad(halved.sum(), query)[0], want / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_transforms_compile(transform: str) -> None:
    def derived(query: Tensor) -> Tensor:
        return TRANSFORMS[transform](lambda x: info_nce(x + query, KEY, QUEUE))

    torch._dynamo.reset()
    fast = torch.compile(derived, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(SAME), derived(SAME), rtol=1e-9, atol=1e-9)


def test_derivatives_with_respect_to_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="key has a tangent"):
        torch.func.jvp(lambda key: info_nce(QUERY, key), (KEY,), (TOWARD,))
    with pytest.raises(ValueError, match="key requires grad"):
        torch.func.grad(lambda key: info_nce(QUERY, key))(KEY)
    with forward_ad.dual_level():
        temperature = forward_ad.make_dual(torch.ones((), dtype=F64), torch.ones((), dtype=F64))
        with pytest.raises(ValueError, match="temperature has a tangent"):
            info_nce(QUERY, KEY, temperature=temperature)


class Changes:
    """Functions that change tensors besides a differentiable computation, and a check whether they did."""

    def __init__(self, backend: str) -> None:
        self.backend, self.weight = backend, torch.nn.Parameter(rows(5, 4, 4).float())
        self.ring, self.teacher = FeatureQueue(6, 4), torch.zeros(4, 4)
        self.ema = EMA([self.teacher], [self.weight], backend=backend)
        self.start = self.ring.features.clone()

    def loss_with_pointer(self, x: Tensor) -> Tensor:
        ring = self.ring.features, self.ring.pointer
        key, same = KEY.float(), SAME.float()
        return residual_info_nce(torch.tanh(x @ self.weight), key, same, *ring, backend=self.backend)[0]

    def loss_and_enqueue(self, x: Tensor) -> Tensor:
        loss = info_nce(torch.tanh(x @ self.weight), KEY.float(), self.ring.features, backend=self.backend)
        self.ring.enqueue_(KEY.float(), backend=self.backend)
        return loss

    def fused_ema(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            fused_ema_([self.teacher], [self.weight], 0.5, backend=self.backend)
        return (x @ self.weight).tanh().sum()

    def prepared_ema(self, x: Tensor) -> Tensor:
        self.ema.update_(0.5)
        return (x @ self.weight).tanh().sum()

    def changed(self) -> bool:
        """Whether the teacher or the ring has changed."""
        return bool(self.teacher.any()) or not torch.equal(self.ring.features, self.start)


KINDS = ["loss_with_pointer", "loss_and_enqueue", "fused_ema", "prepared_ema"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_is_refused_before_any_change(kind: str, backend: str, reentrant: bool) -> None:
    changes = Changes(backend)
    query = QUERY.float().requires_grad_()
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        checkpoint(getattr(changes, kind), query, use_reentrant=reentrant)
    assert not changes.changed()
    getattr(changes, kind)(query)
    assert changes.changed()


class Recomputing(torch.autograd.Function):
    """Activation checkpointing as other libraries implement it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run, ctx.x = run, x.detach()
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, Tensor | None]:
        with torch.enable_grad():
            ctx.x.requires_grad_()
            torch.autograd.backward(ctx.run(ctx.x), upstream)
        return None, ctx.x.grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_forward_pass_is_refused(kind: str) -> None:
    changes = Changes("cpu")
    loss: Any = Recomputing.apply(getattr(changes, kind), QUERY.float().requires_grad_())
    assert changes.changed()
    features, teacher = changes.ring.features.clone(), changes.teacher.clone()
    with pytest.raises(RuntimeError, match="in a backward pass"):
        loss.backward()
    assert torch.equal(changes.ring.features, features)
    assert torch.equal(changes.teacher, teacher)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_compiled_checkpointing_is_refused_before_any_change(kind: str) -> None:
    changes = Changes("cpu")
    torch._dynamo.reset()

    def whole(query: Tensor) -> Any:
        return checkpoint(getattr(changes, kind), query, use_reentrant=False)

    with pytest.raises(RuntimeError, match="called under activation checkpointing"):
        torch.compile(whole, backend="aot_eager", fullgraph=True)(QUERY.float())
    assert not changes.changed()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_checkpointing_of_a_compiled_function_is_refused(backend: str) -> None:
    changes = Changes(backend)
    torch._dynamo.reset()
    fast = torch.compile(changes.loss_with_pointer, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="called under activation checkpointing"):
        checkpoint(fast, QUERY.float(), use_reentrant=False)
    assert not changes.changed()


def test_gradient_hooks_may_step_and_average() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    teacher = torch.zeros(2)
    optimizer = SGD([weight], lr=0.5, teacher=[teacher], ema_momentum=0.5)
    weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    (weight * 3).sum().backward()
    assert [weight.tolist(), teacher.tolist()] == [[-0.5, -0.5], [-0.25, -0.25]]


def test_torch_func_is_refused_before_any_change() -> None:
    changes = Changes("reference")
    for kind in KINDS:
        with pytest.raises(RuntimeError, match=r"torch.func does not support"):
            torch.vmap(getattr(changes, kind))(torch.stack([QUERY, TOWARD]).float())
        with pytest.raises(RuntimeError, match=r"torch.func does not support"):
            torch.func.grad(getattr(changes, kind))(QUERY.float())
    assert not changes.changed()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_push_without_grad_and_two_backward_passes(backend: str) -> None:
    changes = Changes(backend)
    with torch.no_grad():
        changes.loss_with_pointer(QUERY.float())
    assert changes.ring.pointer.item() == 3
    scored = changes.ring.features.clone()
    loss = changes.loss_with_pointer(QUERY.float())
    assert changes.ring.pointer.item() == 0
    query = torch.tanh(QUERY.float() @ changes.weight)
    same = residual_info_nce(query, KEY.float(), SAME.float(), scored, backend="reference")[0]
    (want,) = torch.autograd.grad(same, changes.weight)
    for keep in (True, False):
        (found,) = torch.autograd.grad(loss, changes.weight, retain_graph=keep)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert changes.ring.pointer.item() == 0
