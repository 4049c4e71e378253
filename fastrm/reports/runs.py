"""Reads run folders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastrm import own
from fastrm.errors import UsageError
from fastrm.evaluated import SUMMARY, Scored, evaluated
from fastrm.files import read_json
from fastrm.reports import maps
from fastrm.reports.maps import Map
from fastrm.settings.config import DeviceConfig, InputConfig, MethodConfig, ModelConfig, OptimConfig

_MINOR = frozenset({"data_root", "scan", "workers"})
_SHOWN = [
    field.name
    for group in (MethodConfig, ModelConfig, OptimConfig, InputConfig, DeviceConfig)
    for field in dataclasses.fields(group)
    if field.name not in _MINOR
] + ["seed"]
"""Settings that tell runs apart, the most important first."""


class Run(NamedTuple):
    """The content of a run folder."""

    name: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    """Logged steps and evaluations, in order."""
    complete: bool
    scores: Mapping[str, Scored]
    """By set of images."""
    sheets: tuple[Path, ...] = ()
    """Contact sheets in the folder: pictures of views and of nearest neighbours."""
    maps: tuple[Map, ...] = ()
    """Maps of images in the folder."""

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """(epochs, values) of a metric, where it is recorded and finite."""
        found = [(r["epoch"], r[metric]) for r in self.records if isinstance(r.get(metric), int | float)]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def last(self, metric: str) -> float | None:
        """The last value of a metric."""
        values = self.series(metric)[1]
        return values[-1] if values else None


def read_run(folder: Path) -> Run:
    """Read a run folder; an incomplete last line of a running run is skipped.

    Raises:
        UsageError: it is not a run folder, or nothing was recorded yet.
    """
    if not (folder / own.METRICS).is_file():
        raise UsageError(f"{folder} is not a run folder: it has no {own.METRICS}")
    try:
        settings = read_json(folder / "config.json")
        lines = (folder / own.METRICS).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines[:-1]]
        if lines:
            with contextlib.suppress(ValueError):
                records.append(json.loads(lines[-1]))
        sound = all(isinstance(r, dict) and isinstance(r.get("epoch"), int | float) for r in records)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} cannot be read as a run: {error}") from None
    if not sound or not isinstance(settings, dict):
        raise UsageError(f"{folder / own.METRICS} holds other lines than a run records")
    if not any("loss" in record for record in records):
        raise UsageError(f"{folder} has recorded nothing yet")
    complete, scores = _complete(folder, records[-1].get("step", 0)), evaluated(folder)
    files = sorted(folder.iterdir())
    sheets = [path for path in files if path.suffix.lower() in own.SHEET_FORMATS and own.sheet(path)]
    drawn = [maps.read(path) for path in files if path.suffix == maps.POINTS and own.safely(own.points, path)]
    return Run(folder.resolve().name, settings, records, complete, scores, tuple(sheets), tuple(drawn))


def _complete(folder: Path, step: int) -> bool:
    """Whether the summary is from the last step; the run may have continued since."""
    path = folder / SUMMARY
    try:
        return path.is_file() and bool(read_json(path).get("step", step) >= step)
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{path} is not a summary that fastrm wrote; move it away") from None


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that differ between the runs."""
    return [name for name in _SHOWN if len({repr(run.settings.get(name)) for run in runs}) > 1]


def label(run: Run, names: Sequence[str]) -> str:
    """The name of a run, with at most three settings that distinguish it."""
    return ", ".join([run.name, *(f"{name} {run.settings.get(name)}" for name in names[:3])])
