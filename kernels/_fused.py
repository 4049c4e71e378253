"""The losses as operators of torch.library, which torch.compile takes as they are.

An operator computes a loss together with its gradient to the queries; the backward pass only multiplies that. So it has
no autograd formula of its own: :class:`_WithGradient` ties its two results to the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _blocked, _sweep
from .dispatch import check_not_recomputed, compute_dtype

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cpu": _blocked.losses,
    "triton": _sweep.losses,
}


def _compute(
    query: Tensor,
    key: Tensor | None,
    same: Tensor | None,
    queue: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    key_offset: int,
    reduction: str,
    gradient: bool,
    backend: str,
    pointer: Tensor | None = None,
    push: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if pointer is not None:
        check_not_recomputed("residual_info_nce")
    values = [number if tensor is None else tensor for number, tensor in zip(numbers, tensors, strict=True)]
    return BACKENDS[backend](query, key, same, queue, values, key_offset, reduction, gradient, pointer, push)


def _shapes(
    query: Tensor,
    key: Tensor | None,
    same: Tensor | None,
    queue: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    key_offset: int,
    reduction: str,
    gradient: bool,
    backend: str,
    *ring: Tensor,
) -> tuple[Tensor, Tensor]:
    if ring:
        check_not_recomputed("residual_info_nce")
    dtype = compute_dtype(query, key, same, queue)
    losses = query.new_empty(query.shape[0] if reduction == "none" else 3, dtype=dtype)
    return losses, query.new_empty(query.shape if gradient else (0,), dtype=dtype)


# `numbers` are the temperature, the residual and the contrastive weight; a tensor stands in for the number beside it.
_ARGUMENTS = (
    "Tensor query, Tensor? key, Tensor? same, {queue}, float[] numbers, Tensor?[] tensors, SymInt key_offset, "
    "str reduction, bool gradient, str backend"
)
_losses = torch.library.custom_op(
    "fastrm::losses",
    _compute,
    mutates_args=(),
    schema=f"({_ARGUMENTS.format(queue='Tensor? queue')}) -> (Tensor, Tensor)",
)
_losses_and_push = torch.library.custom_op(
    "fastrm::losses_and_push",
    _compute,
    mutates_args=("queue", "pointer"),
    schema=f"({_ARGUMENTS.format(queue='Tensor(a!) queue')}, Tensor(b!) pointer, Tensor push) -> (Tensor, Tensor)",
)
_losses.register_fake(_shapes)
_losses_and_push.register_fake(_shapes)


class _WithGradient(torch.autograd.Function):
    """The loss as it is, whose gradient to the query is known: numbers, in which the query is not seen any more."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = query.dtype
        return loss.data  # no view, which could not be changed in place: loss /= 2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "info_nce, residual_loss, residual_info_nce: the fused backends have no second derivative, which "
                "create_graph=True asks for; pass backend='reference'"
            )
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.unsqueeze(-1)).to(ctx.dtype), None, None


def differentiable(
    backend: str,
    query: Tensor,
    key: Tensor | None,
    same: Tensor | None,
    queue: Tensor | None,
    numbers: Sequence[float | Tensor],
    key_offset: int,
    reduction: str,
    *ring: Tensor,
) -> tuple[Tensor, Tensor]:
    """InfoNCE and the residual term, weighted and summed, and then the push into the queue.

    Args:
        backend: of ``BACKENDS``.
        query: [N, D].
        key: as in :func:`fastrm.kernels.info_nce`, or None for no contrast.
        same: [N, D] teacher outputs on the same view, or None for no residual term.
        queue: [K, D] or None.
        numbers: temperature, residual weight, contrastive weight.
        key_offset: as in :func:`fastrm.kernels.info_nce`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ring: pointer and keys to push, or nothing.

    Returns:
        The loss with its graph, and all losses: like the loss for ``"none"``, else [3], sum, contrastive, residual.
    """
    gradient = query.requires_grad and torch.is_grad_enabled()
    losses, to_query = (_losses_and_push if ring else _losses)(
        query.detach(),
        key,
        same,
        queue,
        [0.0 if isinstance(number, Tensor) else float(number) for number in numbers],
        [number if isinstance(number, Tensor) else None for number in numbers],
        key_offset,
        reduction,
        gradient,
        backend,
        *ring,
    )
    loss = losses if reduction == "none" else losses[0]
    return _WithGradient.apply(query, loss, to_query) if gradient else loss, losses
