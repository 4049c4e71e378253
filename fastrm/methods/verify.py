"""Compares the fused losses with the reference on a training batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastrm.machine.device import in_double
from fastrm.methods.base import Method, unchanged_buffers

LOSS = 1e-3
GRADIENT = 1e-2
"""Relative differences up to these limits count as rounding. With float32 features the tests allow 1e-5, but tensor
cores round products to bf16 or TF32, which have 8 and 11 bits."""


@contextmanager
def _backend(method: Method[Any], backend: str | None) -> Iterator[None]:
    kept, method.backend = method.backend, backend
    try:
        yield
    finally:
        method.backend = kept


def _leaves(encoding: Any) -> Any:
    """The encoding, detached from the network, in the same dtypes, since other dtypes use other kernels."""
    return replace(encoding, **{f.name: getattr(encoding, f.name).detach().requires_grad_() for f in fields(encoding)})


def verify(
    method: Method[Any],
    views: tuple[Tensor, ...],
    residual_weight: Tensor,
    *,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, float]:
    """Compute the loss and its gradient with the backend in use and with the reference; the host waits for both.

    Both backends get the inputs of a training step in the same dtypes; call this under training's autocast. The
    networks run once. Statistics, queues and random numbers of the run do not change.

    Args:
        method: the method, in training mode.
        views: views of a micro-batch, [B, C, H, W] each.
        residual_weight: 0-d tensor.
        scaled: scaling of the loss before the backward pass, which low-precision gradients need.

    Returns:
        ``verify_loss``, which is |fused - reference| / |reference|, and ``verify_gradient``, which is the norm of the
        difference of the gradients to all outputs of the student, over the norm of the reference's gradient. NaN if the
        reference is not finite, infinity if only the fused result is not finite.
    """
    # Gradients are enabled as in training, because a compiled network has separate code for that.
    with torch.random.fork_rng(), torch.enable_grad(), unchanged_buffers(method):
        students, teachers = method.encode(views, False)
    device = views[0].device.type
    found: list[tuple[Tensor, Tensor]] = []
    for backend in (method.backend, "reference"):
        leaves = [None if student is None else _leaves(student) for student in students]
        with _backend(method, backend), torch.enable_grad():
            loss = method.losses(leaves, teachers, residual_weight, False).loss
            inputs = [getattr(leaf, f.name) for leaf in leaves if leaf is not None for f in fields(leaf)]
            inputs += [
                p for p in method.parameters() if p.requires_grad
            ]  # such as prototypes, which only the loss uses
            with torch.autocast(device, enabled=False):  # training's backward pass runs without autocast
                gradients = torch.autograd.grad(scaled(loss), inputs, allow_unused=True)
        flat = [in_double(g.flatten()) for g in gradients if g is not None]
        found.append((in_double(loss.detach()), torch.cat(flat)))
    (loss, gradient), (wanted, reference) = found
    sizes = torch.stack([wanted.abs(), reference.norm()])
    off = torch.stack([(loss - wanted).abs(), (gradient - reference).norm()]) / sizes
    off = torch.where(sizes.isfinite(), off.nan_to_num(nan=math.inf), math.nan)
    return dict(zip(("verify_loss", "verify_gradient"), off.tolist(), strict=True))


def warning(found: Mapping[str, float]) -> str | None:
    """A message for the user; None if both agree, or if nothing finite was compared."""
    if not (found["verify_loss"] > LOSS or found["verify_gradient"] > GRADIENT):
        return None
    return (
        f"the fused loss differs from the reference by {found['verify_loss']:.2g} (rounding is at most {LOSS:g}), its "
        f"gradient by {found['verify_gradient']:.2g} (at most {GRADIENT:g}); please report it, and continue with "
        "--kernels reference"
    )
