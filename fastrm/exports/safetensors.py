"""Files for ``fastrm.load``, and for programs that read tensors by name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastrm.exports.base import Loaded, Subject, Target, anything, write_state
from fastrm.exports.check import outputs
from fastrm.models import read_backbone


def loading(subject: Subject, out: Path) -> str:
    """Code that calls ``fastrm.load``, with a module of the same class if it is of one."""
    module = f", arch={subject.name}(…)" if subject.is_module else ""
    return f'fastrm.load("{out.name}", which="{subject.about["which"]}"{module})'


def load(subject: Subject, out: Path) -> Loaded:
    """Rebuild the backbone from the file, as ``fastrm.load`` does."""
    backbone, _ = read_backbone(out, arch=subject.backbone.net if subject.is_module else None)
    backbone.eval()

    def network(images: Tensor) -> dict[str, Tensor]:
        return outputs(backbone, images)

    return Loaded(network)


TARGET = Target((".safetensors",), anything, write_state, loading, "fastrm", load)
