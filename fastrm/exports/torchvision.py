"""For a ResNet of torchvision's whose ``fc`` is an identity."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastrm.errors import UsageError
from fastrm.exports.base import About, Target, require_fit, write_state
from fastrm.models import Backbone


def write(backbone: Backbone, about: About, out: Path) -> None:
    """A state dict."""
    import torchvision

    arch = about["arch"]
    if arch not in torchvision.models.list_models() or type(backbone.net).__name__ != "ResNet":
        raise UsageError(f"--format torchvision holds ResNets only, and {arch} is none that torchvision has")
    if backbone.channels != 3:
        raise UsageError(
            f"--format torchvision holds networks for images of 3 channels only, and {arch} takes {backbone.channels}; "
            "safetensors and onnx hold it, and timm unless it has a small stem"
        )
    other = torchvision.models.get_model(arch)
    other.fc = nn.Identity()
    require_fit(backbone, other, about, "torchvision's")
    write_state(backbone, about, out)


def loading(_: Backbone, about: About, out: Path) -> str:
    """The network, and the weights into it."""
    state = 'torch.load("{}", weights_only=True)' if out.suffix == ".pth" else 'safetensors.torch.load_file("{}")'
    return (
        f"model = torchvision.models.{about['arch']}()\nmodel.fc = torch.nn.Identity()\n"
        f"model.load_state_dict({state.format(out.name)})"
    )


TARGET = Target((".safetensors", ".pth"), write, loading)
