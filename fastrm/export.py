"""Hand a trained backbone to other programs.

    python -m fastrm.export runs/demo --which teacher --format torchvision --out teacher.safetensors

Beside the weights lies a model card: what they are, what images they expect, how they scored.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastrm import own
from fastrm.errors import UsageError, first_line
from fastrm.evaluate import EVALUATION
from fastrm.files import as_utf8, read_json, write_json, write_text, write_whole, writing
from fastrm.machine.memory import enough
from fastrm.models import Backbone
from fastrm.models.weights import misfit, plain_state, write_backbone
from fastrm.pretrained import Pretrained, open_pretrained
from fastrm.settings import command_line
from fastrm.settings.kinds import check_fields
from fastrm.settings.of_run import OfRun
from fastrm.version import __version__

Format = Literal["timm", "torchvision", "safetensors", "onnx"]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(OfRun):
    """Write a run's backbone in a form that other programs load, and a model card beside it."""

    format: Format
    """timm: for timm.create_model; a folder, which carries the preprocessing too, or a .safetensors file.
    torchvision: a state dict of its ResNets.
    safetensors: the weights in timm's names, with all that fastrm needs to rebuild the network.
    onnx: a graph from images to features."""
    out: Path
    """What is written: a file that ends in .safetensors, .pth (timm, torchvision) or .onnx; for timm also a folder."""
    which: Literal["student", "teacher"] = "student"
    """Whose backbone."""


def export(options: ExportConfig) -> Path:
    """Write the backbone and its card, and return the card's path.

    Raises:
        UsageError: the checkpoint cannot be used, the format cannot hold the network, or the file cannot be written.
    """
    check_fields(options)
    ending = options.out.suffix
    endings = {"timm": ("", ".safetensors", ".pth"), "torchvision": (".safetensors", ".pth"), "onnx": (".onnx",)}
    if ending not in endings.get(options.format, (".safetensors",)):
        wanted = ", ".join(e or "none (a folder)" for e in endings.get(options.format, (".safetensors",)))
        raise UsageError(f"--out {options.out} must end in {wanted} for --format {options.format}")
    card = _claim(options.out)
    trained = open_pretrained(options.path, CPU)
    if options.which not in trained.networks:
        raise UsageError(f"--which {options.which}: {options.path} holds the {', '.join(trained.networks)} only")
    about = trained.about | {"which": options.which}
    backbone = _plain(trained, options.which)
    write: dict[str, Callable[[Backbone, dict[str, str], Path], None]] = {
        "timm": _timm,
        "torchvision": _torchvision,
        "safetensors": _state,
        "onnx": _onnx,
    }
    with writing(options.out):
        write[options.format](backbone, about, options.out)
        write_text(card, model_card(trained, options, about, backbone.dim))
    return card


def _claim(out: Path) -> Path:
    """The card's path. Raise a UsageError if it, or what else is written, would take the place of another's file."""
    if out.suffix:
        card = out.with_name(f"{out.name}.md")  # with the ending, so that two formats beside each other have their own
        wrote = {".safetensors": own.exported, ".pth": own.state, ".onnx": own.onnx}[out.suffix]
        own.require("--out", out, wrote, what="an export")
        own.require("--out", card, own.card, what="a model card")
        return card
    for name, wrote in (("README.md", own.card), ("config.json", own.timm_config), ("model.safetensors", own.exported)):
        own.require("--out", out, wrote, holds=out / name)
    return out / "README.md"


def _plain(trained: Pretrained, which: str) -> Backbone:
    """The network without what was done to it for speed."""
    backbone = trained.untrained()
    backbone.net.load_state_dict(trained.networks[which].net.state_dict())
    return backbone.eval()


def _state(backbone: Backbone, about: dict[str, str], out: Path) -> None:
    """Weights by name, as the ending of the file says."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".pth":
        state = OrderedDict(plain_state(backbone))
        setattr(state, own.EXPORT, about)  # which no loader looks at
        write_whole(out, lambda partial: torch.save(state, partial))
    else:
        write_backbone(out, backbone, about)


def _timm(backbone: Backbone, about: dict[str, str], out: Path) -> None:
    """For ``timm.create_model(arch, checkpoint_path=FILE)``, or ``timm.create_model("local-dir:FOLDER")``."""
    import timm

    size = int(about["image_size"])
    timms = backbone.net.pretrained_cfg
    fixed = backbone.options
    _check(backbone, timm.create_model(about["arch"], num_classes=0, **fixed), about, "timm's")
    if out.suffix:
        _state(backbone, about, out)
        return
    _state(backbone, about, out / "model.safetensors")
    mean, std = json.loads(about["mean"]), json.loads(about["std"])
    preprocessing = {
        "input_size": [3, size, size],
        "fixed_input_size": bool(fixed),
        "interpolation": "bilinear",
        "crop_pct": 1.0 if size <= 64 else 0.875,
        "mean": mean,
        "std": std,
        "num_classes": 0,
        # What timm gives up when a number of classes or channels of one's own is asked for.
        **{name: timms[name] for name in ("classifier", "first_conv") if name in timms},
    }
    config = {"architecture": about["arch"], "num_classes": 0, "num_features": backbone.dim, "model_args": fixed}
    write_json(out / "config.json", {own.MARK: __version__, **config, "pretrained_cfg": preprocessing})


def _torchvision(backbone: Backbone, about: dict[str, str], out: Path) -> None:
    """For a ResNet of torchvision whose ``fc`` is an identity."""
    import torchvision

    arch = about["arch"]
    if arch not in torchvision.models.list_models() or type(backbone.net).__name__ != "ResNet":
        raise UsageError(f"--format torchvision holds ResNets only, and {arch} is none that torchvision has")
    other = torchvision.models.get_model(arch)
    other.fc = torch.nn.Identity()
    _check(backbone, other, about, "torchvision's")
    _state(backbone, about, out)


def _check(backbone: Backbone, other: torch.nn.Module, about: dict[str, str], whose: str) -> None:
    """Raise a UsageError unless the network that will have to take the weights can."""
    if problem := misfit(other.state_dict(), backbone.net.state_dict()):
        raise UsageError(
            f"{whose} {about['arch']} cannot hold this network: {problem}; a small stem, say, is only in "
            "--format safetensors and onnx"
        )


class _Features(torch.nn.Module):
    """Images to pooled features alone."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.backbone(images)[0]
        return pooled


def _onnx(backbone: Backbone, about: dict[str, str], out: Path) -> None:
    """``images`` float32 [batch, 3, size, size] to ``features`` float32 [batch, C]; the metadata are in the file."""
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UsageError(f"--format onnx needs {error.name}; pip install '.[onnx]' in fastrm's folder") from None
    size = int(about["image_size"])
    try:
        program = torch.onnx.export(
            _Features(backbone).eval(),
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch's exporter raises what the network's own code leads it to
        raise UsageError(f"--format onnx cannot hold {about['arch']}: {first_line(error)}") from None
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {name: as_utf8(text) for name, text in about.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda partial: partial.write_bytes(model.SerializeToString()))


def model_card(trained: Pretrained, options: ExportConfig, about: dict[str, str], dim: int) -> str:
    """Say in Markdown what the weights are, how they were trained and scored, and how to load them."""
    size, arch = about["image_size"], about["arch"]
    loading = {
        "timm": f'timm.create_model("{arch}", num_classes=0, checkpoint_path="{options.out.name}")'
        if options.out.suffix
        else f'timm.create_model("local-dir:{options.out.name}", pretrained=True)',
        "torchvision": f"model = torchvision.models.{arch}()\nmodel.fc = torch.nn.Identity()\nmodel.load_state_dict("
        + (
            f'torch.load("{options.out.name}", weights_only=True))'
            if options.out.suffix == ".pth"
            else f'safetensors.torch.load_file("{options.out.name}"))'
        ),
        "safetensors": f'fastrm.models.read_backbone(pathlib.Path("{options.out.name}"))',
        "onnx": f'onnxruntime.InferenceSession("{options.out.name}").run(["features"], {{"images": images}})',
    }
    front = f"---\nlibrary_name: {options.format}\ngenerator: {own.MARK} {__version__}\n"
    front += f"tags: [image-feature-extraction, self-supervised, {arch}]\n---\n"
    lines = [
        front,
        f"# {arch}, {about['which']} of {about['method']} with residual momentum",
        "",
        f"Pre-trained without labels by fastrm {about['fastrm']}. Images in, {dim} pooled features out.",
        "",
        "```python",
        loading[options.format],
        "```",
        "",
        f"**Images:** RGB in [0, 1], {size}x{size} pixels, less the mean {about['mean']}, divided by {about['std']}.",
        *_trained_how(trained),
        *_scored(trained, about["which"]),
    ]
    return "\n".join(lines) + "\n"


def _trained_how(trained: Pretrained) -> list[str]:
    if trained.config is None:
        return []
    flat = trained.config.flat()
    flat["data"] = Path(flat["data"]).name  # where it lies is nobody else's business
    names = [
        *("data", "recipe", "method", "residual_weight", "residual_at", "residual_warmup_epochs", "teacher_momentum"),
        *("teacher_momentum_end", "temperature", "optimizer", "lr", "weight_decay", "batch_size", "epochs", "seed"),
    ]
    rows = [f"| {name} | {flat[name]} |" for name in names if flat[name] is not None]
    return ["", f"## Training, {trained.step} steps", "", "| setting | value |", "|---|---|", *rows]


def _scored(trained: Pretrained, which: str) -> list[str]:
    """Rows of the run's ``evaluation.json``, if there is one."""
    path = trained.folder / EVALUATION
    try:
        sets: dict[str, Any] = read_json(path)["sets"] if path.is_file() else {}
        rows = [
            f"| {name} | {score} | {100 * found['value']:.2f} | {100 * random[score]['value']:.2f} |"
            for name, parts in sets.items()
            for random in [parts.get("scores", {}).get("random", {})]
            for score, found in parts.get("scores", {}).get(which, {}).items()
            if score in random
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is no evaluation that fastrm wrote; move it away") from None
    head = ["", "## Scores", "", "| images | score | % right | untrained network |", "|---|---|--:|--:|"]
    return [*head, *rows] if rows else []


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = command_line.parse(ExportConfig, argv, prog="python -m fastrm.export")
    with enough(CPU, lambda: f"an export of {options.path}", "Free some, and give the same command again"):
        card = export(options)
    print(f"{options.out}, and what it is in {card}")


if __name__ == "__main__":
    command_line.run(main)
