"""Folders for Hugging Face Transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from fastrm import own
from fastrm.data.formats import BYTES, PixelFormat
from fastrm.errors import UsageError
from fastrm.exports import native, timm
from fastrm.exports.base import Loaded, Subject, Target
from fastrm.exports.check import LARGEST
from fastrm.files import as_utf8, read_json, write_json
from fastrm.packages import optional
from fastrm.version import __version__


def refuse(subject: Subject) -> None:
    """Raise a UsageError unless transformers has the network, or loads it through timm."""
    optional("transformers", extra="transformers", wanted_by="--format transformers")
    if native.native(subject) is None:
        timm.require(subject, "transformers")


def write(subject: Subject, out: Path) -> None:
    """Write the folder with transformers' own ``save_pretrained``, or that of timm, which transformers wraps."""
    model = native.native(subject)
    if model is None:
        timm.write(subject, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    setattr(model.config, own.MARK, __version__)
    with _quiet():
        model.save_pretrained(out)
        _processor(subject).save_pretrained(out)
    tensors = safetensors.torch.load_file(out / "model.safetensors")  # in the names that all versions load
    about = {name: as_utf8(text) for name, text in subject.about.items()}
    safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt", **about})
    path = out / "preprocessor_config.json"
    write_json(path, {own.MARK: __version__, **read_json(path)})


def _processor(subject: Subject) -> Any:
    """The view of :func:`fastrm.data.eval_view.eval_view` in transformers."""
    from transformers import BitImageProcessor

    size, pixels = subject.image_size, subject.pixels
    factor = scale(pixels)
    return BitImageProcessor(
        do_convert_rgb=pixels.channels == 3,
        do_resize=True,
        size={"height": size, "width": size} if size <= 64 else {"shortest_edge": round(size * 256 / 224)},
        resample=2,  # bilinear
        do_center_crop=size > 64,
        crop_size={"height": size, "width": size},
        do_rescale=factor is not None,
        rescale_factor=factor or 1.0,
        do_normalize=True,
        image_mean=json.loads(subject.about["mean"]),
        image_std=json.loads(subject.about["std"]),
    )


def scale(pixels: PixelFormat) -> float | None:
    """The factor from stored values to [0, 1]; None if there is not one for all bands, or if 0 does not stay 0."""
    limits = dict(pixels.limits)
    low, high = limits.get("uint8", next(iter(limits.values()), BYTES))
    if low != (0.0,) or len(high) != 1 or ("uint8" not in limits and len(limits) != 1):
        return None
    return 1 / high[0]


def loading(subject: Subject, out: Path) -> str:
    """Code that loads the folder."""
    lines = [f'model = transformers.AutoModel.from_pretrained("{out.name}")']
    if kind := read_json(out / "config.json").get("model_type"):
        lines += [
            f'backbone = transformers.{_backbone(kind).__name__}.from_pretrained("{out.name}")',
            "# AutoBackbone loads it from the Hub; version 5.24 opens no local folder by it.",
        ]
    else:
        lines.append("# Through timm; AutoBackbone does not load it.")
    lines.append(f'processor = transformers.AutoImageProcessor.from_pretrained("{out.name}")')
    return "\n".join(lines)


def load(_: Subject, out: Path) -> Loaded:
    """Load the folder with ``AutoModel``, and with the class of its backbone, whose map must be the same."""
    from transformers import AutoModel

    with _quiet():
        model = AutoModel.from_pretrained(str(out)).eval()
        kind = model.config.model_type
        if kind == "timm_wrapper":
            return Loaded(native.called(model), "AutoModel, through timm; AutoBackbone does not load it")
        backbone = _backbone(kind).from_pretrained(str(out)).eval()
    of_model = native.called(model)

    def network(images: Tensor) -> dict[str, Tensor]:
        found = of_model(images)
        want = native.as_backbone(model, found["map"], images)
        got = backbone(images).feature_maps[-1]
        if want.shape != got.shape or not (want - got).abs().max() <= LARGEST * want.abs().max():
            raise UsageError(f"{type(backbone).__name__} gives another map than AutoModel")
        return found

    return Loaded(network, f"AutoModel and {type(backbone).__name__}")


def _backbone(kind: str) -> Any:
    """The class that AutoBackbone makes of this type of model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

    return MODEL_FOR_BACKBONE_MAPPING[type(AutoConfig.for_model(kind))]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and without the notes on layers that only one of the two classes has."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


TARGET = Target(("",), refuse, write, loading, "transformers", load)
