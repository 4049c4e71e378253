"""SGD with the teacher update inside the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fastrm.kernels import optim as launches
from fastrm.kernels.dispatch import check_scalar
from fastrm.kernels.sharding import local, rebuilt
from fastrm.optim._base import TeacherOptimizer
from fastrm.optim._tensors import fastest


class SGD(TeacherOptimizer):
    """``torch.optim.SGD`` that also averages the parameters into a teacher, in one launch on a GPU.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``; ``lr`` may be a 0-d tensor.
        teacher, ema_momentum, shadow, backend: as in :class:`fastrm.optim.LARS`.

    Raises:
        ValueError, TypeError: as in :class:`fastrm.optim.LARS`.
    """

    _launch = launches.MomentumLaunch
    _buffers = frozenset({"momentum_buffer"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        teacher: Iterable[Tensor | None] | None = None,
        ema_momentum: float | Tensor | None = None,
        shadow: Iterable[Tensor | None] | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, teacher=teacher, ema_momentum=ema_momentum, shadow=shadow, backend=backend)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_scalar("SGD", "momentum", group["momentum"], low=0)
        check_scalar("SGD", "dampening", group["dampening"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("SGD: nesterov needs a momentum above 0 and no dampening")

    def _step_triton(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        dampened = [group for group in self.param_groups if group["momentum"] and group["dampening"]]
        if all(self._start(group, grad_scale, found_inf) for group in dampened):
            super()._step_triton(grad_scale, found_inf)

    def _start(self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Make a dampened group's buffers before their first step; False if that step is skipped.

        torch starts a buffer with the whole first gradient, whatever the dampening: start it where the launch makes
        that of it. A first step that is skipped must not count, and only here does the host have to wait to see that.
        """
        fresh = [p for p in group["params"] if p.grad is not None and self.state[p].get("momentum_buffer") is None]
        if fresh and found_inf is not None and found_inf.item():
            return False
        share = group["dampening"] / group["momentum"]
        for p in fresh:
            grad = p.grad if grad_scale is None else p.grad / grad_scale
            self.state[p]["momentum_buffer"] = torch.empty_like(p).copy_((grad + group["weight_decay"] * p) * share)
        return True

    def _keeps(self, group: dict[str, Any]) -> bool:
        return isinstance(group["momentum"], Tensor) or group["momentum"] != 0  # a tensor's value is not read

    def _state(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> list[Tensor]:
        if not self._keeps(group):
            return []
        state = self.state[param]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(param)
        return [state["momentum_buffer"]]

    def _options(self, group: dict[str, Any]) -> list[float | Tensor]:
        share = 1 - group["dampening"]
        return [group["lr"], group["momentum"], group["weight_decay"], share, float(group["nesterov"])]

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        names = ("momentum", "dampening", "weight_decay", "nesterov")
        (values, slopes, velocities), way = fastest(params, grads, buffers)
        options = {name: group[name] for name in names} | way
        sgd(values, slopes, velocities, lr=float(group["lr"]), maximize=False, **options)
        if group["momentum"]:
            for p, buffer, new in zip(params, buffers, velocities, strict=True):
                if buffer is None:  # torch made it, like the gradient that it got
                    part = local(p)
                    new = new if new.shape == part.shape else new.as_strided(part.shape, part.stride())
                    self.state[p]["momentum_buffer"] = rebuilt(new, p)
