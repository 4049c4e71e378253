"""The version, in a module of its own: it is found too where Python takes the folder of a checkout for ``fastrm``."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path


def _version() -> str:
    """A checkout's own, from its pyproject.toml, whatever else is installed; else that of what is installed."""
    try:
        project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        project = ""
    if re.search(r'^name = "fastrm"$', project, re.MULTILINE) and (
        found := re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    ):
        return found[1]
    try:
        return importlib.metadata.version("fastrm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


__version__ = _version()
