"""MLflow, through its own package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrm.errors import UsageError
from fastrm.hooks.logger import Tracker

if TYPE_CHECKING:
    from fastrm.run.run import Run

LONGEST = 500  # characters of a parameter that fit into MLflow's databases


class MLflow(Tracker):
    """Logs a run's settings, values and scores to MLflow.

    MLflow's own variables set the destination: ``MLFLOW_TRACKING_URI`` (``sqlite:///runs.db`` needs no network) and
    ``MLFLOW_EXPERIMENT_NAME``. A resumed run continues the same MLflow run.

    Raises:
        UsageError: the package mlflow is not installed, or MLflow refuses the run.
    """

    def __init__(self) -> None:
        super().__init__("mlflow")
        self._client: Any = None

    def on_start(self, run: Run) -> None:
        """Start the MLflow run, or continue the one in the checkpoint."""
        if run.rank != 0:
            return
        try:
            self._client = self.package.MlflowClient()
            if self.id is None:
                started = self.package.start_run(run_name=run.out.name)
                self.id = started.info.run_id
                self.package.log_params({name: str(value)[:LONGEST] for name, value in run.config.flat().items()})
            else:
                self.package.start_run(run_id=self.id)
        except (self.package.MlflowException, OSError) as error:
            raise UsageError(f"--log-to mlflow: {error}") from None

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log the finite values of a step; databases refuse others."""
        if self._client is not None:
            finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
            self.package.log_metrics(finite, step=step)

    def close(self) -> None:
        """End the MLflow run."""
        if self._client is not None:
            self.package.end_run()
            self._client = None
