"""The scores of a run in its ``evaluation.json``, and in tables beside what was not trained and the start weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrm.errors import UsageError
from fastrm.files import read_json

EVALUATION = "evaluation.json"
"""File in the run folder."""
Scored = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By network and score: ``value``, ``interval``, and ``above_start`` where the run started from weights."""

NAMES = {
    "random": "untrained network",
    "pixels": "raw pixels",
    "start": "start weights",
    "weights": "weights",
    "student": "student",
    "teacher": "teacher",
}
"""What is scored, in the order of a table."""


def rows(scores: Scored, title: str) -> list[list[str]]:
    """A table of one set of images: its head, a row per network, and the differences to the start weights.

    Numbers are in percent, with half of the width of their 95 % interval.
    """
    columns = list(dict.fromkeys(score for found in scores.values() for score in found))
    lines = [[title, *columns]]
    for name, words in NAMES.items():
        if name in scores:
            lines.append([words, *(_cell(scores[name].get(column)) for column in columns)])
    for name in ("student", "teacher"):
        above = [scores.get(name, {}).get(column, {}).get("above_start") for column in columns]
        if any(above):
            lines.append([f"{name} above the start", *(_cell(each, sign="+") for each in above)])
    return lines


def _cell(found: Mapping[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['value']:{sign}.2f} ±{50 * (high - low):.2f}"


def evaluated(folder: Path) -> dict[str, Scored]:
    """What ``fastrm.evaluate`` found out about a run, by set of images; nothing where it was not called.

    Raises:
        UsageError: the file is another's.
    """
    path = folder / EVALUATION
    try:
        sets = read_json(path)["sets"] if path.is_file() else {}
        found = {name: parts["scores"] for name, parts in sets.items() if parts.get("scores")}
        for scores in found.values():
            rows(scores, "")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is no evaluation that fastrm wrote; move it away") from None
