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
    fixed = backbone.options
    require_fit(backbone, timm.create_model(about["arch"], num_classes=0, **fixed), about, "timm's")
    if out.suffix:
        write_state(backbone, about, out)
        return
    write_state(backbone, about, out / "model.safetensors")
    preprocessing = {
        "input_size": [3, size, size],
        "fixed_input_size": bool(fixed),
        "interpolation": "bilinear",
        "crop_pct": 1.0 if size <= 64 else 0.875,
        "mean": json.loads(about["mean"]),
        "std": json.loads(about["std"]),
        "num_classes": 0,
        # What timm gives up when a number of classes or channels of one's own is asked for.
        **{name: timms[name] for name in ("classifier", "first_conv") if name in timms},
    }
    config = {"architecture": about["arch"], "num_classes": 0, "num_features": backbone.dim, "model_args": fixed}
    write_json(out / "config.json", {own.MARK: __version__, **config, "pretrained_cfg": preprocessing})


def loading(_: Backbone, about: About, out: Path) -> str:
    """From a file or a folder."""
    if out.suffix:
        return f'timm.create_model("{about["arch"]}", num_classes=0, checkpoint_path="{out.name}")'
    return f'timm.create_model("local-dir:{out.name}", pretrained=True)'


TARGET = Target(("", ".safetensors", ".pth"), write, loading)
