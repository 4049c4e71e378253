"""What a run reports: metrics.jsonl, TensorBoard and the screen."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from fastrm.files import write_text
from fastrm.own import EVENTS
from fastrm.terminal.progress import Display
from fastrm.terminal.shell import screen

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
_OF_THE_WAY = frozenset({"images_per_second", "verify_loss", "verify_gradient"})
"""What a record says of the steps before it, and not of the state after them."""


class Recorder:
    """Records a run in its folder and shows it on the screen.

    Args:
        out: the run folder; None for a process whose metrics others record.
        start: steps that are already done; what was recorded after them, by a run that was cut off, is dropped.
        total: steps of the whole run.
    """

    def __init__(self, out: Path | None, *, start: int, total: int) -> None:
        self._file: TextIO | None = None
        if out is not None:
            self._keep_until(out / METRICS, start)
            self._file = open(out / METRICS, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
            self._board = SummaryWriter(str(out / TENSORBOARD), purge_step=start + 1, filename_suffix=EVENTS)
        self._console = Console(file=screen(), highlight=False, soft_wrap=True, quiet=out is None)
        self._shown = ExitStack()
        self._display = self._shown.enter_context(Display(self._console))
        self._task = self._shown.enter_context(self._display.task("training", total, start=start, lines=False))

    def _keep_until(self, path: Path, step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))

    def note(self, text: str) -> None:
        """Say something to the person at the screen."""
        self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self._task.reach(step)

    def record(self, values: dict[str, Any]) -> None:
        """Append one object; ``step`` and ``epoch`` are among its values. Numbers that are not finite become null."""
        if self._file is None:
            return
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        # One write a line, so that a reader never sees half of one.
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for name, value in values.items():
            if name not in ("step", "epoch"):
                self._board.add_scalar(name, value, values["step"])
        shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items() if name not in ("step", "epoch"))
        if "loss" in values and self._display.live:
            step, loss, gap = values["step"], values["loss"], values["gap"]
            self._task.reach(step, f"{step}/{self._task.total:.0f}  loss {loss:.3f}  gap {gap:.3f}")
        else:
            self.note(f"step {values['step']:>6}  epoch {values['epoch']:6.2f}  {shown}")

    def sync(self) -> None:
        """Put what was recorded on the disk, before a checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """End the display and close the files."""
        self._shown.close()
        if self._file is not None:
            self._file.close()
            self._board.close()


def recorded(out: Path, step: int) -> dict[str, Any]:
    """What ``metrics.jsonl`` in a run folder says of the state after a step; nothing where there is none."""
    path = out / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found: dict[str, Any] = {}
    for line in lines:
        if _step_of(line) == step:
            found |= json.loads(line)
    return {name: value for name, value in found.items() if name not in _OF_THE_WAY}


def _step_of(line: str) -> float:
    """Step of a recorded line; a line that was cut off counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
