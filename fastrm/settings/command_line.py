"""Parses the command line into dataclasses."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import dropwhile, takewhile
from typing import Any, TypeVar, cast, get_args, get_type_hints

from fastrm.errors import UsageError
from fastrm.files import at_home
from fastrm.settings.kinds import flag
from fastrm.settings.near import near

T = TypeVar("T")
_LISTS = ("--value-range", "--mean", "--std")


def parse(kind: type[T], argv: Sequence[str] | None, *, prog: str, default: T | None = None) -> T:
    """Read the flags of a dataclass (tree); ``--help`` prints them by group and ends the program.

    Raises:
        UsageError: a flag is unknown, or its value is missing or of the wrong kind.
    """
    import tyro

    options: dict[str, Any] = {"prog": prog, "config": (tyro.conf.OmitArgPrefixes,)}
    if default is not None:
        options["default"] = default
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            words = list(_apart(sys.argv[1:] if argv is None else argv))
            parsed: T = tyro.cli(kind, args=words, **options)
            return _at_home(parsed)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise UsageError(_reason(shown.getvalue(), list(flag_names(kind)))) from None


def _apart(argv: Sequence[str]) -> Iterator[str]:
    """Split comma-separated numbers into separate words."""
    before = ""
    for word in argv:
        name, equals, value = word.partition("=")
        if before in _LISTS and "," in word:
            yield from word.split(",")
        elif name in _LISTS and equals:
            yield from (name, *value.split(","))
        else:
            yield word
        before = word


def _at_home(options: T) -> T:
    """Expand the home folder in all paths."""
    leaves: Any = options
    values = {leaf.name: getattr(leaves, leaf.name) for leaf in dataclasses.fields(leaves)}
    found = {name: _at_home(v) if dataclasses.is_dataclass(v) else at_home(v) for name, v in values.items()}
    changed: T = dataclasses.replace(leaves, **found)
    return changed


def _reason(message: str, known: list[str]) -> str:
    """The sentence in tyro's message, without title and frame, with a suggestion for an unknown flag."""
    body = [line.strip(" │") for line in message.splitlines()[1:] if line.strip()]
    sentence = " ".join(takewhile(_is_text, dropwhile(lambda line: not _is_text(line), body)))
    if sentence.startswith("Missing from"):  # with the help of each, which is long
        missing = [name for name in map(flag, known) if any(re.match(rf"{name} [{{A-Z]", line) for line in body)]
        sentence = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; --help describes all flags"
    if sentence.startswith("Unrecognized options"):
        unknown = re.findall(r"--[\w-]+", sentence)
        meant = [flag(name) for word in unknown if (name := near(word, known)) is not None]
        sentence += f"; did you mean {', '.join(meant)}?" if meant else "; --help lists all flags"
    return sentence


def _is_text(line: str) -> bool:
    return bool(line.strip("─-"))


def flag_names(kind: type) -> Iterator[str]:
    """Names of the flags of a dataclass, or of the dataclasses in its fields; fields without a flag are left out."""
    import tyro

    positional: Any = tyro.conf.Positional
    for name, inner in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(inner):
            yield from flag_names(cast(type, inner))
        elif positional not in get_args(inner):
            yield name
