"""BatchNorm over the batches of all processes.

``torch.nn.SyncBatchNorm`` supports only GPUs. It also indexes by a mask, so the host waits three times per layer, and
``torch.compile`` breaks its graph. This one exchanges one row per layer in each direction, on any device.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from fastrm.errors import UsageError
from fastrm.machine.distributed import world

if dist.is_available():
    from torch.distributed._functional_collectives import all_gather_tensor, all_reduce


class _Normalised(torch.autograd.Function):
    """Normalise by mean and variance over all processes; returns (output, mean, variance, values per channel)."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, axes = _precise(input), _axes(input)
        variance, mean = torch.var_mean(values, axes, correction=0)
        count = input.numel() // input.shape[1]
        own = torch.cat([mean, count * variance, mean.new_full((1,), count)])
        rows = all_gather_tensor(own[None], 0, group)
        counts, means = rows[:, -1:], rows[:, : len(mean)]
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        # Chan et al. (1979): centred second moments are merged without the cancellation of E[x^2] - E[x]^2.
        variance = (rows[:, len(mean) : -1] + counts * (means - mean).square()).sum(0) / total
        scale, shift = (None if x is None else x.to(mean.dtype) for x in (weight, bias))
        output = batch_norm(input, mean, variance, scale, shift, training=False, eps=eps)
        ctx.save_for_backward(input, scale, mean, (variance + eps).rsqrt(), total)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, total)
        return output, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, scale, mean, inverse, total = ctx.saved_tensors
        axes, shape = _axes(input), (1, -1, *(1 for _ in input.shape[2:]))
        grad, centred = _precise(grads[0]), _precise(input) - mean.view(shape)
        of_bias = grad.sum(axes)
        of_weight = (grad * centred).sum(axes) * inverse
        of_output, along = (all_reduce(torch.cat([of_bias, of_weight]), "sum", ctx.group) / total).chunk(2)
        factor = inverse if scale is None else inverse * scale
        of_input = (grad - of_output.view(shape) - centred * (along * inverse).view(shape)) * factor.view(shape)
        _, weighted, biased, *_ = ctx.needs_input_grad
        return of_input.to(input.dtype), of_weight if weighted else None, of_bias if biased else None, None, None


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _axes(input: Tensor) -> list[int]:
    """All axes except the channels."""
    return [axis for axis in range(input.ndim) if axis != 1]


def _normalised(norm: nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """Apply ``norm`` in training mode to this process's part of a batch, and update its running statistics."""
    output, mean, variance, count = _Normalised.apply(input, norm.weight, norm.bias, norm.eps, norm.group)
    if norm.track_running_stats:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = norm.num_batches_tracked.to(mean.dtype).reciprocal() if norm.momentum is None else norm.momentum
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_((variance * (count / (count - 1).clamp(min=1))).to(norm.running_var.dtype), share)
    return output


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of [N, C, …] over the batches of all processes, which may differ in size."""

    group: Any
    """Name of the process group that only these layers use."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, …]; in evaluation mode like any BatchNorm."""
        return _normalised(self, input) if self.training else super().forward(input)


@cache
def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """The replacement of each type of layer. timm, which is slow to import, is needed with several processes only."""
    from timm.layers import BatchNormAct2d

    class SynchronisedBatchNormAct(BatchNormAct2d):
        """The same for timm's layer that combines BatchNorm, drop and activation."""

        group: str

        def forward(self, x: Tensor) -> Tensor:
            """Normalise [N, C, H, W], and apply drop and activation."""
            output: Tensor = self.act(self.drop(_normalised(self, x))) if self.training else super().forward(x)
            return output

    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return {**dict.fromkeys(plain, SynchronisedBatchNorm), BatchNormAct2d: SynchronisedBatchNormAct}


def synchronise_norms(module: nn.Module) -> None:
    """Let every BatchNorm in ``module`` use the batches of all processes. Call this in all processes.

    Raises:
        UsageError: a BatchNorm has an unknown type.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    if world().size == 1 or not norms:
        return
    kinds = _kinds()
    for norm in norms:
        if type(norm) not in kinds:
            raise UsageError(
                f"{type(norm).__name__} cannot be synchronised between processes; start one process, or use "
                f"{', '.join(kind.__name__ for kind in kinds)}"
            )
    group: Any = dist.new_group()  # a separate group, so that they do not wait for the gradients of DDP
    for norm in norms:
        kind: Any = kinds[type(norm)]
        norm.__class__, norm.group = kind, group.group_name
