"""The command line: dataclasses in, one-line errors out."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from fastrm.errors import TrainingError, UsageError

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
        known = tyro.extras.get_parser(kind, **options).format_help()
        raise UsageError(_reason(shown.getvalue(), set(re.findall(r"--[a-z][a-z-]*", known)))) from None


def _reason(box: str, known: set[str]) -> str:
    """The sentence in tyro's framed message, with the nearest flags for an unknown one."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    reason = " ".join(lines[:rule]) or box.strip()
    if reason.startswith("Unrecognized options"):
        unknown = re.findall(r"--[\w-]+", reason)
        near = [match for flag in unknown for match in difflib.get_close_matches(flag, known, n=1, cutoff=0.6)]
        reason += f"; did you mean {', '.join(near)}?" if near else "; --help lists what there is"
    return reason


def run(main: Callable[[], object]) -> NoReturn:
    """Run an entry point: the user's own mistakes end it with one line and status 2, a failed training with 1."""
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
