"""MLflow, through its own package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrm.errors import UsageError
from fastrm.hooks.base import Hook, extra

if TYPE_CHECKING:
    from fastrm.run.run import Run

LONGEST = 500  # characters of a parameter that MLflow's databases take


class MLflow(Hook):
    """Logs a run's settings, values and scores to MLflow.

    MLflow's own variables say where: ``MLFLOW_TRACKING_URI`` (``sqlite:///runs.db`` needs no network) and
    ``MLFLOW_EXPERIMENT_NAME``. A resumed run continues the same MLflow run.

    Raises:
        UsageError: the package mlflow is not installed, or MLflow refuses the run.
    """

    def __init__(self) -> None:
        self._mlflow = extra("mlflow")
        self._client: Any = None
        self._id: str | None = None

    def on_start(self, run: Run) -> None:
        """Start the MLflow run, or continue the one that the checkpoint names."""
        if run.rank != 0:
            return
        try:
            self._client = self._mlflow.MlflowClient()
            if self._id is None:
                started = self._mlflow.start_run(run_name=run.out.name)
                self._id = started.info.run_id
                self._mlflow.log_params({name: str(value)[:LONGEST] for name, value in run.config.flat().items()})
            else:
                self._mlflow.start_run(run_id=self._id)
        except (self._mlflow.MlflowException, OSError) as error:
            raise UsageError(f"--log-to mlflow: {error}") from None

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step; those that are not finite are left out, since databases refuse them."""
        if self._client is not None:
            finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
            self._mlflow.log_metrics(finite, step=step)

    def on_evaluate(self, run: Run, step: int, scores: Mapping[str, float]) -> None:
        """Log the scores of an evaluation."""
        self.on_log(run, step, scores)

    def close(self) -> None:
        """End the MLflow run."""
        if self._client is not None:
            self._mlflow.end_run()
            self._client = None

    def state_dict(self) -> dict[str, Any]:
        """Which MLflow run it is."""
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue that MLflow run."""
        self._id = state["id"]
