"""Weights to start a backbone from, in whatever layout they were published."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastrm.errors import UsageError, first_line
from fastrm.machine.memory import exhausted
from fastrm.models.backbone import Backbone
from fastrm.models.weights import BACKBONE, adapted, classifiers, misfit, read_weights

LEAST = 0.95
"""Share of the parameters, of the network's and of the file's backbone's, that must match."""
HUBS = {"timm:": "", "hf:": "hf-hub:"}
"""How timm calls where it finds published weights, by how the user does."""
_FILES = (BACKBONE, "model.safetensors", "pytorch_model.bin")
"""What a folder may hold: a run's, or one of Hugging Face's form."""
# Averages of the network that is trained; where a file has both, the network itself is taken.
_COPIES = ("teacher", "momentum", "encoder_k", "target", "ema")
# What stands in the same place in a file, and is none of the backbone.
_BESIDE = (
    "decoder",
    "mask_token",
    "projector",
    "predictor",
    "projection_head",
    "prediction_head",
    "queue",
    "prototypes",
)


def on_a_hub(given: Path) -> bool:
    """Whether weights are named in place of a file that holds them."""
    return str(given).startswith(tuple(HUBS))


def starting_weights(
    backbone: Backbone, given: Path, *, partial: bool, flag: str = "--init-from"
) -> tuple[dict[str, Tensor], str]:
    """Find the tensors of published weights that are a backbone's.

    Understood are ``timm:NAME`` and ``hf:OWNER/NAME``, which timm loads from its cache or over a network; a folder of
    a run, or with ``model.safetensors``; and files of tensors by name, nested as deeply as it may be: fastrm's, those
    of MoCo, DINO, MAE, DINOv2 and the like, of which the part is taken that fits the network best, and the student
    where a file has an average too. Position embeddings and patches of another size are resampled as timm does it, and
    the first layer is adapted to the bands.

    Args:
        backbone: what is to start from them.
        given: where they are.
        partial: whether less than 95 % of the parameters may match.
        flag: the setting that names them, for messages.

    Returns:
        Tensors by the network's names, all of which fit, and in words what they are.

    Raises:
        UsageError: there is no such file, or too little of it fits.
    """
    source, ours = f"{flag} {given}", backbone.net.state_dict()
    state, notes = _of_backbone(_tensors(given, backbone, flag), backbone), []
    state, change = adapted(backbone, state, source=source)
    notes += [change] if change else []
    if any(name not in state or state[name].shape != value.shape for name, value in ours.items()):
        state, change = _by_timm(backbone, state)
        notes += [change] if change else []
    fitting = {name: state[name] for name, value in ours.items() if name in state and state[name].shape == value.shape}
    beside = [name for name in state if name not in ours and _is_beside(name, classifiers(backbone))]
    foreign = [name for name in state if name not in fitting and name not in beside]
    taken = _count(fitting.values())
    shares = (taken / _count(ours.values()), taken / max(1, taken + _count(state[name] for name in foreign)))
    about = (
        f"{len(fitting)} of {len(ours)} tensors ({taken / 1e6:.1f} of {_count(ours.values()) / 1e6:.1f} M parameters)"
    )
    if not fitting or (min(shares) < LEAST and not partial):
        problem = misfit(ours, {name: state[name] for name in (*fitting, *foreign)})
        hint = ", or --init-partial takes what matches" if fitting and flag == "--init-from" else ""
        raise UsageError(f"{source} is of another network: {about} match; {problem}; --arch and --stem must fit{hint}")
    notes.insert(0, f"{about} of {given}")
    if foreign:
        notes.append(f"{len(foreign)} other tensors (such as {foreign[0]}) are left out")
    if beside:
        notes.append(f"{len(beside)} of a classifier or a head (such as {beside[0]}) are left out")
    return fitting, "; ".join(notes)


def _count(values: Any) -> int:
    return sum(value.numel() for value in values)


def _is_beside(name: str, heads: Sequence[str]) -> bool:
    return name.startswith(tuple(heads)) or any(part.startswith(_BESIDE) for part in name.split("."))


def _tensors(given: Path, backbone: Backbone, flag: str) -> dict[str, Tensor]:
    """All tensors of what was given, by name; those inside others by both names."""
    text = str(given)
    for start, hub in HUBS.items():
        if text.startswith(start):
            return _published(f"{flag} {text}", hub + text.removeprefix(start), backbone)
    path = given
    if path.is_dir():
        path = next((path / name for name in _FILES if (path / name).is_file()), path / BACKBONE)
    if not path.is_file():
        raise UsageError(f"{flag} {path} does not exist")
    return read_weights(path)[0]


def _published(given: str, name: str, backbone: Backbone) -> dict[str, Tensor]:
    """What timm finds in its cache or over a network, for this size and these bands."""
    import timm

    try:
        net = timm.create_model(name, pretrained=True, num_classes=0, **backbone.options)
    except Exception as error:  # of the hub's, of the network's, or of timm's own kinds
        if exhausted(error):
            raise
        raise UsageError(f"{given} cannot be had: {first_line(error)}") from None
    state: dict[str, Tensor] = net.state_dict()
    return state


def _of_backbone(found: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The part of all tensors whose names, behind one beginning, are the network's; with what stands beside them."""
    ours = backbone.net.state_dict()
    sizes: dict[str, int] = defaultdict(int)
    for name, value in found.items():
        at = 0
        while at >= 0:
            own = ours.get(name[at:])
            if own is not None:
                sizes[name[:at]] += value.numel() if value.shape == own.shape else 1
            at = name.find(".", at) + 1 or -1
    if not sizes:
        return dict(found)
    prefix = max(sizes, key=lambda start: (sizes[start], not any(word in start for word in _COPIES)))
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _by_timm(backbone: Backbone, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Let timm rename and resample what is of another layout or size; as it was where that fits no better."""
    module, ours = importlib.import_module(type(backbone.net).__module__), backbone.net.state_dict()
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state, ""
    try:
        converted: dict[str, Tensor] = dict(convert(dict(state), backbone.net))
    except Exception as error:  # what it expects is not there
        if exhausted(error):
            raise
        return state, ""

    def fit(tensors: Mapping[str, Tensor]) -> set[str]:
        return {name for name, value in ours.items() if name in tensors and tensors[name].shape == value.shape}

    more = sorted(fit(converted) - fit(state))
    if not more:
        return state, ""
    resampled = [name for name in more if name in state]
    what = f"{', '.join(resampled)} resampled" if resampled else f"{len(more)} tensors renamed"
    return converted, f"{what} as timm does"
