"""Hand a trained backbone to other programs.

    python -m fastrm.export runs/demo --which teacher --format torchvision --out teacher.safetensors

Beside the weights lies a model card: what they are, what images they expect, how they scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastrm.errors import UsageError
from fastrm.exports import TARGETS, write
from fastrm.machine.memory import enough
from fastrm.pretrained import read_pretrained
from fastrm.settings import command_line
from fastrm.settings.kinds import checked
from fastrm.settings.of_run import OfRun
from fastrm.terminal import shell


@dataclass(frozen=True, kw_only=True)
class ExportConfig(OfRun):
    """Write a run's backbone in a form that other programs load, and a model card beside it."""

    format: Literal["timm", "torchvision", "safetensors", "onnx"]
    """Format to write. timm is a folder with weights and preprocessing, or a weight file, for timm.create_model.
    torchvision is a state dict of its ResNets.
    safetensors has the weights in timm's names, and what fastrm needs to rebuild the network.
    onnx is a graph from images to features."""
    out: Path
    """File to write, which ends in .safetensors, .pth (timm, torchvision) or .onnx; for timm it may be a folder."""
    which: Literal["student", "teacher"] = "student"
    """Network whose backbone is written."""


def export(options: ExportConfig, *, arch: nn.Module | None = None) -> Path:
    """Write the backbone and its card, and return the card's path.

    Args:
        options: what is written, and where.
        arch: where a module of yours was trained, another one that is built alike; safetensors and onnx can hold it.

    Raises:
        UsageError: the checkpoint cannot be used, the format cannot hold the network, or the file cannot be written.
    """
    options = checked(options)
    endings = TARGETS[options.format].endings
    if options.out.suffix not in endings:
        wanted = ", ".join(ending or "none (a folder)" for ending in endings)
        raise UsageError(f"--out {options.out} must end in {wanted} for --format {options.format}")
    return write(
        lambda: read_pretrained(options.path, arch=arch or options.arch, image_size=options.image_size),
        options.format,
        options.which,
        options.out,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = command_line.parse(ExportConfig, argv, prog="python -m fastrm.export")
    cpu = torch.device("cpu")
    with enough(cpu, lambda: f"an export of {options.path}", "Free some, and give the same command again"):
        card = export(options)
    print(f"{options.out}, and what it is in {card}")


if __name__ == "__main__":
    shell.run(main)
