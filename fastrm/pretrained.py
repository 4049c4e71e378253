"""Trained networks from what a run leaves: its folder, its checkpoint, or an exported backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrm.methods import Method, build_method
from fastrm.models import Backbone, build_backbone
from fastrm.models.weights import metadata, read_backbone
from fastrm.run import checkpoint
from fastrm.settings.config import Config, from_flat


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What can be scored or exported.

    Attributes:
        path: where it came from.
        networks: ``student`` and ``teacher``; of an exported file only the one that it holds.
        about: of the networks in general, as :func:`fastrm.models.weights.metadata` has it.
        config: settings of the run, if it is one.
        method: student and teacher with their heads, if it is a run.
        step: optimizer steps that the run has made.
    """

    path: Path
    networks: dict[str, Backbone]
    about: dict[str, str]
    config: Config | None = None
    method: Method[Any] | None = None
    step: int | None = None

    @property
    def folder(self) -> Path:
        """Where what is found out about it belongs."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def image_size(self) -> int:
        """Side of the images that it was trained on, in pixels."""
        return int(self.about["image_size"])

    def untrained(self) -> Backbone:
        """The same backbone with new weights, on the CPU, and without what a run does to it for speed."""
        return build_backbone(self.about["arch"], image_size=self.image_size, stem=self.about["stem"])


def open_pretrained(path: Path, device: torch.device) -> Pretrained:
    """Rebuild the networks of a run folder, a checkpoint, or a file with a backbone.

    Raises:
        UsageError: it is missing, damaged, or of another layout.
    """
    if path.suffix == ".safetensors" and not path.is_dir():
        backbone, about = read_backbone(path)
        return Pretrained(path=path, networks={about["which"]: backbone.to(device)}, about=about)
    state = checkpoint.load(path)
    config = from_flat(state["config"])
    method = build_method(config, device=device, trained=False)
    with checkpoint.fitting(path):
        method.load_state_dict(state["method"])
    return Pretrained(
        path=path,
        networks={"student": method.student.backbone, "teacher": method.teacher.backbone},
        about=metadata(config, "student"),
        config=config,
        method=method,
        step=state["step"],
    )
