"""The momentum methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastrm.config import Config, check_choice
from fastrm.device import choose_precision
from fastrm.methods.base import Method, StepOutput
from fastrm.methods.byol import BYOL
from fastrm.methods.densecl import DenseCL
from fastrm.methods.mocov2 import MoCoV2
from fastrm.methods.mocov3 import MoCoV3
from fastrm.models import build_backbone
from fastrm.models.layout import small_maps_contiguous

__all__ = ["METHODS", "Method", "StepOutput", "build_method"]

METHODS: dict[str, Callable[..., Method[Any]]] = {"mocov3": MoCoV3, "mocov2": MoCoV2, "byol": BYOL, "densecl": DenseCL}


def build_method(config: Config, *, device: torch.device | None = None, backend: str | None = None) -> Method[Any]:
    """Build the untrained backbone, heads and queues that a run's settings describe, on a device and laid out for it.

    Args:
        config: settings of the run.
        device: where it computes; None is the CPU.
        backend: of fastrm.kernels; None chooses by device.

    Raises:
        UsageError: there is no such backbone, or it does not go with the image size, the stem or the method, or a
            name is unknown.
    """
    check_choice("method", config.method.method, METHODS)
    check_choice("residual_at", config.method.residual_at)
    device = device or torch.device("cpu")
    backbone = build_backbone(
        config.model.arch,
        image_size=config.input.image_size,
        stem=config.model.stem,
        moco_vit=config.method.method == "mocov3",
    )
    method = METHODS[config.method.method](backbone, config.method, backend=backend).to(device)
    if config.device.channels_last:
        method = method.to(memory_format=torch.channels_last)
        if device.type == "cpu" and choose_precision(config.device.precision, device) == "fp32":
            for network in (method.student.backbone, method.teacher.backbone):
                small_maps_contiguous(network, config.input.image_size)
    return method
