"""State dicts for ResNets of torchvision whose ``fc`` is an identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastrm.errors import UsageError
from fastrm.exports.base import Loaded, Subject, Target, require_fit, write_state


def refuse(subject: Subject) -> None:
    """Raise a UsageError unless torchvision has the same ResNet."""
    import torchvision

    name, channels = subject.name, subject.backbone.channels
    if name not in torchvision.models.list_models() or type(subject.backbone.net).__name__ != "ResNet":
        raise UsageError(f"--format torchvision holds ResNets only, and {name} is not one of torchvision's")
    if channels != 3:
        raise UsageError(
            f"--format torchvision holds networks for images of 3 channels only, and {name} takes {channels}; "
            "safetensors and onnx hold it, and timm unless it has a small stem"
        )
    with torch.device("meta"):
        require_fit(subject, _empty(name), "torchvision's")


def _empty(name: str) -> Any:
    import torchvision

    network = torchvision.models.get_model(name)
    network.fc = nn.Identity()
    return network


def loading(subject: Subject, out: Path) -> str:
    """Code that builds the network and loads the weights."""
    state = 'torch.load("{}", weights_only=True)' if out.suffix == ".pth" else 'safetensors.torch.load_file("{}")'
    return (
        f"model = torchvision.models.{subject.name}()\nmodel.fc = torch.nn.Identity()\n"
        f"model.load_state_dict({state.format(out.name)})"
    )


def load(subject: Subject, out: Path) -> Loaded:
    """Load the weights into torchvision's network."""
    net = _empty(subject.name)
    net.load_state_dict(torch.load(out, weights_only=True) if out.suffix == ".pth" else load_file(out))
    net.eval()

    def network(images: Tensor) -> dict[str, Tensor]:
        layers = list(net.children())[:-2]
        return {"features": net(images), "map": nn.Sequential(*layers)(images)}

    return Loaded(network)


TARGET = Target((".safetensors", ".pth"), refuse, write_state, loading, "torchvision", load)
