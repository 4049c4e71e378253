"""The settings of a run, put together: the recipe's or the method's defaults first, then what is given; and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastrm.errors import UsageError
from fastrm.files import at_home
from fastrm.settings.fields import (
    KINDS,
    Config,
    DeviceConfig,
    InputConfig,
    MethodConfig,
    MethodName,
    ModelConfig,
    OptimConfig,
    ResidualPlace,
    RunConfig,
)
from fastrm.settings.kinds import check_fields, flag, problem, refuse, taken, unknown, unusable
from fastrm.settings.recipes import RECIPES

__all__ = [
    "RECIPES",
    "Config",
    "DeviceConfig",
    "InputConfig",
    "MethodConfig",
    "MethodName",
    "ModelConfig",
    "OptimConfig",
    "ResidualPlace",
    "RunConfig",
    "build",
    "check_choice",
    "check_fields",
    "check_path",
    "check_range",
    "defaults",
    "flag",
    "from_flat",
    "resolved",
    "validate",
]

# What a run uses when it names no recipe: the method's published settings, with 256 images a process.
_UNNAMED = {
    "mocov3": "mocov3-r50-100ep",
    "mocov2": "mocov2-r50-200ep",
    "byol": "byol-r50-300ep",
    "densecl": "densecl-r50-coco-800ep",
}


CHOOSING = ("recipe", "method", "arch", "epochs")
"""The settings that choose the defaults of others."""


def defaults(
    *, recipe: str | None = None, method: str | None = None, arch: str | None = None, epochs: int | None = None
) -> Config:
    """The settings that hold where no flag says otherwise, given the flags that choose them.

    Raises:
        UsageError: there is no such recipe or method.
    """
    if method is not None:
        check_choice("method", method)
    if recipe is not None:
        check_choice("recipe", recipe, RECIPES)
        values = dict(RECIPES[recipe])
    else:
        vit = (arch or "").startswith("vit_") and method in (None, "mocov3")
        values = dict(RECIPES["mocov3-vits-300ep" if vit else _UNNAMED[method or "mocov3"]])
        del values["batch_size"]
    if epochs is not None and epochs < values["epochs"]:
        values["warmup_epochs"] = min(values["warmup_epochs"], epochs / 10)
    return Config().replace(recipe=recipe, **values)


def build(**leaves: Any) -> Config:
    """Return the settings of a run from Python, as the command line would: recipe first, then what is given here.

    Raises:
        UsageError: a setting is unknown, of another kind or out of range.

    >>> build(data="digits", arch="test_resnet", image_size=32, epochs=12).optim.warmup_epochs
    1.2
    """
    leaves = in_form({name: at_home(value) for name, value in leaves.items()})
    chosen = {name: leaves[name] for name in CHOOSING if name in leaves}
    for name, value in chosen.items():
        refuse(name, problem(value, KINDS[name]))
    config = defaults(**chosen).replace(**leaves)
    validate(config)
    return config


def in_form(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, each in the form that its field has (see :func:`fastrm.settings.kinds.taken`)."""
    return {name: taken(value, KINDS.get(name)) for name, value in leaves.items()}


def from_flat(leaves: Mapping[str, Any]) -> Config:
    """Rebuild the settings that :meth:`Config.flat` wrote down.

    Raises:
        UsageError: a setting is unknown or out of range.
    """
    config = Config().replace(**in_form(leaves))
    validate(config)
    return config


def check_choice(name: str, value: object, choices: Iterable[str] | None = None) -> None:
    """Raise a UsageError unless the value of a setting is one of ``choices``; None stands for those of its field."""
    refuse(name, problem(value, KINDS[name]) if choices is None else unknown(value, choices))


def check_range(name: str, value: object) -> None:
    """Raise a UsageError unless the value of a setting is a number as its field says."""
    refuse(name, problem(value, KINDS[name]))


def check_path(name: str, value: str | Path | None) -> None:
    """Raise a UsageError if the system takes no such path; None, for unset, is fine."""
    refuse(name, None if value is None else unusable(value))


def validate(config: Config) -> None:
    """Check everything that can be checked without the data, the machine or the network.

    Raises:
        UsageError: names the flag, its value and what is right.
    """
    for group in dataclasses.fields(config):
        check_fields(getattr(config, group.name))
    check_path("resume", config.run.resume)
    if not config.input.data:
        raise UsageError("--data is missing; give a folder of images, or a named set such as digits")
    optim, method = config.optim, config.method
    if optim.warmup_epochs >= optim.epochs:
        raise UsageError(
            f"--warmup-epochs {optim.warmup_epochs:g} must be less than --epochs {optim.epochs}, which includes it"
        )
    if method.teacher_momentum > method.teacher_momentum_end:
        raise UsageError(
            f"--teacher-momentum {method.teacher_momentum} must not be above --teacher-momentum-end "
            f"{method.teacher_momentum_end}"
        )


def resolved(config: Config, processes: int) -> Config:
    """Return the settings with the batch size filled in.

    Raises:
        UsageError: the batch does not divide into processes and micro-batches of two images or more.
    """
    batch = config.input.batch_size or 256 * processes
    parts = processes * config.optim.accumulate
    if batch % parts or batch < 2 * parts:
        raise UsageError(
            f"--batch-size {batch} must be a multiple of {parts} ({processes} processes times --accumulate "
            f"{config.optim.accumulate}), and at least twice that for BatchNorm"
        )
    return config.replace(batch_size=batch)
