"""Freezes parameters that a method's loss does not reach, such as layers after the pooling in DenseCL.

With several processes, each trained parameter must get a gradient in every step. In one process, a parameter without a
gradient would not change. Freezing it in both cases keeps the runs comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrm.errors import UsageError
from fastrm.methods.base import Method, unchanged_buffers

SHOWN = 3


def freeze_unused(method: Method[Any], *, images: int, image_size: int, layout: torch.memory_format) -> list[str]:
    """Freeze parameters that get no gradient in one forward and backward pass on random images; change nothing else.

    The teacher, checkpoints and exports keep these parameters at their initial values.

    Args:
        method: the method, on its device.
        images: images per view.
        image_size: side of the images in pixels.
        layout: memory format of the images.

    Returns:
        Names of the newly frozen parameters.
    """
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    was_training, backend = method.training, method.backend
    method.train().backend = "reference"  # other backends would be compiled for these sizes
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), unchanged_buffers(method), torch.enable_grad():
            shape = (method.views, images, method.student.backbone.channels, image_size, image_size)
            views = [view.contiguous(memory_format=layout) for view in torch.randn(shape, device=device)]
            loss = method(*views, torch.zeros((), device=device)).loss
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        method.train(was_training).backend = backend
    if sparse := [
        name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None and gradient.is_sparse
    ]:
        raise UsageError(f"the gradient of {sparse[0]} is sparse, which no optimizer here takes; use sparse=False")
    unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    for name in unused:
        trained[name].requires_grad_(False)
    return unused


def counted(names: Sequence[str]) -> str:
    """The number of tensors and the first names, as text."""
    first = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({first})"
