"""Writes the results of a complete run: ``summary.json`` and the student's backbone."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastrm.data import Source
from fastrm.data.formats import PixelFormat
from fastrm.errors import UsageError
from fastrm.evaluated import SUMMARY
from fastrm.files import read_json, write_json
from fastrm.models import Backbone
from fastrm.models.weights import BACKBONE, metadata, write_backbone
from fastrm.settings.config import Config
from fastrm.version import __version__


class Results:
    """The results of a run. Everything but the scores is collected at once, so that it cannot fail later.

    Args:
        out: the run folder.
        config: resolved settings of the run.
        source: images of the run.
        format: their conversion to the input of the network.
    """

    def __init__(self, out: Path, config: Config, source: Source, format: PixelFormat) -> None:
        self.out = out
        self._weights = metadata(config.flat(), "student", format)
        self._about = {
            "images": len(source.train),
            **{f"knn_{name}": count for name, count in source.scored.items()},
            "method": config.method.method,
            "arch": config.model.arch,
            "residual_weight": config.method.residual_weight,
            "residual_at": config.method.residual_at,
            "seed": config.run.seed,
            "fastrm": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def write(self, student: Backbone, latest: Mapping[str, Any]) -> dict[str, Any]:
        """Write the student's backbone in timm's names, and the summary, which names the step of the results.

        Returns:
            The content of the summary.
        """
        write_backbone(self.out / BACKBONE, student, self._weights)
        write_json(self.out / SUMMARY, {**latest, **self._about})
        return read_json(self.out / SUMMARY)


def intervals(out: Path, step: int) -> dict[str, Any]:
    """The entries besides the metrics in the summary of a run of ``step`` steps; empty if there is no summary."""
    names = ("knn_intervals", "knn_above_start")
    summary = read_json(out / SUMMARY) if complete(out, step) else {}
    return {name: summary[name] for name in names if name in summary}


def complete(out: Path, step: int) -> bool:
    """Whether a run folder has the results of a run of ``step`` steps."""
    path = out / SUMMARY
    if not path.is_file():
        return False
    try:
        return bool(read_json(path).get("step") == step)
    except (ValueError, AttributeError):
        raise UsageError(f"{path} is not a summary that fastrm wrote; move it away") from None
