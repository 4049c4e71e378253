"""Weights & Biases, through its own package."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrm.hooks.logger import Tracker

if TYPE_CHECKING:
    from fastrm.run.run import Run


class WandB(Tracker):
    """Logs a run's settings, values and scores to Weights & Biases. Its files are in the run folder.

    Without a network or an account, set ``WANDB_MODE=offline``. A resumed run continues the same W&B run. If the script
    has called ``wandb.init``, as in a sweep, that run is used and stays active; ``WANDB_RUN_ID`` names the run for
    others.

    Args:
        project: name of the W&B project.
        options: other arguments of ``wandb.init``, such as ``entity`` or ``tags``.

    Raises:
        UsageError: the package wandb is not installed, or W&B refuses the run.
    """

    hint = "; WANDB_MODE=offline logs without an account"

    def __init__(self, project: str = "fastrm", **options: Any) -> None:
        super().__init__("wandb")
        self._options = {"project": project, **options}
        self._run: Any = None

    def start(self, run: Run) -> None:
        """Use the active W&B run, continue the one in the checkpoint, or start one."""
        settings = run.config.flat()
        if self.package.run is not None:
            self._run, self.theirs = self.package.run, True
            self._run.config.update(settings, allow_val_change=True)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        else:
            known = self.id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            self._run = self.package.init(
                id=known, resume="allow", name=run.out.name or None, dir=run.out, config=settings, **self._options
            )
        self.id = self._run.id

    def write(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step. A run of the script counts its own steps, so there it is a value."""
        if self.theirs:
            self._run.log({"step": step, "epoch": run.epoch, **values})
        else:
            self._run.log({"epoch": run.epoch, **values}, step=step)

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        self._run.summary.update(dict(summary))

    def end(self, *, failed: bool) -> None:
        """End the W&B run."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
