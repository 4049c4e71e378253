"""Export a trained backbone for other programs.

    python -m fastrm.export runs/demo --which teacher --format torchvision --out teacher.safetensors

The export is loaded by the library that it is for and compared with the network. A model card is written beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastrm.errors import UsageError
from fastrm.exports import TARGETS, Written, write
from fastrm.exports.base import Subject
from fastrm.exports.check import Seen, given, of_run
from fastrm.machine.memory import enough
from fastrm.pretrained import read_pretrained
from fastrm.settings import command_line
from fastrm.settings.kinds import checked
from fastrm.settings.of_run import OfRun
from fastrm.terminal import shell


@dataclass(frozen=True, kw_only=True)
class ExportConfig(OfRun):
    """Write a run's backbone in a form that other programs load, with a model card, and check that they do."""

    format: Literal["timm", "torchvision", "safetensors", "onnx", "transformers", "detectron2", "mmdet"]
    """Format to write. timm is a folder with weights and preprocessing, or a weight file, for timm.create_model.
    torchvision is a state dict of its ResNets.
    safetensors has the weights in timm's names, and what fastrm needs to rebuild the network.
    onnx is a graph from images to features.
    transformers is a folder for AutoModel and AutoImageProcessor of Hugging Face.
    detectron2 and mmdet are files for the ResNets of Detectron2 and MMDetection."""
    out: Path
    """File to write, which ends in .safetensors, .pth (timm, torchvision, mmdet), .onnx or .pkl (detectron2).
    For transformers it is a folder, and for timm it may be one."""
    which: Literal["student", "teacher"] = "student"
    """Network whose backbone is written."""
    images: tuple[Path, ...] = ()
    """Images to compare the export with the network on, up to 8.
    If not given, images of the run if they are on this machine, or else made images."""


def export(options: ExportConfig, *, arch: nn.Module | None = None) -> Path:
    """Write the backbone and its card, and return the path of the card.

    The library that the format is for loads the export, and its features are compared with those of the network. The
    card contains the largest difference, or that the library is not installed.

    Args:
        options: the network, the format and the file.
        arch: a module built like the one that was trained, if the network is not from timm; safetensors and onnx can
            hold it.

    Raises:
        UsageError: the checkpoint cannot be used, the format cannot hold the network, the library gives other features,
            or the file cannot be written. Nothing was written then.
    """
    return _export(options, arch).card


def _export(options: ExportConfig, arch: nn.Module | None = None) -> Written:
    options = checked(options)
    endings = TARGETS[options.format].endings
    if options.out.suffix not in endings:
        wanted = ", ".join(ending or "none (a folder)" for ending in endings)
        raise UsageError(f"--out {options.out} must end in {wanted} for --format {options.format}")

    def read() -> Subject:
        trained = read_pretrained(options.path, arch=arch or options.arch, **options.of_others)
        which = options.which
        return Subject(
            backbone=trained.network(which, f"--which {which}").eval(),
            about=trained.about | ({"which": which} if which in trained.networks else {}),
            pixels=trained.pixels,
            folder=trained.folder,
            settings=trained.settings,
            step=trained.step,
            license=trained.license,
        )

    def seen(subject: Subject) -> Seen:
        return given(subject, options.images) if options.images else of_run(subject)

    return write(read, options.format, options.out, seen)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = command_line.parse(ExportConfig, argv, prog="python -m fastrm.export")
    cpu = torch.device("cpu")
    with enough(cpu, lambda: f"an export of {options.path}", "Free some, and give the same command again"):
        card, said = _export(options)
    print(f"{options.out}, described in {card}")
    print(said)


if __name__ == "__main__":
    shell.run(main)
