"""Builds the optimizer of a run: parameter groups, weight decay, and the pairs of student and teacher tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from fastrm.errors import UsageError, first_line
from fastrm.kernels import EMA
from fastrm.machine.memory import exhausted
from fastrm.optim.adamw import AdamW
from fastrm.optim.lamb import fused_lamb
from fastrm.optim.lars import LARS
from fastrm.optim.sgd import SGD
from fastrm.settings.config import OptimConfig, check_value

if TYPE_CHECKING:
    from fastrm.methods import Method

Groups = list[dict[str, Any]]

LR_SCALE = "lr_scale"
"""Option of a parameter group: its factor of the learning rate; 1 if a group has none."""
_DECAYS = "decays"
"""Option of a parameter group: whether it follows a schedule of the weight decay, if there is one."""
_CLASSIFIER = "fastrm: what is in no layer"


def build_optimizer(method: Method[Any], config: OptimConfig, *, backend: str | None = None) -> Optimizer:
    """Return an optimizer of the trained parameters of ``method``; its step also averages the student into the teacher.

    Set the learning rate in ``param_groups`` and the teacher's momentum in ``optimizer.ema_momentum`` before a step.

    Tensors of one dimension or none get no weight decay: LARS excludes them itself, also from scaling, and for AdamW
    and LAMB they are a group without decay. SGD decays everything, as in MoCo-v2's publication. With ``layer_decay``
    the backbone has a group per layer; multiply the learning rate by the group's ``lr_scale``.

    Raises:
        UsageError: the optimizer is not available here, the name is unknown, or the layers of the network are unknown.
    """
    check_value("optimizer", config.optimizer)
    params = [p for p in method.parameters() if p.requires_grad]
    decay = config.weight_decay
    spared = config.optimizer in ("adamw", "lamb")
    groups: Groups = _spared(params, decay) if spared else [{"params": params, "weight_decay": decay}]
    if config.weight_decay_end is not None:
        groups = [{**group, _DECAYS: not spared or group["params"][0].ndim > 1} for group in groups]
    if config.layer_decay < 1:
        groups = _layered(groups, _scales(method, config.layer_decay))
    if config.optimizer == "lamb":
        return _lamb(method, groups)
    ordered = [p for group in groups for p in group["params"]]
    teacher, shadow = method.pair.partners()  # a predictor has none
    shared: dict[str, Any] = {"lr": 0.0, "ema_momentum": 1.0, "backend": backend}
    shared["teacher"] = [teacher.get(p) for p in ordered]
    if shadow:
        shared["shadow"] = [shadow.get(p) for p in ordered]
    if config.optimizer == "adamw":
        return AdamW(groups, **shared)
    shared["momentum"] = 0.9
    if config.optimizer == "sgd":
        return SGD(groups, **shared)
    return LARS(groups, trust_coefficient=config.trust_coefficient, **shared)


def scaled(lr: float, group: Mapping[str, Any]) -> float:
    """The learning rate of a group of parameters."""
    return lr * group.get(LR_SCALE, 1.0)


def decayed(weight_decay: float | None, group: Mapping[str, Any]) -> Any:
    """The weight decay of a group of parameters, given that of a schedule; None leaves it as it is."""
    return weight_decay if weight_decay is not None and group.get(_DECAYS, False) else group["weight_decay"]


def _layered(groups: Sequence[dict[str, Any]], scales: Mapping[nn.Parameter, float]) -> Groups:
    """Split groups into those of one scale, the smallest first."""
    found: Groups = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            by_scale.setdefault(scales.get(p, 1.0), []).append(p)
        found += [{**group, "params": by_scale[scale], LR_SCALE: scale} for scale in sorted(by_scale)]
    return found


def _scales(method: Method[Any], decay: float) -> dict[nn.Parameter, float]:
    """Factor of the learning rate for each parameter of the backbone: ``decay`` in its last layer, and in each earlier
    layer ``decay`` times that of the next (Clark et al., arXiv 2003.10555; Bao et al., arXiv 2106.08254).

    The layers are those of timm's networks. For other modules, the order of the children would be a guess: they are in
    the order of creation, which may differ from the order of computation.
    """
    from timm.models import group_parameters

    net = method.student.backbone.net
    # A classifier is added, because timm's networks had one: parameters in its layer count as a head.
    named = [*net.named_parameters(), (_CLASSIFIER, None)]
    try:
        matcher = net.group_matcher(coarse=False)
        layers = group_parameters(SimpleNamespace(named_parameters=lambda: named), matcher, reverse=True)
        shares = {p: decay ** (layers[_CLASSIFIER] - layers[name]) for name, p in named}
    except Exception as error:  # whatever a matcher, or the lack of one, leads to
        if exhausted(error):
            raise
        name = type(net).__name__
        why = "" if not hasattr(net, "group_matcher") else f" ({first_line(error)})"
        raise UsageError(
            f"--layer-decay {decay:g}: {name} does not define its layers by group_matcher(coarse) like timm's "
            f"networks do{why}; leave it out, or give {name} one"
        ) from None
    return shares


def _spared(params: list[nn.Parameter], decay: float) -> Groups:
    """Put tensors of one dimension or none into a group without weight decay."""
    groups: Groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _lamb(method: Method[Any], groups: Groups) -> Optimizer:
    """apex's FusedLAMB, with the teacher update after each step that is not skipped."""
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
