"""Reads and writes files with the weights of a backbone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor, nn

from fastrm import own
from fastrm.data.formats import RGB, PixelFormat
from fastrm.errors import UsageError
from fastrm.files import NotRead, absent, as_utf8, load_tensors, only_plain, published_name, write_whole
from fastrm.models.backbone import Backbone
from fastrm.models.build import build_backbone
from fastrm.models.module import module_name, needs_module
from fastrm.version import __version__

BACKBONE = "backbone.safetensors"
"""The file with the student's backbone in the folder of a complete run."""

# Prefixes of classifiers and projectors in other libraries; timm's names are added per network.
_HEADS = ("fc.", "head.", "classifier.")


def metadata(settings: Mapping[str, Any], which: str, pixels: PixelFormat = RGB) -> dict[str, str]:
    """The metadata of a weights file, which describe the network and its input images.

    Args:
        settings: settings of the run by name, from :meth:`fastrm.settings.config.Config.flat`.
        which: ``"student"`` or ``"teacher"``.
        pixels: pixel format of the images; :func:`pixels_of` reads it back.
    """
    return {
        "which": which,
        "arch": settings["arch"],
        "stem": settings["stem"],
        "image_size": str(settings["image_size"]),
        **{name: json.dumps(value) for name, value in pixels.plain().items()},
        "method": settings["method"],
        "data": published_name(settings["data"]),
        "fastrm": __version__,
    }


def pixels_of(about: Mapping[str, str], path: Path) -> PixelFormat:
    """The pixel format in the metadata of a weights file; 8-bit RGB for old files without one.

    Args:
        about: metadata of the file.
        path: the file, for messages.

    Raises:
        UsageError: the format is invalid.
    """
    if "channels" not in about:
        return RGB
    try:
        return PixelFormat.of({name: json.loads(about[name]) for name in RGB.plain() if name in about})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} has an invalid description of its pixels: {', '.join(RGB.plain())}") from None


def write_backbone(path: Path, backbone: Backbone, about: dict[str, str]) -> None:
    """Write a backbone's weights by timm's names as safetensors; the file is complete or absent."""
    texts = {name: as_utf8(text) for name, text in about.items()}
    content = safetensors.torch.save(plain_state(backbone), metadata=texts)
    write_whole(path, lambda partial: partial.write_bytes(content))


def plain_state(backbone: Backbone) -> dict[str, Tensor]:
    """Contiguous copies of a backbone's weights by timm's names, on the CPU."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in backbone.net.state_dict().items()}


class Weights(NamedTuple):
    """The content of a file with weights."""

    tensors: dict[str, Tensor]
    """By name; names of nested tensors are joined by dots."""
    about: dict[str, str]
    """Metadata, if fastrm wrote the file."""
    not_read: list[str]
    """Classes of the objects that are not plain data, such as the options of the program that wrote the file."""


def read_weights(path: Path) -> Weights:
    """Read a file with weights; for a run folder, its backbone.

    Raises:
        UsageError: there is no such file, or it holds no tensors by name.
    """
    if path.is_dir():
        path = path / BACKBONE
    if not path.is_file():
        raise UsageError(absent(path))
    about: dict[str, str] = {}
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, safetensors.SafetensorError) as error:
            raise UsageError(f"{path} cannot be read as safetensors: {error}") from None
    else:
        state = load_tensors(path, other_objects=True)
        about = getattr(state, own.EXPORT, about)
    named = dict(_named(state))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    not_read = sorted({value.kind for value in named.values() if isinstance(value, NotRead)})
    if not tensors:
        why = f": {only_plain(not_read[0])}; save the state_dict() of a module" if not_read else ""
        raise UsageError(f"{path} holds no tensors by name, as weights of a network must be{why}")
    return Weights(tensors, about, not_read)


def _named(found: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and objects that were not read, by the names of the mappings that hold them, joined by dots."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from _named(value, f"{name}.{key}" if name else str(key))
    elif isinstance(found, NotRead) or (name and isinstance(found, Tensor)):
        yield name, found


def load_weights(backbone: Backbone, state: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Load weights into a backbone, without those of a classifier.

    Args:
        backbone: the backbone; not changed if the weights do not fit.
        state: tensors by timm's names, from :func:`read_weights`.
        source: setting and path of the weights, for messages.

    Returns:
        Names of the classifier's tensors, which were left out.

    Raises:
        UsageError: the weights belong to another network.
    """
    ours = backbone.net.state_dict()
    # Names of the network itself are kept: head.norm of ConvNeXt is the norm before the classifier.
    left_out = [name for name in state if name not in ours and name.startswith(classifiers(backbone))]
    state = {name: value for name, value in state.items() if name not in left_out}
    if problem := misfit(ours, state):
        raise UsageError(f"{source} is of another network: {problem}; --arch and --stem must fit")
    backbone.net.load_state_dict(state)
    return left_out


def classifiers(backbone: Backbone) -> tuple[str, ...]:
    """Prefixes of the names of a classifier's tensors."""
    return (*_HEADS, *(part.partition(".")[0] + "." for part in _published(backbone, "classifier")))


def _published(backbone: Backbone, part: str) -> tuple[str, ...]:
    """Names of the layers that timm calls ``classifier`` or ``first_conv``; some networks have several."""
    named = (getattr(backbone.net, "pretrained_cfg", None) or {}).get(part) or ()
    return (named,) if isinstance(named, str) else tuple(named)


def adapted(backbone: Backbone, state: Mapping[str, Tensor], *, source: str) -> tuple[dict[str, Tensor], str]:
    """Adapt weights for RGB images to a backbone with other channels, by repeating or adding channels as timm does.

    Args:
        backbone: backbone for the weights; it is not changed.
        state: tensors by timm's names, from :func:`read_weights`.
        source: setting and path of the weights, for messages.

    Returns:
        The weights and a description of the change, which is empty if the number of channels is the same.

    Raises:
        UsageError: the weights are not for three channels, or timm cannot adapt this layer.
    """
    from timm.models import adapt_input_conv

    state, ours, said = dict(state), backbone.net.state_dict(), ""
    for name in _first_layers(backbone):
        theirs, wanted = (list(tensors[name].shape) if name in tensors else [] for tensors in (state, ours))
        if theirs == wanted or len(theirs) < 2 or theirs[:1] + theirs[2:] != wanted[:1] + wanted[2:]:
            continue  # if it belongs to another network, load_weights raises an error
        channels = theirs[1] * backbone.channels // wanted[1]
        which = f"{source}: its first layer ({name}) takes {channels} channels, and the images have"
        if channels != 3:
            raise UsageError(f"{which} {backbone.channels}; only weights for 3 channels can be adapted")
        try:
            state[name] = adapt_input_conv(backbone.channels, state[name])
        except (NotImplementedError, AssertionError):
            raise UsageError(f"{which} {backbone.channels}; timm does not adapt layers of this form") from None
        said = f"first layer adapted from 3 to {backbone.channels} channels"
    return state, said


def _first_layers(backbone: Backbone) -> list[str]:
    """Names of the weights of the first layers."""
    found = [f"{layer}.weight" for layer in _published(backbone, "first_conv")]
    modules = dict(backbone.net.named_modules())
    if all(name.removesuffix(".weight") in modules for name in found) and found:
        return found
    # A module of the user, or a network with a small stem.
    takes = (n for n, m in modules.items() if isinstance(m, nn.Conv2d) and m.in_channels == backbone.channels)
    return [f"{name}.weight" for name in takes][:1]


def misfit(ours: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Why a network with the tensors ``ours`` cannot load ``state``; empty if it can."""
    missing, foreign = [n for n in ours if n not in state], [n for n in state if n not in ours]
    shapes = [n for n in ours if n in state and ours[n].shape != state[n].shape]
    kinds = (("missing", missing), ("foreign", foreign), ("of other shapes", shapes))
    return "; ".join(f"{len(names)} tensors are {kind} (first {names[0]})" for kind, names in kinds if names)


def backbone_of(
    state: Mapping[str, Tensor], about: Mapping[str, str], path: Path, *, arch: nn.Module | None = None
) -> Backbone:
    """Build the backbone of a weights file, and load the weights.

    Args:
        state: tensors by the network's names.
        about: metadata of the file, from :func:`metadata`.
        path: the file, for messages.
        arch: a module of the same class, if the network is not from timm.

    Raises:
        UsageError: the weights belong to another network, or to a module and ``arch`` is missing.
    """
    if arch is None and needs_module(about["arch"]):
        raise UsageError(
            f"{path} is of {about['arch']}, which timm does not have: if it is your own module, pass one from Python, "
            f"arch={about['arch']}(…) to fastrm.load, fastrm.evaluate.evaluate or fastrm.export.export"
        )
    if arch is not None and not needs_module(about["arch"]):
        raise UsageError(f"{path} is of timm's {about['arch']}; arch={module_name(arch)} must be left out")
    wanted = about["arch"] if arch is None else arch
    pixels = pixels_of(about, path)
    backbone = build_backbone(wanted, image_size=int(about["image_size"]), stem=about["stem"], channels=pixels.channels)
    if arch is None:
        load_weights(backbone, state, source=f"--checkpoint {path}")
    elif problem := misfit(backbone.net.state_dict(), state):
        raise UsageError(f"{path} is of another {about['arch']} than arch={module_name(arch)}: {problem}")
    else:
        backbone.net.load_state_dict(state)
    return backbone


def read_backbone(path: Path, *, arch: nn.Module | None = None) -> tuple[Backbone, dict[str, str]]:
    """Build the backbone of a file that fastrm wrote.

    Args:
        path: the file.
        arch: a module of the same class, if the network is the user's module.

    Raises:
        UsageError: the file cannot be read or has no metadata, or ``arch`` is missing or another network.
    """
    state, about, _ = read_weights(path)
    if missing := [name for name in ("which", "arch", "stem", "image_size") if name not in about]:
        raise UsageError(
            f"{path} does not say which network it belongs to (no {', '.join(missing)}); give a run folder, a "
            "checkpoint, or a file that fastrm wrote, or --arch with timm's name of the network"
        )
    if not about["image_size"].isdecimal():
        raise UsageError(f"{path}: image_size is {about['image_size']}, which is not a number of pixels")
    return backbone_of(state, about, path, arch=arch), about
