"""The fused losses against the reference, on a batch that is being trained on."""

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
"""Largest differences, relative, that are taken for rounding: with float32 features the tests hold both to 1e-5, but
tensor cores round the products of a sweep to bf16 or TF32, of 8 and 11 bits."""


@contextmanager
def _backend(method: Method[Any], backend: str | None) -> Iterator[None]:
    kept, method.backend = method.backend, backend
    try:
        yield
    finally:
        method.backend = kept


def _leaves(encoding: Any) -> Any:
    """The encoding, cut off from the network, in its own dtypes: another one would be another kernel."""
    return replace(encoding, **{f.name: getattr(encoding, f.name).detach().requires_grad_() for f in fields(encoding)})


def verify(
    method: Method[Any],
    views: tuple[Tensor, ...],
    residual_weight: Tensor,
    *,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, float]:
    """Compute loss and gradient once more with the backend in use and with the reference; the host waits for both.

    Both get what training gives the operations, in the same dtypes; call it under the autocast that training runs
    under. The networks run once, and nothing of the run changes: neither statistics nor queues nor random numbers.

    Args:
        method: in training mode.
        views: two views of a micro-batch.
        residual_weight: 0-d.
        scaled: what training makes of the loss before its gradient, which may have few bits.

    Returns:
        ``verify_loss``: |fused - reference| / |reference|; ``verify_gradient``: the norm of the gradients' difference,
        by all that the student gives, over the norm of the reference's. NaN where the reference's are not finite, and
        infinity where only the others are not.
    """
    # With gradients as in training, for which a compiled network has code of its own.
    with torch.random.fork_rng(), torch.enable_grad(), unchanged_buffers(method):
        students, teachers = method.encode(views, False)
    device = views[0].device.type
    found: list[tuple[Tensor, Tensor]] = []
    for backend in (method.backend, "reference"):
        leaves = [None if student is None else _leaves(student) for student in students]
        with _backend(method, backend), torch.enable_grad():
            loss = method.losses(leaves, teachers, residual_weight, False).loss
            inputs = [getattr(leaf, f.name) for leaf in leaves if leaf is not None for f in fields(leaf)]
            inputs += [p for p in method.parameters() if p.requires_grad]  # such as prototypes, which no network uses
            with torch.autocast(device, enabled=False):  # backward is not under it
                gradients = torch.autograd.grad(scaled(loss), inputs, allow_unused=True)
        flat = [in_double(g.flatten()) for g in gradients if g is not None]
        found.append((in_double(loss.detach()), torch.cat(flat)))
    (loss, gradient), (wanted, reference) = found
    sizes = torch.stack([wanted.abs(), reference.norm()])
    off = torch.stack([(loss - wanted).abs(), (gradient - reference).norm()]) / sizes
    off = torch.where(sizes.isfinite(), off.nan_to_num(nan=math.inf), math.nan)
    return dict(zip(("verify_loss", "verify_gradient"), off.tolist(), strict=True))


def warning(found: Mapping[str, float]) -> str | None:
    """What to tell the person who runs it; None where both agree, or where there was nothing finite to compare."""
    if not (found["verify_loss"] > LOSS or found["verify_gradient"] > GRADIENT):
        return None
    return (
        f"the fused loss is {found['verify_loss']:.2g} from the reference (at most {LOSS:g} is rounding) and its "
        f"gradient {found['verify_gradient']:.2g} (at most {GRADIENT:g}); please report it, and go on with "
        "--kernels reference"
    )
