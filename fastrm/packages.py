"""Packages that only some uses of fastrm need."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from fastrm.errors import UsageError, first_line


def optional(name: str, *, extra: str, wanted_by: str, package: str = "") -> Any:
    """Import a module of a package that may not be there.

    Args:
        name: the module's.
        extra: of fastrm, with which it is installed.
        wanted_by: the flag with its value, or the file, that cannot do without.
        package: that the module is of, if its name is another.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    error = failure(name)
    if error is None:
        return importlib.import_module(name)
    raise UsageError(f"{wanted_by} needs {lack(name, extra, error, package)}") from None


def failure(name: str) -> Exception | None:
    """What importing a module raises; None where it can be imported."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a package that is broken, or older than what it needs, raises whatever comes first
        return error
    return None


def lack(name: str, extra: str, error: BaseException, package: str = "") -> str:
    """Say of a package of whose modules one could not be imported that it is missing, or broken and why."""
    module = name.partition(".")[0]
    package = package or module
    if find_spec(module) is None:
        return f"the package {package}: {error}; {_command(extra, package)}"
    broken = f"which is installed but broken: {first_line(error)}; pip install --force-reinstall {package}"
    return f"the package {package}, {broken}"


def _command(extra: str, package: str) -> str:
    """What installs the packages of an extra, from wherever fastrm itself was installed."""
    try:
        requirements = metadata.requires("fastrm") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        requirements = []
    names = [re.split(r"[^\w.-]", each)[0] for each in requirements if re.search(f"extra == .{extra}.$", each)]
    there = any(name.startswith(package) for name in names)  # not where the extra is newer than what is installed
    return f"pip install {' '.join(names if there else [package])}"
