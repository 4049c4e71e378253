"""Folders and files for ``timm.create_model``."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from fastrm import own
from fastrm.errors import UsageError
from fastrm.exports.base import Loaded, Subject, Target, require_fit, write_state
from fastrm.files import write_json
from fastrm.version import __version__


def refuse(subject: Subject) -> None:
    """Raise a UsageError unless timm builds the same network by its name."""
    require(subject, "timm")


def require(subject: Subject, kind: str) -> None:
    """The same for a format that needs a network of timm."""
    import timm

    name = subject.name
    if subject.is_module:
        raise UsageError(f"--format {kind} holds networks of timm only, and {name} is not one; safetensors holds it")
    require_fit(subject, timm.create_model(name, num_classes=0, **subject.backbone.options), "timm's")


def write(subject: Subject, out: Path) -> None:
    """Write a folder for ``create_model("local-dir:FOLDER")``, or a file for ``create_model(checkpoint_path=FILE)``."""
    if out.suffix:
        write_state(subject, out)
        return
    backbone, size = subject.backbone, subject.image_size
    timms, options, channels = backbone.net.pretrained_cfg, backbone.options, backbone.channels
    write_state(subject, out / "model.safetensors")
    # Layers that timm replaces for another number of classes or channels. Older versions assume that the first layer in
    # a file is for RGB, and would replace any other.
    replaced = ("classifier", "first_conv") if channels == 3 else ("classifier",)
    preprocessing = {
        "input_size": [channels, size, size],
        "fixed_input_size": "img_size" in options,
        "interpolation": "bilinear",
        "crop_pct": 1.0 if size <= 64 else 0.875,
        "mean": json.loads(subject.about["mean"]),
        "std": json.loads(subject.about["std"]),
        "num_classes": 0,
        **{name: timms[name] for name in replaced if name in timms},
    }
    config = {"architecture": subject.name, "num_classes": 0, "num_features": backbone.dim, "model_args": options}
    write_json(out / "config.json", {own.MARK: __version__, **config, "pretrained_cfg": preprocessing})


def loading(subject: Subject, out: Path) -> str:
    """Code that loads the file or the folder."""
    if out.suffix:
        options = "".join(f", {name}={value!r}" for name, value in subject.backbone.options.items())
        return f'timm.create_model("{subject.name}", num_classes=0{options}, checkpoint_path="{out.name}")'
    return f'timm.create_model("local-dir:{out.name}", pretrained=True)'


def load(subject: Subject, out: Path) -> Loaded:
    """Load the file or the folder with timm."""
    import timm

    if out.suffix:
        options = subject.backbone.options
        net = timm.create_model(subject.name, num_classes=0, **options, checkpoint_path=str(out))
    else:
        net = timm.create_model(f"local-dir:{out}", pretrained=True)
    net.eval()

    def network(images: Tensor) -> dict[str, Tensor]:
        features = net.forward_features(images)
        return {"features": net.forward_head(features, pre_logits=True).flatten(1), "map": features}

    return Loaded(network)


TARGET = Target(("", ".safetensors", ".pth"), refuse, write, loading, "timm", load)
