"""The version, in a separate module, so that it works even if Python imports the checkout's folder as ``fastrm``."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path


def _version() -> str:
    """The version in the pyproject.toml of a checkout, otherwise that of the installed package."""
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
