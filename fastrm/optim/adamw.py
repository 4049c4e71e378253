"""AdamW with the teacher update inside the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fastrm.kernels import optim as launches
from fastrm.kernels.dispatch import check_scalar
from fastrm.kernels.sharding import is_fake
from fastrm.optim._base import TeacherOptimizer
from fastrm.optim._tensors import fastest


class AdamW(TeacherOptimizer):
    """``torch.optim.AdamW`` that also averages the parameters into a teacher, in one launch on a GPU.

    Args:
        params, lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``; ``lr`` may be a 0-d tensor.
        teacher, ema_momentum, shadow, backend: as in :class:`fastrm.optim.LARS`.

    Raises:
        ValueError, TypeError: as in :class:`fastrm.optim.LARS`.
    """

    _launch = launches.AdamWLaunch
    _buffers = frozenset({"step", "exp_avg", "exp_avg_sq"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        teacher: Iterable[Tensor | None] | None = None,
        ema_momentum: float | Tensor | None = None,
        shadow: Iterable[Tensor | None] | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, teacher=teacher, ema_momentum=ema_momentum, shadow=shadow, backend=backend)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_scalar("AdamW", "eps", group["eps"], low=0)
        for i, beta in enumerate(group["betas"]):
            check_scalar("AdamW", f"betas[{i}]", beta, low=0)
            if beta >= 1:
                raise ValueError(f"AdamW: betas[{i}]={beta} must be below 1")

    def _state(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> list[Tensor]:
        """First and second moment, and the number of steps: on a GPU if the parameter is, where a launch counts it."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        where = param.device if param.is_cuda else "cpu"
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=where)
        return [state["exp_avg"], state["exp_avg_sq"], state["step"]]

    def _options(self, group: dict[str, Any]) -> list[float | Tensor]:
        return [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        states = [self._state(group, p, g) for p, g in zip(params, grads, strict=True)]
        first, second, steps = (list(column) for column in zip(*states, strict=True))
        (values, slopes, first, second), way = fastest(params, grads, first, second)
        if is_fake(values[0]):  # the other way reads the step count
            way = {"fused": True, "foreach": False}
        adamw(
            values, slopes, first, second, [], steps, **way,
            capturable=steps[0].is_cuda, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=float(group["lr"]),
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
