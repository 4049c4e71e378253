"""Checks that an optimizer can continue exactly from a loaded state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastrm.kernels.dispatch import check_strided
from fastrm.kernels.sharding import check_alike, local

# Options of torch's optimizers that change the result of a step, with the value that these optimizers implement.
FIXED = {"maximize": False, "amsgrad": False, "differentiable": False}

# Options without effect here: how torch computes a step, parameter names, and values of schedulers.
HARMLESS = {
    "params", "param_names", "foreach", "fused", "capturable", "initial_lr", "swa_lr", "max_lr", "min_lr",
    "base_momentum", "max_momentum",
}  # fmt: skip


def check_group(op: str, where: str, group: Mapping[str, Any], needed: set[str], known: set[str]) -> None:
    """Raise unless a group of a state has the options ``needed``, and otherwise only ``known`` or harmless ones.

    The options alone identify an optimizer: NAdam has one more than AdamW, and RAdam one less.
    """
    theirs = set() if "ema_momentum" in group else {"amsgrad"} & known  # torch's Adam and AdamW have it, others do not
    for name in sorted((needed | theirs) - group.keys()):
        raise ValueError(f"{op}: {where} has no {name!r}, so it is another optimizer's")
    for name, value in FIXED.items():
        if group.get(name, value) != value:
            raise ValueError(f"{op}: {where} has {name}={group[name]}; only {name}={value} can be continued")
    if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
        raise ValueError(
            f"{op}: {where} has weight_decay={group['weight_decay']} as a part of the gradient (Adam's), which AdamW "
            "does not have; only decoupled_weight_decay=True can be continued"
        )
    for name in sorted(group.keys() - needed - known - HARMLESS - FIXED.keys()):
        raise ValueError(
            f"{op}: {where} has {name}={group[name]!r}, an option of another optimizer; if it is your own, give the "
            "groups of this optimizer the same option"
        )


def check_state(op: str, state: Mapping[Any, Any], names: frozenset[str], optional: bool) -> None:
    """Raise unless ``state`` has ``names`` for each parameter (or nothing), of the parameter's shape.

    ``optional`` allows ``None`` for a name.
    """
    for i, (param, values) in enumerate(state.items()):
        if not isinstance(param, Tensor):
            raise ValueError(f"{op}: state[{param!r}] is for a parameter that the groups do not have")
        for name in sorted(values.keys() - names):
            raise ValueError(f"{op}: state[{i}] has {name!r}, which is another optimizer's")
        for name in sorted(names - values.keys() if values else ()):
            raise ValueError(f"{op}: state[{i}] has no {name!r}")
        for name, value in values.items():
            if name == "step":
                if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
                    raise ValueError(f"{op}: state[{i}]['step'] is {value!r}; it must be a number")
            elif not (value is None and optional):
                check_strided(op, f"state[{i}][{name!r}]", local(value))
                if value.shape != param.shape:
                    raise ValueError(
                        f"{op}: state[{i}][{name!r}] has shape {tuple(value.shape)}; the parameter has "
                        f"{tuple(param.shape)}"
                    )
                check_alike(op, parameter=param, **{name: value})
