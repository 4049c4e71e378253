"""Reads settings from a file: the ``config.json`` of a run, or TOML with one setting per line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastrm.errors import UsageError, first_line
from fastrm.files import at_home
from fastrm.settings.config import check_choice, in_form
from fastrm.settings.fields import KINDS, methods
from fastrm.settings.kinds import problem, refuse
from fastrm.settings.near import near

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_OF_THE_RUN = frozenset({"out", "resume"})
"""Settings in ``config.json`` that concern only that run."""
VIEWS = "augmentation_used"
"""Key of ``config.json`` for every number of every view."""


def read_settings(path: Path) -> dict[str, Any]:
    """Read settings by name, and check each of them; the folder of a ``config.json``'s run is left out.

    Raises:
        UsageError: the message names the file and what is wrong in it.
    """
    try:
        found = read_table(path)
        made = found.pop(VIEWS, None) if path.suffix == ".json" else None
        for name in found:
            if name not in KINDS:
                meant = near(name, KINDS)
                raise UsageError(f"{name!r:.80} is no setting" + (f"; did you mean {meant}?" if meant else ""))
        if path.suffix == ".json":
            leaves = in_form({name: value for name, value in found.items() if name not in _OF_THE_RUN})
            if made is not None and leaves.get("augmentation") is not None:
                leaves["augmentation"] = str(path)  # the file that it was read from may be another one now
        else:
            leaves = in_form({name: at_home(value) for name, value in found.items()})
        for name, value in leaves.items():
            refuse(name, problem(value, KINDS[name]))
        if "method" in leaves:
            methods().find(leaves["method"])
        if leaves.get("recipe") is not None:
            check_choice("recipe", leaves["recipe"], methods().recipes())
    except UsageError as error:
        raise UsageError(f"--config {str(path)[:200]}: {error}") from None
    return leaves


def read_table(path: Path) -> dict[str, Any]:
    """The content of a TOML or JSON file by name.

    Raises:
        UsageError: it cannot be read, or has another content; the message does not contain the file name.
    """
    if path.suffix not in (".json", ".toml"):
        raise UsageError("it must end in .json, as a run's config.json does, or .toml")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"it cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it is no {path.suffix[1:].upper()}: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UsageError("it holds no settings by name")
    return found
