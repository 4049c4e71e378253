"""The command line of a training: flags above a file, a file above the defaults of what is chosen."""

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
    """A file of settings, which flags override: a run's config.json, of which out and resume are not taken over, or
    TOML, as in: lr = 0.3"""


def read_flags(argv: Sequence[str] | None) -> Config:
    """Settings from the command line.

    Raises:
        UsageError: a flag, or what is in the file that ``--config`` names, is wrong.
    """
    given = list(_short_forms(sys.argv[1:] if argv is None else argv))
    chosen = _chosen(given)
    file = chosen.pop("config", None)
    values = read_settings(at_home(Path(file))) if file else {}
    # A recipe that is named by a flag is above the file.
    for name in methods().recipes().get(chosen.get("recipe", ""), ()):
        values.pop(name, None)
    of_file = {name: values[name] for name in CHOOSING if values.get(name) is not None}
    default = defaults(**{**of_file, **chosen}).replace(**values)
    parsed = command_line.parse(Flags, given, prog="python -m fastrm.train", default=Flags(**vars(default)))
    return Config(**{group.name: getattr(parsed, group.name) for group in dataclasses.fields(Config)})


def _chosen(argv: Sequence[str]) -> dict[str, Any]:
    """The flags that choose the defaults, which are looked at first; the real parser says what is wrong with them."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", *CHOOSING):
        peek.add_argument(*{flag(name), f"--{name}"}, dest=name, nargs="?", type=int if name == "epochs" else str)
    try:
        found = vars(peek.parse_known_args(argv)[0])
    except argparse.ArgumentError:
        return {}
    return {name: value for name, value in found.items() if value is not None}


def _short_forms(argv: Sequence[str]) -> Iterator[str]:
    """Spell ``--compile`` alone and ``--no-compile`` out."""
    for word, following in zip_longest(argv, argv[1:], fillvalue="--"):
        if word == "--no-compile":
            yield from ("--compile", "off")
        else:
            yield word
            if word == "--compile" and following.startswith("--"):
                yield "on"
