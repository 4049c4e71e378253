"""Evaluates the features by kNN during and after the run."""

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
    """Scores student and teacher every ``every`` epochs and after the last step.

    After the last step, it also scores the raw pixels and an untrained network as baselines. If a run starts from
    weights, it scores them before the first step, and warns if the student is worse in two evaluations in a row. All
    processes share the work, and wait for each other without a time limit.

    Args:
        source: labelled images of the bank and of the test.
        setting: device, precision, image size and loading of the evaluation.
        every: epochs between two evaluations; 0 means only the one at the end.
        online: the online linear classifier, if there is one.
        untrained: builds the untrained network.
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
        """Number of evaluations in a row in which the student was worse than these weights."""

    def state_dict(self) -> dict[str, Any]:
        """The score of the starting weights, and the comparison with it."""
        start = self._start
        right = None if start is None or start.right is None else torch.from_numpy(start.right)
        return {"start": None if start is None else start.value, "right": right, "below": self._below}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the score and the comparison."""
        self._below, right = state["below"], state.get("right")
        if right is not None:
            self._start = Estimate.of(right.numpy())
        elif (start := state["start"]) is not None:  # an older checkpoint, without the result for each image
            self._start = Estimate(start, start, start)

    def on_start(self, run: Run) -> None:
        """Score the starting weights; after a resume, repeat an evaluation that was interrupted."""
        if run.step == 0 and run.config.model.init_from is not None:
            _, found = self._watched(
                run, {}, "Nothing was trained; the same command with --eval-every 0 trains without it"
            )
            self._start = found["student"]
            run.log({"knn_start": self._start.value})
            run.say(f"start      kNN accuracy {self._start.value:.1%} with the starting weights, before the first step")
        elif run.step and not run.scored:
            self.on_step(run, run.step)

    def on_step(self, run: Run, step: int, _: object = None) -> None:
        """Evaluate if it is due. A checkpoint is saved first, so that an error here loses no steps."""
        end = step >= run.total_steps
        if not (end or run.schedule.ends_epoch(step, self._every)):
            return
        if run.asked().end:  # the next start of the same command evaluates
            return
        run.save(wait=True)
        hint = "The steps are saved; the same command with --eval-every 0 continues"
        scores, found = self._watched(run, self._baselines() if end else {}, hint)
        if self._start is not None:
            self._compare(run, self._start.value, scores["knn_student"])
        if end:
            scores |= {} if self._start is None else {"knn_start": self._start.value}
            run.remember(self._intervals(found))
        run.evaluated(scores)

    def _intervals(self, found: Mapping[str, Estimate]) -> dict[str, Any]:
        """Further results for k = 20: confidence intervals, and differences from the starting weights."""
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
                f"warning    the student's kNN accuracy, {now:.1%}, is below the {start:.1%} of the starting "
                "weights for the second time in a row: a lower --lr or a longer --warmup-epochs may preserve "
                "their features"
            )

    def _watched(
        self, run: Run, baselines: Mapping[str, nn.Module], hint: str
    ) -> tuple[dict[str, float], dict[str, Estimate]]:
        """The scores; an error of one process is raised in all of them."""
        with together(), enough(self._setting.device, lambda: self._request(run), hint):
            return self._scores(run, baselines)

    def _scores(self, run: Run, baselines: Mapping[str, nn.Module]) -> tuple[dict[str, float], dict[str, Estimate]]:
        """kNN accuracy of student and teacher for k = 20 and 200, and accuracy of the online classifier.

        For the networks in ``baselines``, only k = 20. The second result has the estimates for k = 20 by network.
        """
        networks: dict[str, nn.Module] = {"student": run.student, "teacher": run.teacher, **baselines}
        others = {} if self._online is None else {"student": [self._online]}
        found = frozen_scores(networks, self._source, self._setting, knn=True, others=others, name="evaluation")
        scores: dict[str, float] = {}
        for name, estimates in found.items():
            scores[f"knn_{name}"] = estimates["knn20"].value
            if name not in baselines:
                scores[f"knn200_{name}"] = estimates["knn200"].value
            if name in others:
                scores[f"linear_{name}"] = estimates["online"].value
        return scores, {name: estimates["knn20"] for name, estimates in found.items()}

    def _baselines(self) -> dict[str, nn.Module]:
        """The baselines: raw pixels and the untrained network."""
        networks: dict[str, nn.Module] = {"pixels": Pixels()}
        if self._untrained is not None:
            networks["untrained"] = self._untrained().to(self._setting.device)
        return networks

    def _request(self, run: Run) -> str:
        """Describe the memory request, for an error."""
        assert self._source.bank is not None
        student: Backbone = run.student
        return (
            f"an evaluation of {run.config.model.arch} on {BATCH} images of {self._setting.image_size} pixels at a "
            f"time, which holds {len(self._source.bank):,} features of width {student.dim}"
        )
