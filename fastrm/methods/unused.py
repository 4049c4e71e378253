"""Parameters that a method's loss does not reach, such as what stands behind the pooling where DenseCL takes the map.

Over several processes each parameter that is trained must get a gradient in every step; alone, one that gets none would
stay as it is. So it is frozen, in both cases, and the runs stay comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrm.methods.base import Method, unchanged_buffers

SHOWN = 3


def freeze_unused(method: Method[Any], *, images: int, image_size: int, layout: torch.memory_format) -> list[str]:
    """Freeze what gets no gradient in one forward and backward on random images, which changes nothing else.

    The teacher, checkpoints and exports keep these parameters, at their first values.

    Args:
        method: on its device.
        images: how many of them a view has.
        image_size: side of the images in pixels.
        layout: memory format of the images.

    Returns:
        Names of the parameters that are frozen now and were not before.
    """
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    was_training, backend = method.training, method.backend
    method.train().backend = "reference"  # others would be compiled for these sizes
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), unchanged_buffers(method), torch.enable_grad():
            shape = (method.views, images, method.student.backbone.channels, image_size, image_size)
            views = [view.contiguous(memory_format=layout) for view in torch.randn(shape, device=device)]
            loss = method(*views, torch.zeros((), device=device)).loss
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    finally:
        method.train(was_training).backend = backend
    unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    for name in unused:
        trained[name].requires_grad_(False)
    return unused


def counted(names: Sequence[str]) -> str:
    """How many tensors, and the first of them by name."""
    first = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({first})"
