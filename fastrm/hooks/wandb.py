"""Weights & Biases, through its own package."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrm.errors import UsageError
from fastrm.hooks.logger import Tracker

if TYPE_CHECKING:
    from fastrm.run.run import Run


class WandB(Tracker):
    """Logs a run's settings, values and scores to Weights & Biases. Its files are in the run folder.

    Without a network or an account, set ``WANDB_MODE=offline``. A resumed run continues the same W&B run.

    Args:
        project: name of the W&B project.
        options: other arguments of ``wandb.init``, such as ``entity`` or ``tags``.

    Raises:
        UsageError: the package wandb is not installed, or W&B refuses the run.
    """

    def __init__(self, project: str = "fastrm", **options: Any) -> None:
        super().__init__("wandb")
        self._options = {"project": project, **options}
        self._run: Any = None

    def on_start(self, run: Run) -> None:
        """Start the W&B run, or continue the one in the checkpoint."""
        if run.rank != 0:
            return
        if self.id is None:
            self.id = secrets.token_hex(4)
        try:
            self._run = self.package.init(
                id=self.id, resume="allow", name=run.out.name, dir=run.out, config=run.config.flat(), **self._options
            )
        except (self.package.Error, OSError) as error:
            raise UsageError(f"--log-to wandb: {error}; WANDB_MODE=offline logs without an account") from None

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        if self._run is not None:
            self._run.log({"epoch": run.epoch, **values}, step=step)

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        if self._run is not None:
            self._run.summary.update(dict(summary))

    def close(self) -> None:
        """End the W&B run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
