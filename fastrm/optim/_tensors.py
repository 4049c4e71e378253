"""The tensors of an optimizer: checks of gradients and state, and their order for torch's implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrm.kernels.multi_tensor import flat, in_order
from fastrm.kernels.sharding import check_alike, is_sharded, local


def check_held(name: str, param: Tensor, state: Mapping[str, Tensor], partners: Sequence[Tensor]) -> None:
    """Raise unless a launch can read the state, teacher and shadow of a parameter element by element like itself."""
    held = [(key, x, param.dtype) for key, x in state.items() if key != "step"]
    for key, x, dtype in [*held, *(("teacher", x, x.dtype) for x in partners)]:
        if (x.shape, x.device, x.dtype) != (param.shape, param.device, dtype):
            raise ValueError(
                f"{name}: a parameter is {param.dtype} {tuple(param.shape)} on {param.device}, and its {key} {x.dtype} "
                f"{tuple(x.shape)} on {x.device}, as after a conversion of the model; make the optimizer after it, or "
                "let load_state_dict(optimizer.state_dict()) convert the state"
            )


def dense(name: str, params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of ``params``; raises if one is sparse, or not sharded like its parameter."""
    grads = [param.grad for param in params]
    if any(grad is not None and grad.is_sparse for grad in grads):
        raise TypeError(f"{name}: a gradient is sparse; only dense gradients are supported")
    for param, grad in zip(params, grads, strict=True):
        if is_sharded(param) or is_sharded(grad):
            check_alike(name, parameter=param, gradient=grad)
    return grads  # type: ignore[return-value]


def fastest(*columns: Sequence[Any]) -> tuple[list[list[Any]], dict[str, Any]]:
    """Choose torch's implementation of a rule, and return it with its arguments: parameters, gradients and state.

    On the CPU it is "fused", one pass over everything. This implementation reads all tensors as flat, whatever their
    strides, and copies those that are not in the order of their dimensions, so it gets flat views. If the strides of a
    row differ, or on another device, it is "foreach", one list at a time. Of DTensors, it gets the local parts.
    """
    columns = tuple([local(x) for x in column] for column in columns)
    rows = [[x for x in row if x is not None] for row in zip(*columns, strict=True)]
    fused = all(
        row[0].device.type == "cpu"
        and flat(*row)
        and all((x.dtype, x.shape) == (row[0].dtype, row[0].shape) for x in row)
        for row in rows
    )
    arranged = [in_order(column) if fused else list(column) for column in columns]
    return arranged, {"fused": fused, "foreach": not fused}


def momentum_unless(found_inf: Tensor | None, momentum: float | Tensor, device: torch.device) -> float | Tensor:
    """``momentum``, or 1 on a skipped step, which keeps the teacher as it is; does not read ``found_inf`` on the
    host."""
    if found_inf is None:
        return momentum
    dtype = torch.float32 if device.type == "mps" else torch.float64
    value = torch.as_tensor(momentum, dtype=dtype, device=device)
    return torch.where(found_inf.to(device).reshape(()) != 0, 1.0, value)
