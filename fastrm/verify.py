"""The fused losses against the reference, on a batch that is being trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

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
    """The encoding, cut off from the network."""
    return replace(
        encoding, **{f.name: getattr(encoding, f.name).detach().float().requires_grad_() for f in fields(encoding)}
    )


def verify(method: Method[Any], views: tuple[Tensor, ...], residual_weight: Tensor) -> dict[str, float]:
    """Compute loss and gradient once more with the backend in use and with the reference; the host waits for both.

    The networks run once, and nothing of the run changes: neither statistics nor queues nor random numbers.

    Args:
        method: in training mode.
        views: two views of a micro-batch.
        residual_weight: 0-d.

    Returns:
        ``verify_loss``: |fused - reference| / |reference|; ``verify_gradient``: the norm of the gradients' difference,
        by all that the student gives, over the norm of the reference's.
    """
    with torch.random.fork_rng(), torch.no_grad(), unchanged_buffers(method):
        students = [method.encode_student(view) for view in views[: method.directions]]
        teachers = [method.encode_teacher(view) for view in views]
    found: list[tuple[Tensor, Tensor]] = []
    for backend in (method.backend, "reference"):
        leaves = [_leaves(student) for student in students]
        with _backend(method, backend), torch.enable_grad():
            loss = method.losses(leaves, teachers, residual_weight, False).loss
            inputs = [getattr(leaf, f.name) for leaf in leaves for f in fields(leaf)]
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        flat = [g.flatten().double() for g in gradients if g is not None]
        found.append((loss.detach().double(), torch.cat(flat)))
    (loss, gradient), (wanted, reference) = found
    off = torch.stack([(loss - wanted).abs() / wanted.abs(), (gradient - reference).norm() / reference.norm()])
    return dict(zip(("verify_loss", "verify_gradient"), off.tolist(), strict=True))


def warning(found: Mapping[str, float]) -> str | None:
    """What to tell the person who runs it; None where both agree."""
    if found["verify_loss"] <= LOSS and found["verify_gradient"] <= GRADIENT:
        return None
    return (
        f"the fused loss is {found['verify_loss']:.2g} from the reference (at most {LOSS:g} is rounding) and its "
        f"gradient {found['verify_gradient']:.2g} (at most {GRADIENT:g}); please report it, and go on with "
        "--kernels reference"
    )
