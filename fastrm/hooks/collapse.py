"""Detects a collapse of the features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastrm.hooks.base import Hook
from fastrm.machine.device import in_double
from fastrm.probes import collapsed, effective_rank, feature_std

if TYPE_CHECKING:
    from fastrm.run.run import Run
    from fastrm.run.step import Output


class CollapseWatch(Hook):
    """Logs the spread of the features in a batch, and warns if they collapse."""

    def on_step(self, run: Run, step: int, outputs: Sequence[Output]) -> None:
        """Measure the first micro-batch of a logged step."""
        if run.logging:
            features = outputs[0].features
            std, rank = torch.stack([in_double(feature_std(features)), effective_rank(features)]).tolist()
            if (warning := collapsed(std, rank, len(features))) is not None:
                run.say(f"warning    {warning}")
            run.log({"feature_std": std, "effective_rank": rank})
