"""The momentum methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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
from fastrm.models import build_backbone, module_name
from fastrm.models.layout import lay_out
from fastrm.settings.config import Config, check_choice

__all__ = ["METHODS", "Method", "StepOutput", "build_method"]

METHODS: dict[str, Callable[..., Method[Any]]] = {"mocov3": MoCoV3, "mocov2": MoCoV2, "byol": BYOL, "densecl": DenseCL}


def build_method(
    config: Config,
    *,
    device: torch.device | None = None,
    backend: str | None = None,
    trained: bool = True,
    arch: nn.Module | None = None,
) -> Method[Any]:
    """Build the untrained backbone, heads and queues that a run's settings describe, on a device and laid out for it.

    Args:
        config: settings of the run.
        device: where it computes; None is the CPU.
        backend: of fastrm.kernels; None chooses by device.
        trained: whether it is to be trained. It then makes one pass over random images, which finds what cannot be
            trained, and freezes what gets no gradient.
        arch: a module that becomes the backbone in place of the network that the settings name; it is copied, as
            :func:`fastrm.models.build_backbone` says.

    Raises:
        UsageError: there is no such backbone, or it does not go with the image size, the stem or the method, or a
            name is unknown.
    """
    check_choice("method", config.method.method, METHODS)
    check_choice("residual_at", config.method.residual_at)
    device = device or torch.device("cpu")
    name, size = config.method.method, config.input.image_size
    wanted = config.model.arch if arch is None else arch
    backbone = build_backbone(wanted, image_size=size, stem=config.model.stem, moco_vit=name == "mocov3")
    method = METHODS[name](backbone, config.method, backend=backend).to(device)
    layout = torch.contiguous_format
    if config.device.channels_last:
        layout = torch.channels_last
        small_maps = device.type == "cpu" and choose_precision(config.device.precision, device) == "fp32"
        lay_out(method, (method.student.backbone, method.teacher.backbone) if small_maps else (), size)
    method.notes = list(backbone.notes)
    if trained:
        _try(method, config, layout, config.model.arch if arch is None else module_name(arch))
    return method


def _try(method: Method[Any], config: Config, layout: torch.memory_format, arch: str) -> None:
    """Make one pass as training does, and freeze what it does not reach."""
    name, size = config.method.method, config.input.image_size
    batch = (config.input.batch_size or 256) // (world().size * config.optim.accumulate)
    # Two images show all that more would. Where the training steps have one, that is known to fail with BatchNorm, but
    # for a BatchNorm that sees the images of all processes.
    together = world().size > 1 and not method.queues
    try:
        unused = freeze_unused(method, images=2 if together else max(1, min(2, batch)), image_size=size, layout=layout)
    except Exception as error:  # whatever a family of timm's, or a module of the user's, happens to raise
        if exhausted(error):
            raise
        order = "; --no-channels-last keeps maps in the order that view takes" if "view size" in str(error) else ""
        raise UsageError(
            f"--arch {arch} cannot be trained with --method {name} at --image-size {size}, "
            f"{batch} images per process and micro-batch: {first_line(error)}{order}"
        ) from None
    if not any(p.requires_grad for p in method.student.backbone.parameters()):
        raise UsageError(
            f"--arch {arch} cannot be trained with --method {name}: the loss does not reach any of its parameters; its "
            "forward must not detach what it gives, nor run under torch.no_grad"
        )
    if unused:
        method.notes.append(f"the loss of {name} does not reach {counted(unused)} of {arch}, which stay as they are")
