"""kNN during the run and after it: how good the features are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrm.data import Source
from fastrm.hooks.base import Hook
from fastrm.machine.meeting import together
from fastrm.machine.memory import enough
from fastrm.models import Backbone
from fastrm.probes import Estimate, OnlineLinear, Pixels, frozen_scores
from fastrm.probes.features import BATCH, Setting

if TYPE_CHECKING:
    from fastrm.run.run import Run


class KNN(Hook):
    """Scores student and teacher at the end of every so many epochs, and after the last step.

    After the last step the raw pixels and a network that has learned nothing are scored beside them. Of a run that
    starts from weights these are scored before the first step, and a warning says where the student falls below them
    twice in a row. All processes share the work, and wait for each other however long it takes.

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
        self._start: Estimate | None = None
        """kNN accuracy of the weights that the run started from."""
        self._below = 0
        """Evaluations in a row in which the student was worse."""

    def state_dict(self) -> dict[str, Any]:
        """What the run started from, and how it compares."""
        start = self._start
        right = None if start is None or start.right is None else torch.from_numpy(start.right)
        return {"start": None if start is None else start.value, "right": right, "below": self._below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a run's."""
        self._below, right = state["below"], state.get("right")
        if right is not None:
            self._start = Estimate.of(right.numpy())
        elif (start := state["start"]) is not None:  # of a checkpoint that does not say which images were right
            self._start = Estimate(start, start, start)

    def on_start(self, run: Run) -> None:
        """Score the weights that the run starts from, or what the run before was cut off at."""
        if run.step == 0 and run.config.model.init_from is not None:
            _, found = self._watched(run, {}, "Nothing was trained; the same command with --eval-every 0 does without")
            self._start = found["student"]
            run.log({"knn_start": self._start.value})
            run.say(f"start      kNN accuracy {self._start.value:.1%}: of the weights, before the first step")
        elif run.step and not run.scored:
            self.on_step(run, run.step)

    def on_step(self, run: Run, step: int, _: object = None) -> None:
        """Score, if it is time. The steps before are saved first, so that nothing that happens here can lose them."""
        end = step >= run.total_steps
        if not (end or run.schedule.ends_epoch(step, self._every)):
            return
        if run.asked().end:  # the same command goes on with it
            return
        run.save(wait=True)
        hint = "The steps are saved; the same command with --eval-every 0 continues"
        scores, found = self._watched(run, self._beside() if end else {}, hint)
        if self._start is not None:
            self._compare(run, self._start.value, scores["knn_student"])
        if end:
            scores |= {} if self._start is None else {"knn_start": self._start.value}
            run.remember(self._intervals(found))
        run.evaluated(scores)

    def _intervals(self, found: Mapping[str, Estimate]) -> dict[str, Any]:
        """What the summary says of k = 20 besides: intervals, and how far the networks are above the start."""
        start = self._start
        every = {**found, **({} if start is None or start.right is None else {"start": start})}
        values: dict[str, Any] = {"knn_intervals": {name: [each.low, each.high] for name, each in every.items()}}
        if start is not None:
            above = {name: found[name].above(start) for name in ("student", "teacher")}
            values["knn_above_start"] = {name: each.json() for name, each in above.items() if each is not None}
        return values

    def _compare(self, run: Run, start: float, now: float) -> None:
        self._below = self._below + 1 if now < start else 0
        if self._below == 2:
            run.say(
                f"warning    the student's kNN accuracy, {now:.1%}, is below the {start:.1%} of the weights that the "
                "run started from, for the second time in a row: a lower --lr or a longer --warmup-epochs may keep "
                "what they know"
            )

    def _watched(
        self, run: Run, beside: Mapping[str, nn.Module], hint: str
    ) -> tuple[dict[str, float], dict[str, Estimate]]:
        """Scores, or in every process the same word on why there are none."""
        with together(), enough(self._setting.device, lambda: self._asked(run), hint):
            return self._scores(run, beside)

    def _scores(self, run: Run, beside: Mapping[str, nn.Module]) -> tuple[dict[str, float], dict[str, Estimate]]:
        """kNN accuracy of both backbones for k = 20 and 200, and of the classifier that is trained along.

        Of the networks ``beside`` for k = 20, which follows by network.
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
        return scores, {name: estimates["knn20"] for name, estimates in found.items()}

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
