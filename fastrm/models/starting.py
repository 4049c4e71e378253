"""Finds the weights of a backbone in published files of any layout."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastrm.errors import UsageError, first_line
from fastrm.files import absent, only_plain
from fastrm.machine.memory import exhausted
from fastrm.models.backbone import Backbone
from fastrm.models.weights import BACKBONE, adapted, classifiers, misfit, read_weights

LEAST = 0.95
"""Fraction of the parameters that must match, of the network and of the backbone in the file."""
HUBS = {"timm:": "", "hf:": "hf-hub:"}
"""timm's prefixes of published weights, by the user's prefixes."""
_FILES = (BACKBONE, "model.safetensors", "pytorch_model.bin")
"""Names of weight files in run folders and in folders of Hugging Face's layout."""
# Prefixes of averaged networks; if a file has the trained network and an average, the trained network is used.
_COPIES = ("teacher", "momentum", "encoder_k", "target", "ema")
# Prefixes of other parts of a model, which may be stored next to the backbone.
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
    """Whether weights are given by the name of a hub instead of a file."""
    return str(given).startswith(tuple(HUBS))


def starting_weights(
    backbone: Backbone, given: Path, *, partial: bool, flag: str = "--init-from"
) -> tuple[dict[str, Tensor], str]:
    """Find the tensors of a backbone in published weights.

    The weights may be ``timm:NAME`` or ``hf:OWNER/NAME``, which timm loads from its cache or over the network; a run
    folder or a folder with ``model.safetensors``; or a file with tensors by name, nested to any depth, such as those of
    fastrm, MoCo, DINO, MAE and DINOv2. From a file, the part that fits the network best is used, and the student if
    there is also an average. Position embeddings and patches of another size are resampled as in timm, and the first
    layer is adapted to the number of channels.

    Args:
        backbone: backbone for the weights; it is not changed.
        given: the weights.
        partial: whether fewer than 95 % of the parameters may match.
        flag: setting that names the weights, for messages.

    Returns:
        Tensors by the network's names, all of which fit, and a description of them.

    Raises:
        UsageError: there are no such weights, or too few of them fit.
    """
    source, ours = f"{flag} {given}", backbone.net.state_dict()
    found, not_read = _found(given, backbone, flag)
    state, change = _of_backbone(found, backbone)
    notes = [change] if change else []
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
        problem += f"; {only_plain(', '.join(not_read))}" if not_read and not fitting else ""
        hint = ", or --init-partial loads only what matches" if fitting and flag == "--init-from" else ""
        raise UsageError(f"{source} is of another network: {about} match; {problem}; --arch and --stem must fit{hint}")
    notes.insert(0, f"{about} of {given}")
    if foreign:
        notes.append(f"{len(foreign)} other tensors (such as {foreign[0]}) are left out")
    if beside:
        notes.append(f"{len(beside)} tensors of a classifier or a head (such as {beside[0]}) are left out")
    return fitting, "; ".join(notes)


def _count(values: Any) -> int:
    return sum(value.numel() for value in values)


def _is_beside(name: str, heads: Sequence[str]) -> bool:
    return name.startswith(tuple(heads)) or any(part.startswith(_BESIDE) for part in name.split("."))


def _found(given: Path, backbone: Backbone, flag: str) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of the given weights, and the classes of the objects that were not read."""
    text = str(given)
    for start, hub in HUBS.items():
        if text.startswith(start):
            return _published(f"{flag} {text}", hub + text.removeprefix(start), backbone), []
    tensors, _, not_read = read_weights(weights_file(given, flag))
    return tensors, not_read


def weights_file(given: Path, flag: str) -> Path:
    """The file of weights that are given as a file or a folder.

    Raises:
        UsageError: there is none.
    """
    path = given
    if path.is_dir():
        files = [path / name for name in _FILES if (path / name).is_file()]
        if not files:
            raise UsageError(f"{flag} {path} is a folder with none of {', '.join(_FILES)}")
        path = files[0]
    if not path.is_file():
        raise UsageError(f"{flag} {absent(path)}")
    return path


def _published(given: str, name: str, backbone: Backbone) -> dict[str, Tensor]:
    """Weights that timm loads from its cache or over the network, for the backbone's image size and channels."""
    import timm

    try:
        net = timm.create_model(name, pretrained=True, num_classes=0, **backbone.options)
    except Exception as error:  # the hub, the network and timm raise errors of many types
        if exhausted(error):
            raise
        raise UsageError(f"{given} cannot be loaded: {first_line(error)}") from None
    state: dict[str, Tensor] = net.state_dict()
    return state


def _of_backbone(found: Mapping[str, Tensor], backbone: Backbone) -> tuple[dict[str, Tensor], str]:
    """The tensors under the prefix after which most names are the network's, by the network's names; and a note.

    The layers may be numbered, as in ``nn.Sequential(*list(network.children())[:-1])``, which lightly's users write.
    """
    ours: dict[str, Tensor] = backbone.net.state_dict()
    numbers = {name: str(i) for i, (name, _) in enumerate(backbone.net.named_children())}
    parts = {name: name.partition(".") for name in ours}
    forms = (
        {name: name for name in ours},
        {f"{numbers[first]}.{rest}": name for name, (first, _, rest) in parts.items() if first in numbers},
    )
    sizes: dict[tuple[str, int], int] = defaultdict(int)
    for name, value in found.items():
        at = 0
        while at >= 0:
            for i, form in enumerate(forms):
                if (own := form.get(name[at:])) is not None:
                    sizes[name[:at], i] += value.numel() if value.shape == ours[own].shape else 1
            at = name.find(".", at) + 1 or -1
    if not sizes:
        return dict(found), ""
    prefix, kind = max(sizes, key=lambda at: (sizes[at], -at[1], not any(word in at[0] for word in _COPIES)))
    names = forms[kind]
    state = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    note = "its layers are numbered, and taken in the order of the network's" if kind else ""
    return {names.get(name, name): value for name, value in state.items()}, note


def _by_timm(backbone: Backbone, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Let timm rename and resample tensors of another layout or size; unchanged if that does not fit better."""
    module, ours = importlib.import_module(type(backbone.net).__module__), backbone.net.state_dict()
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state, ""
    try:
        converted: dict[str, Tensor] = dict(convert(dict(state), backbone.net))
    except Exception as error:  # it may fail on tensors of another layout
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
