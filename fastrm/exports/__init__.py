"""Exports: backbones in the formats of other programs, one file per format."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastrm import own
from fastrm.exports import detection, onnx, safetensors, timm, torchvision, transformers
from fastrm.exports.base import Subject, Target
from fastrm.exports.card import model_card
from fastrm.exports.check import Seen, compared
from fastrm.files import write_text, writing

TARGETS: Mapping[str, Target] = {
    "timm": timm.TARGET,
    "torchvision": torchvision.TARGET,
    "safetensors": safetensors.TARGET,
    "onnx": onnx.TARGET,
    "transformers": transformers.TARGET,
    "detectron2": detection.DETECTRON2,
    "mmdet": detection.MMDET,
}
_FOLDER = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
"""The files of an export to a folder."""


class Written(NamedTuple):
    """The result of an export."""

    card: Path
    """The model card."""
    checked: str
    """A sentence on the comparison: :func:`fastrm.exports.check.compared`."""


def write(
    read: Callable[[], Subject], kind: str, out: Path, seen: Callable[[Subject], Seen], flag: str = "--out"
) -> Written:
    """Write a backbone and its card, after the library that the format is for has loaded it with the same features.

    Args:
        read: returns the network; called once it is known that ``out`` may be written.
        kind: a key of ``TARGETS``.
        out: the file or folder.
        seen: returns the images for the comparison.
        flag: the setting that ``out`` follows from, for messages.

    Raises:
        UsageError: the format cannot hold the network, the library gives other features, or the file cannot be
            written. An earlier export at ``out`` is then unchanged.
    """
    target = TARGETS[kind]
    claim(out, flag)
    subject = read()
    target.refuse(subject)
    with writing(out, flag), _staged(out) as staged:
        target.write(subject, staged)
        checked = compared(target, subject, staged, seen)
        card = model_card(subject, kind, target.loading(subject, staged), checked)
        write_text(_card(staged), card)
    return Written(_card(out), checked)


def claim(out: Path, flag: str = "--out") -> None:
    """Raise a UsageError if an export to ``out`` would replace a file that fastrm did not write."""
    if out.suffix:
        own.require(flag, out, own.of_export, what="an export")
        own.require(flag, _card(out), own.of_export, what="a model card")
        return
    for name in _FOLDER:
        own.require(flag, out, own.of_export, holds=out / name)


def place(run: Path, kind: str) -> Path:
    """The path of an export in a run folder."""
    return run / own.EXPORTS / f"{kind}{TARGETS[kind].endings[0]}"


def _card(out: Path) -> Path:
    """The model card; that of a file has its whole name, so that two formats in a folder have one each."""
    return out.with_name(f"{out.name}.md") if out.suffix else out / "README.md"


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A path of the same name in a new folder, whose content takes its place at ``out`` if nothing is raised."""
    above = next(folder for folder in out.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".fastrm-export-", dir=above) as folder:
        staged = Path(folder, out.name or "export")
        yield staged
        into = out.parent if out.suffix else out
        into.mkdir(parents=True, exist_ok=True)
        written = list((staged.parent if out.suffix else staged).iterdir())
        for path in written:
            os.replace(path, into / path.name)
        if not out.suffix:  # files of an earlier export to another format
            for name in {*_FOLDER} - {path.name for path in written}:
                (into / name).unlink(missing_ok=True)
