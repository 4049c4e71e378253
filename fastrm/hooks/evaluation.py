"""What a run looks at while it trains: how its features spread, and what classifiers make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrm.data import Source
from fastrm.errors import UsageError
from fastrm.hooks.metrics import Recorder
from fastrm.machine.distributed import barrier, world
from fastrm.machine.memory import enough
from fastrm.methods import Method
from fastrm.optim import Schedule
from fastrm.probes import OnlineLinear, collapsed, effective_rank, feature_std, frozen_scores
from fastrm.probes.features import BATCH, Setting
from fastrm.settings.config import Config


def online_linear(config: Config, source: Source, method: Method[Any], device: torch.device) -> OnlineLinear | None:
    """The linear classifier that is trained along, if it is asked for."""
    if not config.run.online_linear:
        return None
    if source.train.labels is None:
        raise UsageError(f"--online-linear needs labels, and the images of {source.name} have none")
    assert config.input.batch_size is not None
    dim = method.student.backbone.dim
    return OnlineLinear(dim, source.train.labels, batch_size=config.input.batch_size, device=device)


def watched(features: Tensor, recorder: Recorder) -> dict[str, float]:
    """How far the features of a batch differ, with a warning where they do not."""
    std, rank = torch.stack([feature_std(features).double(), effective_rank(features)]).tolist()
    if (warning := collapsed(std, rank, len(features))) is not None:
        recorder.note(f"warning    {warning}")
    return {"feature_std": std, "effective_rank": rank}


class Evaluations:
    """The evaluations of a run: at the end of every so many epochs, and after the last step.

    Args:
        config: settings of the run, resolved.
        method, source, online: what is scored.
        recorder: gets the scores.
        schedule: of the run.
        workers: processes that read the images.
    """

    def __init__(
        self,
        config: Config,
        method: Method[Any],
        source: Source,
        online: OnlineLinear | None,
        recorder: Recorder,
        schedule: Schedule,
        *,
        device: torch.device,
        workers: int,
    ) -> None:
        self._config, self._device = config, device
        self._parts = (method, source, Setting(config.input.image_size, device, workers), online)
        self._recorder, self._schedule = recorder, schedule
        self._every = config.run.eval_every
        if self._every and source.test is None:
            self._every = 0
            recorder.note("evaluation kNN is left out: the images have no labels")

    def _asked(self) -> str:
        method, source, setting, _ = self._parts
        assert source.bank is not None
        return (
            f"an evaluation of {self._config.model.arch} on {BATCH} images of {setting.image_size} pixels at a time, "
            f"which holds {len(source.bank):,} features of width {method.student.backbone.dim}"
        )

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be scored."""
        return self._every > 0 and (step >= self._schedule.total or self._schedule.ends_epoch(step, self._every))

    def run(self, step: int) -> dict[str, float]:
        """Score and record; to be called in all processes, of which the first does it and gets the scores.

        What comes before it has been saved: whatever happens here, the same command goes on with the evaluation.
        """
        scores: dict[str, float] = {}
        if world().rank == 0:
            with enough(self._device, self._asked, "The steps are saved; the same command with --eval-every 0 goes on"):
                scores = evaluated(*self._parts)
            self._recorder.record({"step": step, "epoch": self._schedule.epoch(step), **scores})
        barrier()
        return scores


def evaluated(method: Method[Any], source: Source, setting: Setting, online: OnlineLinear | None) -> dict[str, float]:
    """kNN accuracy of both backbones for k = 20 and 200, and of the classifier that is trained along."""
    scores: dict[str, float] = {}
    for name in ("student", "teacher"):
        others = [online] if online is not None and name == "student" else []
        backbone, about = getattr(method, name).backbone, f"evaluation of the {name}"
        found = frozen_scores(backbone, source, setting, knn=True, others=others, name=about)
        scores |= {f"knn_{name}": found["knn20"].value, f"knn200_{name}": found["knn200"].value}
        if others:
            scores[f"linear_{name}"] = found["online"].value
    return scores
