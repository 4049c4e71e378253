"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastrm.hooks.logger import Logger
from fastrm.own import EVENTS, TENSORBOARD

if TYPE_CHECKING:
    from fastrm.run.run import Run


class TensorBoard(Logger):
    """Writes values and scores as scalars to the run folder."""

    def __init__(self) -> None:
        self._writer: Any = None

    def on_start(self, run: Run) -> None:
        """Open an event file; values that an interrupted run wrote after its checkpoint are hidden."""
        if run.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(run.out / TENSORBOARD)
            self._writer = SummaryWriter(folder, purge_step=run.step + 1, filename_suffix=EVENTS)

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Write a logged step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def on_checkpoint(self, *_: object) -> None:
        """Flush the written values."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
