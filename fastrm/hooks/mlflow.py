"""MLflow, through its own package."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastrm.hooks.logger import Tracker

if TYPE_CHECKING:
    from fastrm.run.run import Run

LONGEST = 500  # characters of a parameter that fit into MLflow's databases
_REFUSED = re.compile(r"[^\w./ -]")
"""Characters that MLflow does not accept in the name of a metric."""


class MLflow(Tracker):
    """Logs a run's settings, values and scores to MLflow.

    MLflow's own variables set the destination: ``MLFLOW_TRACKING_URI`` (``sqlite:///runs.db`` needs no network) and
    ``MLFLOW_EXPERIMENT_NAME``. A resumed run continues the same MLflow run. If the script has an active MLflow run, it
    is used and stays active. In the names of values, ``_`` replaces characters that MLflow does not accept, such as
    ``@``.

    Raises:
        UsageError: the package mlflow is not installed, or MLflow refuses the run.
    """

    def __init__(self) -> None:
        super().__init__("mlflow")

    def start(self, run: Run) -> None:
        """Use the active MLflow run, continue the one in the checkpoint, or start one."""
        active, fresh = self.package.active_run(), self.id is None
        if active is not None:
            self.theirs, fresh = True, active.info.run_id != self.id
        elif self.id is None:
            active = self.package.start_run(run_name=run.out.name or None)
        else:
            active = self.package.start_run(run_id=self.id)
        self.id = active.info.run_id
        if fresh:
            told = {name: str(value)[:LONGEST] for name, value in run.config.flat().items()}
            held = self.package.get_run(self.id).data.params  # those of active_run are as old as the run
            kept = {name for name, value in held.items() if told.get(name, value) != value}
            self.package.log_params({name: value for name, value in told.items() if name not in kept})
            if kept:  # MLflow does not change a parameter
                run.say(f"notice     --log-to mlflow: the active run keeps its own {', '.join(sorted(kept))}")

    def write(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log the finite values of a step; databases refuse others."""
        finite = {_REFUSED.sub("_", name): float(value) for name, value in values.items() if math.isfinite(value)}
        self.package.log_metrics(finite, step=step, run_id=self.id)

    def end(self, *, failed: bool) -> None:
        """End the MLflow run."""
        self.package.end_run("FAILED" if failed else "FINISHED")
