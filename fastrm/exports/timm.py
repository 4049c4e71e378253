"""For ``timm.create_model``."""

from __future__ import annotations

import json
from pathlib import Path

from fastrm import own
from fastrm.errors import UsageError
from fastrm.exports.base import About, Target, require_fit, write_state
from fastrm.files import write_json
from fastrm.models import Backbone
from fastrm.models.module import needs_module
from fastrm.version import __version__


def write(backbone: Backbone, about: About, out: Path) -> None:
    """For ``create_model(arch, checkpoint_path=FILE)``, or ``create_model("local-dir:FOLDER")``."""
    import timm

    if needs_module(about["arch"]):
        raise UsageError(f"--format timm holds networks of timm's, and {about['arch']} is none; safetensors holds it")
    size = int(about["image_size"])
    timms = backbone.net.pretrained_cfg
    options, channels = backbone.options, backbone.channels
    require_fit(backbone, timm.create_model(about["arch"], num_classes=0, **options), about, "timm's")
    if out.suffix:
        write_state(backbone, about, out)
        return
    write_state(backbone, about, out / "model.safetensors")
    # What timm gives up when a number of classes or channels of one's own is asked for. Older versions take the first
    # layer in a file for one of RGB, and would draw another one anew.
    given_up = ("classifier", "first_conv") if channels == 3 else ("classifier",)
    preprocessing = {
        "input_size": [channels, size, size],
        "fixed_input_size": "img_size" in options,
        "interpolation": "bilinear",
        "crop_pct": 1.0 if size <= 64 else 0.875,
        "mean": json.loads(about["mean"]),
        "std": json.loads(about["std"]),
        "num_classes": 0,
        **{name: timms[name] for name in given_up if name in timms},
    }
    config = {"architecture": about["arch"], "num_classes": 0, "num_features": backbone.dim, "model_args": options}
    write_json(out / "config.json", {own.MARK: __version__, **config, "pretrained_cfg": preprocessing})


def loading(backbone: Backbone, about: About, out: Path) -> str:
    """From a file or a folder."""
    if out.suffix:
        options = "".join(f", {name}={value!r}" for name, value in backbone.options.items())
        return f'timm.create_model("{about["arch"]}", num_classes=0{options}, checkpoint_path="{out.name}")'
    return f'timm.create_model("local-dir:{out.name}", pretrained=True)'


TARGET = Target(("", ".safetensors", ".pth"), write, loading)
