"""Backbones with published weights, which were not trained by fastrm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastrm.data.formats import RGB, PixelFormat
from fastrm.data.settling import per_channel
from fastrm.errors import UsageError, first_line
from fastrm.files import read_json
from fastrm.machine.memory import exhausted
from fastrm.models.backbone import Backbone
from fastrm.models.build import build_backbone
from fastrm.models.starting import on_a_hub, starting_weights, weights_file
from fastrm.models.weights import pixels_of, read_weights

FLAG = "--checkpoint"


class Published(NamedTuple):
    """A network with weights, and information about them."""

    backbone: Backbone
    """On the CPU."""
    arch: str
    """timm's name of the network."""
    stem: str
    image_size: int
    pixels: PixelFormat
    license: str | None
    """The license, as the publisher names it."""
    said: str
    """A description of the weights that were loaded."""


def describes_itself(given: Path) -> bool:
    """Whether the weights say which network they belong to, by a name or by the ``config.json`` of a folder."""
    return on_a_hub(given) or "architecture" in _config(given)


def published(
    given: Path,
    *,
    arch: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Published:
    """Build the network of published weights, which are given as for ``--init-from``, and load them.

    Args:
        given: the weights, as in :func:`fastrm.models.starting.starting_weights`.
        arch: timm's name of the network; needed if the weights do not say it.
        image_size: side of the images in pixels; None for the size that timm lists for the weights or the network.
        mean, std: per channel, or one for all channels; None for what the weights say, or ImageNet's.

    Raises:
        UsageError: there are no such weights, their network is unknown, or they do not fit it.
    """
    known = _known(given, arch, FLAG)
    arch = arch or known.architecture
    if arch is None:
        raise UsageError(
            f"{FLAG} {given} does not say which network it belongs to; give timm's name of the network as --arch"
        )
    size = image_size or known.input_size[-1]
    found = [_loaded(given, arch, size, "imagenet")]
    if len(found[0][1]) < len(found[0][0].net.state_dict()) and type(found[0][0].net).__name__ == "ResNet":
        found.append(_loaded(given, arch, size, "small"))
    backbone, state, said = max(found, key=lambda each: len(each[1]))
    backbone.net.load_state_dict(state, strict=False)
    told = _format(known) if describes_itself(given) else None
    format = told or RGB
    format = replace(
        format, mean=per_channel("mean", mean, 3) or format.mean, std=per_channel("std", std, 3) or format.std
    )
    if told is None and format == RGB:
        said += "; normalised with ImageNet's mean and standard deviation (--mean, --std)"
    stem = "imagenet" if backbone is found[0][0] else "small"
    return Published(backbone, arch, stem, size, format, known.license, said)


def trained_on(given: Path, *, flag: str = FLAG) -> PixelFormat | None:
    """The format of the pixels that weights were trained on; None if they do not say it.

    Args:
        given: the weights, as in :func:`fastrm.models.starting.starting_weights`.
        flag: setting that names the weights, for messages.

    Raises:
        UsageError: there are no such weights.
    """
    if describes_itself(given):
        return _format(_known(given, None, flag))
    path = weights_file(given, flag)
    about = read_weights(path).about
    return pixels_of(about, path) if "channels" in about else None


def _format(known: Any) -> PixelFormat:
    return PixelFormat(mean=tuple(known.mean), std=tuple(known.std))


def _loaded(given: Path, arch: str, size: int, stem: str) -> tuple[Backbone, dict[str, Any], str]:
    backbone = build_backbone(arch, image_size=size, stem=stem)
    return backbone, *starting_weights(backbone, given, partial=False, flag=FLAG)


def _config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder in Hugging Face's layout; empty if there is none."""
    try:
        found = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _known(given: Path, arch: str | None, flag: str) -> Any:
    """timm's information about the weights or the network, a ``timm.models.PretrainedCfg``."""
    from timm.models import PretrainedCfg, get_pretrained_cfg, load_model_config_from_hf

    hub, _, name = str(given).partition(":")
    try:
        if on_a_hub(given) and hub == "hf":
            values, arch, _ = load_model_config_from_hf(name)
        elif "architecture" in (config := _config(given)):
            values, arch = config.get("pretrained_cfg", {}), config["architecture"]
        else:
            name = name if on_a_hub(given) else arch or ""
            arch = name.partition(".")[0] or None
            values = vars(get_pretrained_cfg(name, allow_unregistered=True) or PretrainedCfg()) if name else {}
    except Exception as error:  # the hub and timm raise errors of many types
        if exhausted(error):
            raise
        raise UsageError(f"{flag} {given} cannot be loaded: {first_line(error)}") from None
    kept = {name: values[name] for name in ("input_size", "mean", "std", "license") if name in values}
    return PretrainedCfg(**kept, architecture=arch)
