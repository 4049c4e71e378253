"""Base classes of hooks that log values."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastrm.errors import UsageError
from fastrm.hooks.base import Hook
from fastrm.machine.memory import exhausted
from fastrm.own import METRICS
from fastrm.packages import optional

if TYPE_CHECKING:
    from fastrm.run.run import Run

_REST = 10.0
"""Pause after a failed call of a service, as a multiple of the time that it took."""


class Logger(Hook):
    """Logs the scores of an evaluation in the same way as the values of a step."""

    def on_evaluate(self, run: Run, step: int, scores: Mapping[str, float]) -> None:
        """Log the scores of an evaluation."""
        self.on_log(run, step, scores)


class Tracker(Logger):
    """Logs to a service through its own package; a resumed run continues the same run of the service.

    If the script has an active run of the service, values are logged to it, and it stays active. If the service fails
    during the run, training continues, with a warning and the number of records that the service lacks.

    Args:
        package: name of the package, which is also the value of ``--log-to`` and an extra of fastrm.

    Attributes:
        package: the package.
        id: id of the run in the service; None before it starts.
        theirs: whether the script started the run of the service.

    Raises:
        UsageError: the package is not installed, or at the start of the run the service refuses it.
    """

    hint = ""
    """Advice after a refusal at the start."""

    def __init__(self, package: str) -> None:
        self.package: Any = optional(package, extra=package, wanted_by=f"--log-to {package}")
        self.id: str | None = None
        self.theirs = False
        self._name = package
        self._open = self._complete = False
        self._lost, self._rests_until = 0, 0.0

    @abstractmethod
    def start(self, run: Run) -> None:
        """Start the run of the service, or continue it, and log the settings."""

    @abstractmethod
    def write(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""

    def conclude(self, summary: Mapping[str, Any]) -> None:
        """Log the results of the run."""

    @abstractmethod
    def end(self, *, failed: bool) -> None:
        """End the run of the service."""

    def state_dict(self) -> dict[str, Any]:
        """The id of the run in the service."""
        return {"id": self.id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue that run of the service."""
        self.id = state["id"]

    def on_start(self, run: Run) -> None:
        """Start the run of the service, or continue the one in the checkpoint."""
        if run.rank != 0:
            return
        self._open = True
        try:
            self.start(run)
        except Exception as error:  # packages raise errors of any type, also those of their own dependencies
            if exhausted(error):
                raise
            raise UsageError(f"--log-to {self._name}: {_told(error)}{self.hint}") from None

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._try(run, lambda: self.write(run, step, values))

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        """Log the results."""
        self._rests_until = 0.0
        self._try(run, lambda: self.conclude(summary))
        self._complete = True
        if self._lost:
            run.say(f"warning    --log-to {self._name}: {self._lost:,} records are missing there; {METRICS} has all")

    def _try(self, run: Run, call: Callable[[], None]) -> None:
        """Call the service; if it fails, report the first failure, and wait before the next call."""
        if not self._open:
            return
        begin = time.monotonic()
        if begin < self._rests_until:
            self._lost += 1
            return
        try:
            call()
        except Exception as error:
            if exhausted(error):
                raise
            now = time.monotonic()
            self._rests_until = now + _REST * (now - begin)  # services retry for minutes while they are unreachable
            if not self._lost:
                run.say(
                    f"warning    --log-to {self._name}: {_told(error)}; training continues, and {METRICS} has all "
                    "records"
                )
            self._lost += 1

    def close(self) -> None:
        """End the run of the service, as failed unless fastrm's run is complete, if fastrm started it."""
        if self._open and not self.theirs:
            self._open = False
            try:
                self.end(failed=not self._complete)
            except Exception as error:
                if exhausted(error):
                    raise
                print(f"warning    --log-to {self._name}: the end of the run is not recorded: {_told(error)}")


def _told(error: Exception) -> str:
    """The message of an error in one line; those of settings have their point in the second one."""
    return " ".join(str(error).split())[:300] or type(error).__name__
