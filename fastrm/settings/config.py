"""Builds and checks the settings of a run: first the defaults of recipe or method, then the given values."""

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
"""Settings that determine the defaults of others."""


def defaults(
    *,
    recipe: str | None = None,
    method: str | type | None = None,
    arch: str | None = None,
    epochs: int | None = None,
    init_from: str | Path | None = None,
) -> Config:
    """Return the default settings for the given recipe, method and backbone.

    Args:
        recipe: name of a recipe, which sets everything but the epochs.
        method: name of a method, or a subclass of :class:`fastrm.methods.Method`.
        arch: name of the backbone.
        epochs: passes over the images; if they are fewer than usual, the warm-up takes at most a tenth of them.
        init_from: weights to start from. If no recipe is given, the learning rate is then a tenth of that of a run from
            scratch (as in R-CNN: Girshick et al., arXiv 1311.2524), and the warm-up is at most a twentieth of the
            epochs (as for fine-tuning MAE: He et al., arXiv 2111.06377).

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
    """Return the settings of a run, like the command line: first the recipe, then the values given here.

    Raises:
        UsageError: a setting is unknown, of the wrong type or out of range.

    >>> build(data="digits", arch="test_resnet", image_size=32, epochs=12).optim.warmup_epochs
    1.2
    """
    leaves = in_form({name: at_home(value) for name, value in leaves.items()})
    chosen = {name: leaves[name] for name in CHOOSING if name in leaves}
    if isinstance(leaves.get("method"), type):  # it need not be registered
        leaves["method"] = methods().find(leaves["method"]).name
    for name in chosen:
        refuse(name, problem(leaves[name], KINDS[name]))
    config = defaults(**chosen).replace(**leaves)
    validate(config)
    return config


def in_form(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, each converted to the type of its field (see :func:`fastrm.settings.kinds.taken`)."""
    return {name: taken(value, KINDS.get(name)) for name, value in leaves.items()}


def from_flat(leaves: Mapping[str, Any]) -> Config:
    """Rebuild the settings from the output of :meth:`Config.flat`.

    Raises:
        UsageError: a setting is unknown or out of range.
    """
    config = Config().replace(**in_form(leaves))
    validate(config)
    return config


def check_value(name: str, value: object) -> None:
    """Raise a UsageError unless a value fits the type of its setting."""
    refuse(name, problem(value, KINDS[name]))


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise a UsageError unless a value is one of ``choices``."""
    refuse(name, unknown(value, choices))


def check_path(name: str, value: str | Path | None) -> None:
    """Raise a UsageError if the system does not accept a path; None means that none is set."""
    refuse(name, None if value is None else unusable(value))


def validate(config: Config) -> None:
    """Check everything that can be checked without the data, the machine or the network.

    Raises:
        UsageError: a value is wrong; the message names the flag, its value and what is right.
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
    if optim.min_lr > optim.lr:
        raise UsageError(f"--min-lr {optim.min_lr:g} must not be above --lr {optim.lr:g}, which falls to it")
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
        UsageError: the batch cannot be divided into processes and micro-batches of at least two images.
    """
    batch = config.input.batch_size or 256 * processes
    parts = processes * config.optim.accumulate
    if batch % parts or batch < 2 * parts:
        raise UsageError(
            f"--batch-size {batch} must be a multiple of {parts} ({processes} processes times --accumulate "
            f"{config.optim.accumulate}), and at least twice that for BatchNorm"
        )
    return config.replace(batch_size=batch)
