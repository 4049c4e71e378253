"""Imports packages that only some uses of fastrm need."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from fastrm.errors import UsageError, first_line


def optional(name: str, *, extra: str, wanted_by: str, package: str = "") -> Any:
    """Import a module of a package that may be missing.

    Args:
        name: name of the module.
        extra: extra of fastrm that installs it.
        wanted_by: the flag with its value, or the file, that needs it.
        package: name of the package, if it differs from that of the module.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    error = failure(name)
    if error is None:
        return importlib.import_module(name)
    raise UsageError(f"{wanted_by} needs {lack(name, extra, error, package)}") from None


def failure(name: str) -> Exception | None:
    """The error of importing a module; None if it can be imported."""
    try:
        importlib.import_module(name)
    except Exception as error:  # broken packages raise errors of any type
        return error
    return None


def lack(name: str, extra: str, error: BaseException, package: str = "") -> str:
    """Describe why a module could not be imported: its package is missing, or broken for a reason."""
    module = name.partition(".")[0]
    package = package or module
    if find_spec(module) is None:
        return f"the package {package}: {error}; {_command(extra, package)}"
    broken = f"which is installed but broken: {first_line(error)}; pip install --force-reinstall {package}"
    return f"the package {package}, {broken}"


def _command(extra: str, package: str) -> str:
    """The command that installs the packages of an extra, in the way in which fastrm was installed."""
    try:
        requirements = metadata.requires("fastrm") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        requirements = []
    names = [re.split(r"[^\w.-]", each)[0] for each in requirements if re.search(f"extra == .{extra}.$", each)]
    there = any(name.startswith(package) for name in names)  # false if the extra is newer than the installed fastrm
    return f"pip install {' '.join(names if there else [package])}"
