"""Expands shell patterns of files: ``train-{0000..0146}.tar``, ``{a,b}.tar``, ``train-*.tar``."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from pathlib import Path

from fastrm.data.sources import natural
from fastrm.errors import UsageError
from fastrm.files import at_home
from fastrm.settings.config import check_path

MOST = 1_000_000  # files in one pattern


def matching(pattern: str) -> list[Path]:
    """The files of a pattern, in the order of the pattern and of the numbers in their names.

    Raises:
        UsageError: a file is missing or named twice, or the pattern is invalid.
    """
    if "::" in pattern or pattern.startswith("pipe:"):
        raise UsageError(f"--data {pattern}: several files are named as in '{{a,b}}.tar', and commands are not run")
    if os.path.isfile(at_home(pattern)):  # its name may have special characters
        return [Path(at_home(pattern))]
    found: list[Path] = []
    for name in expand(pattern):
        path = Path(at_home(name))
        if not glob.has_magic(name) or os.path.exists(path):
            found.append(path)
            continue
        matches = [Path(match) for match in sorted(glob.glob(str(path)), key=natural)]
        if not matches:
            raise UsageError(f"--data {pattern}: no file matches {name}")
        found += matches
    for path in found:
        check_path("data", path)
        if not path.is_file():
            raise UsageError(f"--data {pattern}: {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    twice = [path for path, count in Counter(os.path.realpath(path) for path in found).items() if count > 1]
    if twice:
        raise UsageError(f"--data {pattern} names {twice[0]} more than once")
    return found


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: a list ``{a,b}`` or numbers ``{08..11}``, which keep their zeros."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers.groups()
        if int(first) > int(last):
            raise UsageError(f"--data {pattern}: {found[0]} counts down; give {{{last}..{first}}}")
        if int(last) - int(first) >= MOST:
            raise UsageError(f"--data {pattern}: {found[0]} is more than {MOST:,} shards")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    return [name for choice in choices for name in expand(pattern[: found.start()] + choice + pattern[found.end() :])]
