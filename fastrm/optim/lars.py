"""LARS (You et al., arXiv 1708.03888), as MoCo-v3 and BYOL use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD with momentum whose update of each weight is scaled to the weight's own norm.

    For tensors of more than one dimension::

        update = grad + weight_decay * param
        update *= trust_coefficient * |param| / |update|      (left as it is where a norm is 0)
        buffer = momentum * buffer + update
        param -= lr * buffer

    Tensors of one dimension or none (biases, norm scales) get no decay and no scaling.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, at least 0.
        momentum: from 0 to 1.
        weight_decay: at least 0.
        trust_coefficient: above 0.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        for name, value, fine in (
            ("lr", lr, lr >= 0),
            ("momentum", momentum, 0 <= momentum <= 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("trust_coefficient", trust_coefficient, trust_coefficient > 0),
        ):
            if not fine:
                raise ValueError(f"LARS: {name}={value} is out of range")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update the parameters from their gradients; those without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        update = param.grad
        assert update is not None
        if param.ndim > 1:
            update = update.add(param, alpha=group["weight_decay"])
            norms = param.norm(), update.norm()
            trust = group["trust_coefficient"] * norms[0] / norms[1]
            # `where`, not `if`: reading a norm would make the host wait for the device.
            update = update * torch.where((norms[0] > 0) & (norms[1] > 0), trust, 1.0)
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        param.sub_(buffer * group["lr"])
