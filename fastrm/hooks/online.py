"""The online probe: a linear classifier that is trained during the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastrm.hooks.base import Hook
from fastrm.probes import OnlineLinear

if TYPE_CHECKING:
    from fastrm.run.run import Run
    from fastrm.run.step import Output


class Online(Hook):
    """Trains the classifier on each step's detached features, and logs its accuracy on the training views."""

    def __init__(self, classifier: OnlineLinear) -> None:
        self.classifier = classifier

    def on_step(self, run: Run, step: int, outputs: Sequence[Output]) -> None:
        """Train on the micro-batches of the step."""
        for output in outputs:
            self.classifier.step(output.features, output.indices, (step - 1) / run.total_steps)
        if run.logging:
            run.log({"online_accuracy": self.classifier.accuracy()})

    def state_dict(self) -> dict[str, Any]:
        """The classifier's state."""
        return self.classifier.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the classifier's state."""
        self.classifier.load_state_dict(state)
