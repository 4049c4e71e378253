"""Checks the fused losses against the reference on training batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastrm.hooks.base import Hook
from fastrm.methods.verify import warning

if TYPE_CHECKING:
    from fastrm.run.run import Run
    from fastrm.run.step import Output


class Verification(Hook):
    """Compares at regular steps and logs the differences; warns if they are larger than rounding.

    Args:
        every: steps between two comparisons.
        compare: function that compares, :meth:`fastrm.run.step.Step.verify`.
    """

    def __init__(self, every: int, compare: Callable[[tuple[Tensor, ...]], dict[str, float]]) -> None:
        self._every, self._compare = every, compare

    def on_step(self, run: Run, step: int, outputs: Sequence[Output]) -> None:
        """Compare on the last micro-batch of a step."""
        if step % self._every == 0:
            found = self._compare(outputs[-1].views)
            run.log(found)
            if (problem := warning(found)) is not None:
                run.say(f"warning    {problem}")
