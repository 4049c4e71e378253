"""The momentum methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastrm.errors import UsageError, first_line
from fastrm.machine.device import choose_precision
from fastrm.machine.distributed import world
from fastrm.machine.memory import exhausted
from fastrm.methods.base import Method, StepOutput
from fastrm.methods.byol import BYOL
from fastrm.methods.densecl import DenseCL
from fastrm.methods.mocov2 import MoCoV2
from fastrm.methods.mocov3 import MoCoV3
from fastrm.methods.unused import counted, freeze_unused
from fastrm.models import build_backbone
from fastrm.models.layout import guard_thin_convolutions, small_maps_contiguous
from fastrm.settings.config import Config, check_choice

__all__ = ["METHODS", "Method", "StepOutput", "build_method"]

METHODS: dict[str, Callable[..., Method[Any]]] = {"mocov3": MoCoV3, "mocov2": MoCoV2, "byol": BYOL, "densecl": DenseCL}


def build_method(
    config: Config, *, device: torch.device | None = None, backend: str | None = None, trained: bool = True
) -> Method[Any]:
    """Build the untrained backbone, heads and queues that a run's settings describe, on a device and laid out for it.

    Args:
        config: settings of the run.
        device: where it computes; None is the CPU.
        backend: of fastrm.kernels; None chooses by device.
        trained: whether it is to be trained. It then makes one pass over random images, which finds what cannot be
            trained, and freezes what gets no gradient.

    Raises:
        UsageError: there is no such backbone, or it does not go with the image size, the stem or the method, or a
            name is unknown.
    """
    check_choice("method", config.method.method, METHODS)
    check_choice("residual_at", config.method.residual_at)
    device = device or torch.device("cpu")
    name, arch, size = config.method.method, config.model.arch, config.input.image_size
    backbone = build_backbone(arch, image_size=size, stem=config.model.stem, moco_vit=name == "mocov3")
    method = METHODS[name](backbone, config.method, backend=backend).to(device)
    layout = torch.contiguous_format
    if config.device.channels_last:
        layout = torch.channels_last
        method = method.to(memory_format=layout)
        guard_thin_convolutions(method)
        if device.type == "cpu" and choose_precision(config.device.precision, device) == "fp32":
            for network in (method.student.backbone, method.teacher.backbone):
                small_maps_contiguous(network, size)
    method.notes = list(backbone.notes)
    if trained:
        _try(method, config, layout)
    return method


def _try(method: Method[Any], config: Config, layout: torch.memory_format) -> None:
    """Make one pass as training does, and freeze what it does not reach."""
    name, arch, size = config.method.method, config.model.arch, config.input.image_size
    batch = (config.input.batch_size or 256) // (world().size * config.optim.accumulate)
    # Two images show all that more would. Where the training steps have one, that is known to fail with BatchNorm, but
    # for a BatchNorm that sees the images of all processes.
    together = world().size > 1 and not method.queues
    try:
        unused = freeze_unused(method, images=2 if together else max(1, min(2, batch)), image_size=size, layout=layout)
    except Exception as error:  # whatever a family of timm's happens to raise
        if exhausted(error):
            raise
        raise UsageError(
            f"--arch {arch} cannot be trained with --method {name} at --image-size {size}, "
            f"{batch} images per process and micro-batch: {first_line(error)}"
        ) from None
    if unused:
        method.notes.append(f"the loss of {name} does not reach {counted(unused)} of {arch}, which stay as they are")
