"""Which parameters are decayed, which teacher tensor follows which, and the optimizer that a run asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fastrm.errors import UsageError
from fastrm.kernels import EMA
from fastrm.optim.adamw import AdamW
from fastrm.optim.lamb import fused_lamb
from fastrm.optim.lars import LARS
from fastrm.optim.sgd import SGD
from fastrm.settings.config import OptimConfig, check_value

if TYPE_CHECKING:
    from fastrm.methods import Method


def build_optimizer(method: Method[Any], config: OptimConfig, *, backend: str | None = None) -> Optimizer:
    """Return the optimizer over what is trained of ``method``, whose step also averages the student into the teacher.

    Set the learning rate in ``param_groups`` and the teacher's momentum in ``optimizer.ema_momentum`` before a step.

    LARS leaves tensors of one dimension or none without decay and scaling by itself. AdamW and LAMB get them in a
    group without decay. SGD decays everything, as MoCo-v2 was published.

    Raises:
        UsageError: the optimizer cannot be had here, or the name is unknown.
    """
    check_value("optimizer", config.optimizer)
    params = [p for p in method.parameters() if p.requires_grad]
    decay = config.weight_decay
    if config.optimizer == "lamb":
        return _lamb(method, _groups(params, decay))
    groups = _groups(params, decay) if config.optimizer == "adamw" else []
    ordered = [p for group in groups for p in group["params"]] or params
    teacher, shadow = method.pair.partners()  # a predictor has none
    shared: dict[str, Any] = {"lr": 0.0, "ema_momentum": 1.0, "backend": backend}
    shared["teacher"] = [teacher.get(p) for p in ordered]
    if shadow:
        shared["shadow"] = [shadow.get(p) for p in ordered]
    if config.optimizer == "adamw":
        return AdamW(groups, **shared)
    shared |= {"momentum": 0.9, "weight_decay": decay}
    if config.optimizer == "sgd":
        return SGD(params, **shared)
    return LARS(params, trust_coefficient=config.trust_coefficient, **shared)


def _groups(params: list[nn.Parameter], decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _lamb(method: Method[Any], groups: list[dict[str, Any]]) -> Optimizer:
    """apex's FusedLAMB, with the teacher's average after each step that is not skipped."""
    try:
        kind = fused_lamb()
    except ImportError as error:
        raise UsageError(f"--{error}") from None
    if groups[0]["params"][0].device.type != "cuda":
        raise UsageError("--optimizer lamb: apex's FusedLAMB needs a GPU; use lars, sgd or adamw")
    optimizer: Any = kind(groups, lr=0.0)
    optimizer.ema_momentum = 1.0
    pair = method.pair
    # By name, in the order in which the teacher's parameters are averaged.
    average = EMA(pair.teacher, pair.student, shadow=list(pair.low_precision.values()) or None)
    optimizer.register_step_post_hook(lambda *_: average.update_(optimizer.ema_momentum))
    return optimizer
