"""Which parameters are decayed, and the optimizer that a run asks for."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastrm.config import OptimConfig
from fastrm.optim.adamw import AdamW
from fastrm.optim.lars import LARS
from fastrm.optim.sgd import SGD


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """Return the optimizer over the parameters of ``module`` that are trained; the learning rate is set each step.

    LARS leaves tensors of one dimension or none without decay and scaling by itself. AdamW gives them a group
    without decay. SGD decays everything, as MoCo-v2 was published.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    decay = config.weight_decay
    if config.optimizer == "lars":
        return LARS(params, lr=0.0, momentum=0.9, weight_decay=decay, trust_coefficient=config.trust_coefficient)
    if config.optimizer == "sgd":
        return SGD(params, lr=0.0, momentum=0.9, weight_decay=decay)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=0.0)
