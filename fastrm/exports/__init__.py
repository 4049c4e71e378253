"""The formats in which a backbone is handed to other programs, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fastrm import own
from fastrm.exports import onnx, safetensors, timm, torchvision
from fastrm.exports.base import Target
from fastrm.exports.card import model_card
from fastrm.files import write_text, writing
from fastrm.pretrained import Pretrained

TARGETS: Mapping[str, Target] = {
    "timm": timm.TARGET,
    "torchvision": torchvision.TARGET,
    "safetensors": safetensors.TARGET,
    "onnx": onnx.TARGET,
}


def write(read: Callable[[], Pretrained], kind: str, which: str, out: Path) -> Path:
    """Write a backbone and its card, and return the card's path.

    Args:
        read: gives the networks, on the CPU; called when it is known that the files may be written.
        kind: one of ``TARGETS``.
        which: ``"student"`` or ``"teacher"``.
        out: the file or folder.

    Raises:
        UsageError: the format cannot hold the network, or the file cannot be written.
    """
    target, card = TARGETS[kind], _claim(out)
    trained = read()
    backbone = trained.network(which, f"--which {which}").eval()
    about = trained.about | ({"which": which} if which in trained.networks else {})
    with writing(out):
        target.write(backbone, about, out)
        write_text(card, model_card(trained, kind, about, backbone.dim, target.loading(backbone, about, out)))
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
