"""The record of a run in metrics.jsonl: one JSON object per line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fastrm.files import write_text
from fastrm.hooks.logger import Logger
from fastrm.own import METRICS

if TYPE_CHECKING:
    from fastrm.run.run import Run


class JsonLines(Logger):
    """Appends an object to metrics.jsonl for each logged step and each evaluation.

    Values that are not finite become null. At the start, records after the last checkpoint of an interrupted run are
    dropped.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_start(self, run: Run) -> None:
        """Open the file."""
        if run.rank == 0:
            path = run.out / METRICS
            if path.exists():
                kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= run.step]
                write_text(path, "".join(f"{line}\n" for line in kept))
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Append a logged step."""
        if self._file is not None:
            record = {"step": step, "epoch": run.epoch, **values}
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
            self._file.write(json.dumps(finite) + "\n")  # one write per line: a reader never sees half of one
            self._file.flush()

    def sync(self) -> None:
        """Flush the records to the disk, before a checkpoint that depends on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def recorded(out: Path, step: int) -> dict[str, Any]:
    """The record of a step in ``metrics.jsonl`` of a run folder, including its evaluation; empty if there is none."""
    path = out / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found: dict[str, Any] = {}
    for line in lines:
        if _step_of(line) == step:
            found |= json.loads(line)
    return found


def _step_of(line: str) -> float:
    """The step of a recorded line; an incomplete line counts as later than all others."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
