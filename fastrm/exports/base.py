"""What the formats have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastrm import own
from fastrm.errors import UsageError
from fastrm.files import write_whole
from fastrm.models import Backbone
from fastrm.models.weights import misfit, plain_state, write_backbone

About = dict[str, str]
"""What a file says of itself: :func:`fastrm.models.weights.metadata`."""


class Target(NamedTuple):
    """A format."""

    endings: tuple[str, ...]
    """How the names of its files end; an empty one is a folder."""
    write: Callable[[Backbone, About, Path], None]
    """Write a backbone in evaluation mode; raises a UsageError where the format cannot hold it."""
    loading: Callable[[Backbone, About, Path], str]
    """How Python loads it."""


def write_state(backbone: Backbone, about: About, out: Path) -> None:
    """Weights by name, as the ending of the file says."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".pth":
        state = OrderedDict(plain_state(backbone))
        setattr(state, own.EXPORT, about)  # which no loader looks at
        write_whole(out, lambda partial: torch.save(state, partial))
    else:
        write_backbone(out, backbone, about)


def require_fit(backbone: Backbone, other: nn.Module, about: About, whose: str) -> None:
    """Raise a UsageError unless the network that will have to take the weights can."""
    if problem := misfit(other.state_dict(), backbone.net.state_dict()):
        raise UsageError(
            f"{whose} {about['arch']} cannot hold this network: {problem}; a small stem, say, is only in "
            "--format safetensors and onnx"
        )
