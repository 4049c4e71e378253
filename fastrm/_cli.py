"""The command line: dataclasses in, one-line errors out."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile, takewhile
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

from fastrm.errors import Stopped, TrainingError, UsageError

T = TypeVar("T")


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
            parsed: T = tyro.cli(kind, args=sys.argv[1:] if argv is None else argv, **options)
            return parsed
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise UsageError(_reason(shown.getvalue(), list(_flags(kind)))) from None


def _reason(message: str, known: list[str]) -> str:
    """The sentence in tyro's message, which has a title and a frame, with the nearest flags for an unknown one."""
    body = [line.strip(" │") for line in message.splitlines()[1:] if line.strip()]
    sentence = " ".join(takewhile(_is_text, dropwhile(lambda line: not _is_text(line), body)))
    if sentence.startswith("Unrecognized options"):
        unknown = re.findall(r"--[\w-]+", sentence)
        near = [match for flag in unknown for match in difflib.get_close_matches(flag, known, n=1)]
        sentence += f"; did you mean {', '.join(near)}?" if near else "; --help lists what there is"
    return sentence


def _is_text(line: str) -> bool:
    return bool(line.strip("─-"))


def _flags(kind: type) -> Iterator[str]:
    """Flags of a dataclass, or of the dataclasses that are its fields."""
    for name, inner in get_type_hints(kind).items():
        if dataclasses.is_dataclass(inner):
            yield from _flags(cast(type, inner))
        else:
            yield "--" + name.replace("_", "-")


def run(main: Callable[[], object]) -> NoReturn:
    """Run an entry point: the user's own mistakes end it with one line and status 2, a failed training with 1."""
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.status)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
