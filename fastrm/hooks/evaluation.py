"""kNN during the run and after it: how good the features are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from fastrm.data import Source
from fastrm.hooks.base import Hook
from fastrm.machine.meeting import together
from fastrm.machine.memory import enough
from fastrm.models import Backbone
from fastrm.probes import OnlineLinear, Pixels, frozen_scores
from fastrm.probes.features import BATCH, Setting

if TYPE_CHECKING:
    from fastrm.run.run import Run


class KNN(Hook):
    """Scores student and teacher at the end of every so many epochs, and after the last step.

    After the last step the raw pixels and a network that has learned nothing are scored beside them. All processes
    share the work, and wait for each other however long it takes.

    Args:
        source: labelled images: the bank that neighbours are looked up in, and the test images.
        setting: how images reach a network.
        every: epochs between two evaluations.
        online: the linear classifier that is trained along.
        untrained: makes the network that has learned nothing.
    """

    def __init__(
        self,
        source: Source,
        setting: Setting,
        *,
        every: int,
        online: OnlineLinear | None = None,
        untrained: Callable[[], nn.Module] | None = None,
    ) -> None:
        self._source, self._setting, self._every = source, setting, every
        self._online, self._untrained = online, untrained

    def on_start(self, run: Run) -> None:
        """Score what the run before was cut off at."""
        if run.step and not run.scored:
            self.on_step(run, run.step)

    def on_step(self, run: Run, step: int, _: object = None) -> None:
        """Score, if it is time. The steps before are saved first, so that nothing that happens here can lose them."""
        end = step >= run.total_steps
        if not (end or run.schedule.ends_epoch(step, self._every)):
            return
        if run.asked().end:  # the same command goes on with it
            return
        run.save(wait=True)
        with (
            together(),
            enough(
                self._setting.device,
                lambda: self._asked(run),
                "The steps are saved; the same command with --eval-every 0 goes on",
            ),
        ):
            scores = self._scores(run, self._beside() if end else {})
        run.evaluated(scores)

    def _scores(self, run: Run, beside: Mapping[str, nn.Module]) -> dict[str, float]:
        """kNN accuracy of both backbones for k = 20 and 200, and of the classifier that is trained along.

        Of the networks ``beside`` for k = 20.
        """
        networks: dict[str, nn.Module] = {"student": run.student, "teacher": run.teacher, **beside}
        others = {} if self._online is None else {"student": [self._online]}
        found = frozen_scores(networks, self._source, self._setting, knn=True, others=others, name="evaluation")
        scores: dict[str, float] = {}
        for name, estimates in found.items():
            scores[f"knn_{name}"] = estimates["knn20"].value
            if name not in beside:
                scores[f"knn200_{name}"] = estimates["knn200"].value
            if name in others:
                scores[f"linear_{name}"] = estimates["online"].value
        return scores

    def _beside(self) -> dict[str, nn.Module]:
        """What has learned nothing."""
        networks: dict[str, nn.Module] = {"pixels": Pixels()}
        if self._untrained is not None:
            networks["untrained"] = self._untrained().to(self._setting.device)
        return networks

    def _asked(self, run: Run) -> str:
        assert self._source.bank is not None
        student: Backbone = run.student
        return (
            f"an evaluation of {run.config.model.arch} on {BATCH} images of {self._setting.image_size} pixels at a "
            f"time, which holds {len(self._source.bank):,} features of width {student.dim}"
        )
