"""LARS with the teacher update inside the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastrm.kernels import optim as launches
from fastrm.kernels.dispatch import check_scalar
from fastrm.kernels.sharding import is_sharded, local, rebuilt
from fastrm.optim._base import TeacherOptimizer


class LARS(TeacherOptimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as used for large batches by MoCo-v3 and BYOL.

    For a tensor of more than one dimension::

        update = grad + weight_decay * param
        update = update * trust_coefficient * |param| / |update|      where both norms are above 0

    For a tensor of one dimension or none (biases, normalisation layers), ``update = grad``. Then::

        buffer = momentum * buffer + update
        param  = param - lr * buffer
        teacher = ema_momentum * teacher + (1 - ema_momentum) * param        where there is a teacher

    On a GPU this takes two launches for the whole model. Norms are summed in a fixed order, so two runs give the same
    bits. A parameter without a gradient stays as it is, and is still averaged into its teacher.

    Args:
        params: parameters or groups; every option but ``teacher`` and ``shadow`` may differ by group.
        lr: learning rate, a number or a 0-d tensor (which a CUDA graph reads at each replay).
        momentum: momentum of the buffer.
        weight_decay: factor by which a parameter is added to its gradient.
        trust_coefficient: coefficient of the scaling above.
        teacher: tensors aligned with the parameters, in the order of the groups, ``None`` for a parameter without
            one; dtypes may differ from theirs.
        ema_momentum: the teacher's momentum, a number from 0 to 1 or a 0-d tensor; settable at any time, as
            ``optimizer.ema_momentum`` or in a group. Wrappers such as Accelerate's hand on no attributes: set it in
            their ``param_groups``.
        shadow: low-precision copies of the teacher, written in the same pass.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``; the last two are plain PyTorch.

    Raises:
        ValueError, TypeError: an option is out of range, teacher or shadow do not fit the parameters, or the backend
            is not available.
    """

    _launch = launches.LARSLaunch
    _buffers = frozenset({"momentum_buffer"})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 0.001,
        *,
        teacher: Iterable[Tensor | None] | None = None,
        ema_momentum: float | Tensor | None = None,
        shadow: Iterable[Tensor | None] | None = None,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults, teacher=teacher, ema_momentum=ema_momentum, shadow=shadow, backend=backend)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        check_scalar("LARS", "momentum", group["momentum"], low=0)
        check_scalar("LARS", "trust_coefficient", group["trust_coefficient"], low=0)

    def _state(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> list[Tensor]:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return [state["momentum_buffer"]]

    def _options(self, group: dict[str, Any]) -> list[float | Tensor]:
        return [group["lr"], group["momentum"], group["weight_decay"], group["trust_coefficient"], 0.0]

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        # Tensor by tensor, not operation by operation: each operation finds the result of the last one in the cache.
        for param, grad in zip(params, grads, strict=True):
            part, buffer = local(param), local(self._state(group, param, grad)[0]).mul_(group["momentum"])
            if param.ndim > 1:
                update = grad.add(part, alpha=group["weight_decay"])
                norms = _norm(param), _norm(rebuilt(update, param))
                trust = group["trust_coefficient"] * norms[0] / norms[1]
                buffer.addcmul_(update, torch.where((norms[0] > 0) & (norms[1] > 0), trust, 1.0))
            else:
                buffer.add_(grad)
            part.add_(buffer, alpha=-float(group["lr"]))


def _norm(tensor: Any) -> Tensor:
    """The norm of the whole tensor, also if each process holds a part of it."""
    return tensor.norm().full_tensor() if is_sharded(tensor) else tensor.norm()
