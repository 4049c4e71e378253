"""The losses as operators of torch.library, which torch.compile does not trace into.

An operator computes a loss together with its gradient to the queries; the backward pass only multiplies this gradient.
The operator therefore has no autograd formula: :class:`_WithGradient` connects its two results to the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _blocked, _sweep
from ._scoring import Scoring, numbers_of
from .dispatch import check_not_recomputed, compute_dtype

BACKENDS: dict[str, Callable[[Scoring, bool], tuple[Tensor, Tensor]]] = {
    "cpu": _blocked.blocked_losses,
    "triton": _sweep.swept_losses,
}


def _gathered(
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
) -> tuple[Scoring, bool, str]:
    """Rebuild the structured arguments from an operator's flat ones."""
    if pointer is not None:
        check_not_recomputed("residual_info_nce")
    temperature, residual, contrastive = (
        number if tensor is None else tensor for number, tensor in zip(numbers, tensors, strict=True)
    )
    weights = {"residual_weight": residual, "contrastive_weight": contrastive}
    scoring = Scoring(
        query, key, same, queue, pointer, push, temperature, **weights, key_offset=key_offset, reduction=reduction
    )
    return scoring, gradient, backend


def _compute(*flat: Any) -> tuple[Tensor, Tensor]:
    scoring, gradient, backend = _gathered(*flat)
    return BACKENDS[backend](scoring, gradient)


def _shapes(*flat: Any) -> tuple[Tensor, Tensor]:
    scoring, gradient, _ = _gathered(*flat)
    query = scoring.query
    dtype = compute_dtype(query, scoring.key, scoring.same, scoring.queue)
    losses = query.new_empty(query.shape[0] if scoring.reduction == "none" else 3, dtype=dtype)
    return losses, query.new_empty(query.shape if gradient else (0,), dtype=dtype)


# `numbers` are the temperature, the residual and the contrastive weight; a tensor replaces the number at its index.
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
    """Returns the loss unchanged, and attaches its precomputed gradient to the query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = query.dtype
        return loss.data  # not a view, which would forbid in-place changes such as loss /= 2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "info_nce, residual_loss, residual_info_nce: the fused backends have no second derivative, which "
                "create_graph=True needs; pass backend='reference'"
            )
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.unsqueeze(-1)).to(ctx.dtype), None, None


def differentiable(backend: str, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """InfoNCE and the residual term, weighted and summed, and then the push into the queue.

    Args:
        backend: name in ``BACKENDS``.
        scoring: arguments of the loss.

    Returns:
        The loss with its graph, and all losses: for ``"none"`` the same as the loss, otherwise [3], with sum,
        contrastive and residual loss.
    """
    query, pointer, push = scoring.query, scoring.pointer, scoring.push
    gradient = query.requires_grad and torch.is_grad_enabled()
    flat = (
        query.detach(),
        scoring.key,
        scoring.same,
        scoring.queue,
        [0.0 if isinstance(number, Tensor) else float(number) for number in numbers_of(scoring)],
        [number if isinstance(number, Tensor) else None for number in numbers_of(scoring)],
        scoring.key_offset,
        scoring.reduction,
        gradient,
        backend,
    )
    losses, to_query = _losses(*flat) if pointer is None else _losses_and_push(*flat, pointer, push)
    loss = losses if scoring.reduction == "none" else losses[0]
    return _WithGradient.apply(query, loss, to_query) if gradient else loss, losses
