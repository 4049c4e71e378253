"""The list of unreadable files in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fastrm.data.scan import SKIPPED, list_further, write_skipped
from fastrm.hooks.base import Hook

if TYPE_CHECKING:
    from fastrm.run.run import Run


class LeftOut(Hook):
    """Lists files that were left out in skipped.txt, as they occur.

    Args:
        broken: broken images that were found before the run, by name, with the reason.
        met: those that occurred since then.
    """

    def __init__(self, broken: Mapping[str, str], met: Callable[[], Mapping[str, str]]) -> None:
        self._broken, self._met = dict(broken), met

    def on_start(self, run: Run) -> None:
        """List and report the broken files."""
        if self._broken and run.rank == 0:
            write_skipped(run.out, self._broken)
            run.say(f"left out   {len(self._broken)} broken files, listed in {run.out / SKIPPED}")

    def on_step(self, run: Run, *_: object) -> None:
        """Add those of the last step."""
        if run.rank == 0:
            list_further(run.out, self._broken, self._met())

    def on_evaluate(self, run: Run, *_: object) -> None:
        """Add those of the evaluation."""
        self.on_step(run)
