"""Packages that only some uses of fastrm need."""

from __future__ import annotations

import importlib
from typing import Any

from fastrm.errors import UsageError


def optional(name: str, *, extra: str, wanted_by: str) -> Any:
    """Import a module of a package that may not be there.

    Args:
        name: the module's.
        extra: of fastrm, with which it is installed.
        wanted_by: the flag with its value, or the file, that cannot do without.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise UsageError(f"{wanted_by} needs the package {top}: {error}; pip install 'fastrm[{extra}]'") from None
