"""Checks the value of a setting against the type of its field, and refuses others in one line."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastrm.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The range of a number, as in ``Annotated[float, Range(above=0, at_most=1)]``; it must always be finite."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf

    def problem(self, value: float) -> str | None:
        """What is wrong with a number; None if nothing is."""
        # Not math.isfinite, which raises for an int that no float can hold.
        if value >= self.at_least and value > self.above and value <= min(self.at_most, sys.float_info.max):
            return None
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most}
        told = {word: bound for word, bound in bounds.items() if math.isfinite(bound)}
        wanted = " and ".join(f"{word} {x if isinstance(x, int) else f'{x:g}'}" for word, x in told.items())
        return f"{str(value)[:80]} is out of range; it must be {wanted}"


def problem(value: Any, kind: Any) -> str | None:
    """What is wrong with a value for the type of its field, in words that begin with the value; None if nothing is.

    Values are not converted, but an int is accepted as a float.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        options = [option for option in inner if option is not NoneType]
        if value is None and NoneType in inner:
            return None
        return _of_options(value, options)
    if origin is Annotated:
        found = problem(value, inner[0])
        return found or next((limit.problem(value) for limit in inner[1:] if isinstance(limit, Range)), None)
    if origin is Literal:
        return unknown(value, inner)
    if origin is tuple:
        if not isinstance(value, tuple):
            return _of_another_kind(value, "a list")
        return next((found for item in value if (found := problem(item, inner[0])) is not None), None)
    right = isinstance(value, (int, float) if kind is float else kind)
    if not right or (isinstance(value, bool) and kind is not bool):
        return _of_another_kind(value, kind.__name__)
    return unusable(value) if kind is Path else None


def _of_options(value: Any, options: Sequence[Any]) -> str | None:
    """What is wrong with a value that may have several types; None if nothing is."""
    problems = [problem(value, option) for option in options]
    if None in problems:
        return None
    words = [word for option in options if get_origin(option) is Literal for word in get_args(option)]
    return f"{problems[-1]}, or {', '.join(words)}" if words else problems[0]


def _of_another_kind(value: object, wanted: str) -> str:
    return f"{value!r:.80} is a {type(value).__name__}; it must be {wanted}"


def unknown(value: object, choices: Iterable[str]) -> str | None:
    """What is wrong with a value that must be one of ``choices``; None if nothing is."""
    known = list(choices)
    if isinstance(value, str) and value in known:
        return None
    return f"{' '.join(str(value).split())[:80]} is unknown; choose one of {', '.join(known)}"


def unusable(path: str | Path) -> str | None:
    """What is wrong with a path that the system does not accept, because it is too long or has a zero byte."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        return f"{str(path)[:80]!r} cannot be used as a path: {why}"
    return None


def flag(name: str) -> str:
    """Spell a leaf as its command-line flag."""
    return "--" + name.replace("_", "-")


def refuse(name: str, found: str | None) -> None:
    """Raise a UsageError if something is wrong with the value of a setting."""
    if found is not None:
        raise UsageError(f"{flag(name)} {found}")


def check_fields(settings: object) -> None:
    """Raise a UsageError unless each value in a dataclass fits the type of its field."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        refuse(name, problem(getattr(settings, name), kind))


def taken(value: Any, kind: Any) -> Any:
    """Convert a value to the type of its field: text and paths, lists to tuples, True to on.

    Other values are returned unchanged, for :func:`problem` to report.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return taken(value, inner[0])
    if origin in (Union, UnionType):
        fitting = (form for option in inner if problem(form := taken(value, option), option) is None)
        return next(fitting, value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is str and isinstance(value, Path):
        return str(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(taken(item, inner[0]) for item in value)
    if origin is Literal and isinstance(value, bool) and {"on", "off"} <= set(inner):
        return "on" if value else "off"
    return value


def checked(settings: T) -> T:
    """Return a dataclass with each value converted to the type of its field (see :func:`taken`).

    Raises:
        UsageError: a value does not fit the type of its field.
    """
    leaves: Any = settings
    kinds = get_type_hints(type(settings), include_extras=True)
    values = {name: taken(getattr(leaves, name), kind) for name, kind in kinds.items()}
    formed: T = dataclasses.replace(leaves, **values)
    check_fields(formed)
    return formed
