"""Base classes of hooks that log values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrm.hooks.base import Hook
from fastrm.packages import optional

if TYPE_CHECKING:
    from fastrm.run.run import Run


class Logger(Hook):
    """Logs the scores of an evaluation in the same way as the values of a step."""

    def on_evaluate(self, run: Run, step: int, scores: Mapping[str, float]) -> None:
        """Log the scores of an evaluation."""
        self.on_log(run, step, scores)


class Tracker(Logger):
    """Logs to a service through its own package; a resumed run continues the same run of the service.

    Args:
        package: name of the package, which is also the value of ``--log-to`` and an extra of fastrm.

    Attributes:
        package: the package.
        id: id of the run in the service; None before it starts.

    Raises:
        UsageError: the package is not installed.
    """

    def __init__(self, package: str) -> None:
        self.package: Any = optional(package, extra=package, wanted_by=f"--log-to {package}")
        self.id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """The id of the run in the service."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue that run of the service."""
        self.id = state["id"]
