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
    ModelConfig,
    OptimConfig,
    ResidualPlace,
    RunConfig,
    methods,
)
from fastrm.settings.kinds import check_fields, flag, problem, refuse, taken, unknown, unusable

__all__ = [
    "Config",
    "DeviceConfig",
    "InputConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "ResidualPlace",
    "RunConfig",
    "build",
    "check_choice",
    "check_fields",
    "check_path",
    "check_value",
    "defaults",
    "flag",
    "from_flat",
    "resolved",
    "validate",
]

CHOOSING = ("recipe", "method", "arch", "epochs", "init_from")
"""The settings that choose the defaults of others."""


def defaults(
    *,
    recipe: str | None = None,
    method: str | type | None = None,
    arch: str | None = None,
    epochs: int | None = None,
    init_from: str | Path | None = None,
) -> Config:
    """The settings that hold where no flag says otherwise, given the flags that choose them.

    Args:
        recipe: a recipe's name; it says all but the epochs.
        method: a method's name, or a subclass of :class:`fastrm.methods.Method`.
        arch: the backbone's name.
        epochs: passes over the images; the warm-up takes at most a tenth of them where they are less than usual.
        init_from: weights to start from. Where no recipe says otherwise, the learning rate is then a tenth of that of a
            run from scratch (R-CNN's share: Girshick et al., arXiv 1311.2524), and the warm-up at most a twentieth of
            the epochs (5 of 100, as MAE is fine-tuned: He et al., arXiv 2111.06377).

    Raises:
        UsageError: there is no such recipe or method.
    """
    kind = methods().find(methods().names()[0] if method is None else method)
    values = {"method": kind.name, **kind.defaults(arch or "")}
    if recipe is not None:
        published = methods().recipes()
        check_choice("recipe", recipe, published)
        values = published[recipe]
    config = Config().replace(recipe=recipe, **values)
    length, usual = epochs or config.optim.epochs, config.optim
    if length < usual.epochs or "warmup_epochs" not in values:
        config = config.replace(warmup_epochs=min(usual.warmup_epochs, length / 10))
    if init_from is not None and recipe is None:
        config = config.replace(lr=usual.lr / 10, warmup_epochs=min(usual.warmup_epochs, length / 20))
    return config


def build(**leaves: Any) -> Config:
    """Return the settings of a run from Python, as the command line would: recipe first, then what is given here.

    Raises:
        UsageError: a setting is unknown, of another kind or out of range.

    >>> build(data="digits", arch="test_resnet", image_size=32, epochs=12).optim.warmup_epochs
    1.2
    """
    leaves = in_form({name: at_home(value) for name, value in leaves.items()})
    chosen = {name: leaves[name] for name in CHOOSING if name in leaves}
    if isinstance(leaves.get("method"), type):  # which need not be registered
        leaves["method"] = methods().find(leaves["method"]).name
    for name in chosen:
        refuse(name, problem(leaves[name], KINDS[name]))
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


def check_value(name: str, value: object) -> None:
    """Raise a UsageError unless the value of a setting is what its field says."""
    refuse(name, problem(value, KINDS[name]))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a UsageError unless a value is one of ``choices``."""
    refuse(name, unknown(value, choices))


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
    check_limits(config.input.value_range)
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


def check_limits(limits: tuple[float, ...] | None) -> None:
    """Raise a UsageError unless ``--value-range`` is unset, or two numbers in rising order."""
    if limits is not None and (len(limits) != 2 or limits[0] >= limits[1]):
        given = ",".join(f"{number:g}" for number in limits)
        raise UsageError(f"--value-range {given} must be two numbers, the lower one first, as in 0,4095")


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
