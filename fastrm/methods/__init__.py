"""The momentum methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastrm.config import MethodConfig
from fastrm.methods.base import Method, StepOutput
from fastrm.methods.byol import BYOL
from fastrm.methods.densecl import DenseCL
from fastrm.methods.mocov2 import MoCoV2
from fastrm.methods.mocov3 import MoCoV3
from fastrm.models import Backbone

__all__ = ["METHODS", "Method", "StepOutput", "build_method"]

METHODS: dict[str, Callable[..., Method[Any]]] = {"mocov3": MoCoV3, "mocov2": MoCoV2, "byol": BYOL, "densecl": DenseCL}


def build_method(backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> Method[Any]:
    """Return the configured method on ``backbone``; ``backend`` is that of fastrm.kernels, None by device."""
    return METHODS[config.method](backbone, config, backend=backend)
