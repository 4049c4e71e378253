"""The scores of a run, as read from its folder, and the tables that show them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrm.errors import UsageError
from fastrm.files import read_json

EVALUATION = "evaluation.json"
"""The file in the run folder with the scores of ``fastrm.evaluate``."""
SUMMARY = "summary.json"
"""The file in the run folder with the results of a complete run."""
Scored = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""For each network and score: ``value``, ``interval``, and ``above_start`` if the run started from weights."""

NAMES = {
    "random": "untrained network",
    "pixels": "raw pixels",
    "start": "start weights",
    "weights": "weights",
    "student": "student",
    "teacher": "teacher",
}
"""The rows of a table, in their order."""
_IN_SUMMARY = {"untrained": "random"}
"""Networks with another name in the summary."""


def rows(scores: Scored, title: str) -> list[list[str]]:
    """Return the table of one set of images: its head, a row per network, and the differences to the start weights.

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


def evaluated(folder: Path, step: int | None = None) -> dict[str, Scored]:
    """Read the scores at the end of the run, and those of ``fastrm.evaluate``, per set of images.

    Args:
        folder: the run folder; without scores, the result is empty.
        step: leave out scores of weights of another step; None takes all scores.

    Raises:
        UsageError: fastrm did not write one of the files.
    """
    found: dict[str, Scored] = {}
    for name, scores_in in ((SUMMARY, _at_the_end), (EVALUATION, _per_set)):
        path = folder / name
        try:
            content = read_json(path) if path.is_file() else {}
            if step is None or content.get("step") in (None, step):
                found |= scores_in(content)
            for scores in found.values():
                rows(scores, "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} was not written by fastrm; move it away") from None
    return found


def _at_the_end(summary: Mapping[str, Any]) -> dict[str, Scored]:
    above = summary.get("knn_above_start", {})
    scores = {
        _IN_SUMMARY.get(name, name): {
            "kNN, k = 20": {"value": summary[f"knn_{name}"], "interval": interval}
            | ({"above_start": above[name]} if name in above else {})
        }
        for name, interval in summary.get("knn_intervals", {}).items()
    }
    return {"at the end of the run": scores} if scores else {}


def _per_set(evaluation: Mapping[str, Any]) -> dict[str, Scored]:
    sets = evaluation["sets"] if evaluation else {}
    return {name: parts["scores"] for name, parts in sets.items() if parts.get("scores")}
