"""The command line of a training run: flags override a file, and the file overrides the defaults."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fastrm.files import at_home
from fastrm.settings import command_line
from fastrm.settings.config import CHOOSING, Config, defaults
from fastrm.settings.config_file import read_settings
from fastrm.settings.fields import methods
from fastrm.settings.kinds import flag


@dataclass(frozen=True, kw_only=True)
class Flags(Config):
    """Pre-train an image backbone with a momentum method and residual momentum."""

    config: Path | None = None
    """File with settings, which flags override. It is a TOML file with lines such as lr = 0.3, or the config.json of a
    run, whose out and resume are not taken over."""


def read_flags(argv: Sequence[str] | None) -> Config:
    """Settings from the command line.

    Raises:
        UsageError: a flag, or the content of the ``--config`` file, is wrong.
    """
    given = list(_short_forms(sys.argv[1:] if argv is None else argv))
    chosen = _chosen(given)
    file = chosen.pop("config", None)
    values = read_settings(at_home(Path(file))) if file else {}
    # A recipe in a flag overrides the file.
    for name in methods().recipes().get(chosen.get("recipe", ""), ()):
        values.pop(name, None)
    of_file = {name: values[name] for name in CHOOSING if values.get(name) is not None}
    default = defaults(**{**of_file, **chosen}).replace(**values)
    parsed = command_line.parse(Flags, given, prog="python -m fastrm.train", default=Flags(**vars(default)))
    return Config(**{group.name: getattr(parsed, group.name) for group in dataclasses.fields(Config)})


def _chosen(argv: Sequence[str]) -> dict[str, Any]:
    """Read the flags that determine defaults; the real parser reports errors in them later."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", *CHOOSING):
        peek.add_argument(*{flag(name), f"--{name}"}, dest=name, nargs="?", type=int if name == "epochs" else str)
    try:
        found = vars(peek.parse_known_args(argv)[0])
    except argparse.ArgumentError:
        return {}
    return {name: value for name, value in found.items() if value is not None}


def _short_forms(argv: Sequence[str]) -> Iterator[str]:
    """Expand ``--compile`` without a value, and ``--no-compile``."""
    for word, following in zip_longest(argv, argv[1:], fillvalue="--"):
        if word == "--no-compile":
            yield from ("--compile", "off")
        else:
            yield word
            if word == "--compile" and following.startswith("--"):
                yield "on"
