"""The parts that the formats have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastrm import own
from fastrm.data.formats import PixelFormat
from fastrm.errors import UsageError
from fastrm.files import save_tensors, write_whole
from fastrm.models import Backbone
from fastrm.models.module import needs_module
from fastrm.models.weights import misfit, plain_state, write_backbone

About = dict[str, str]
"""The description of a network in its file: :func:`fastrm.models.weights.metadata`."""
Network = Callable[[Tensor], dict[str, Tensor]]
"""Maps images [B, C, H, W] to ``features`` [B, D], and to ``map`` if the network gives one."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained backbone that is exported."""

    backbone: Backbone
    """The network in evaluation mode, on the CPU."""
    about: About
    """Its description, with ``which``."""
    pixels: PixelFormat
    """Conversion from images to the input of the network."""
    folder: Path
    """Folder with its scores, if there are any."""
    settings: Mapping[str, Any] | None = None
    """Settings of the run by name; None for weights of others."""
    step: int | None = None
    """Number of optimizer steps of the run."""
    license: str | None = None
    """Licence of weights of others."""

    @property
    def name(self) -> str:
        """Name of the network."""
        return self.about["arch"]

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return int(self.about["image_size"])

    @property
    def is_module(self) -> bool:
        """Whether the network is a module of the user, which no library can build by name."""
        return needs_module(self.name)


class Loaded(NamedTuple):
    """An export, as its library loads it."""

    network: Network
    """The network."""
    by: str = ""
    """The classes of the library that load it, if that needs to be said."""


class Target(NamedTuple):
    """A format."""

    endings: tuple[str, ...]
    """Endings of its file names; an empty one means a folder. The first one is the default."""
    refuse: Callable[[Subject], None]
    """Raises a UsageError if the format cannot hold the network, or if a package is missing that writes it."""
    write: Callable[[Subject, Path], None]
    """Writes a backbone that was not refused; raises a UsageError if that fails."""
    loading: Callable[[Subject, Path], str]
    """Python code that loads the file."""
    library: str
    """Package that loads the file."""
    load: Callable[[Subject, Path], Loaded]
    """Loads the file with that package, as :attr:`loading` does."""


def anything(_: Subject) -> None:
    """The ``refuse`` of a format that can hold every network."""


def write_state(subject: Subject, out: Path) -> None:
    """Write the weights by their names in timm, as safetensors or, for .pth, with ``torch.save``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".pth":
        state = OrderedDict(plain_state(subject.backbone))
        setattr(state, own.EXPORT, subject.about)  # no loader reads it
        write_whole(out, lambda partial: save_tensors(state, partial))
    else:
        write_backbone(out, subject.backbone, subject.about)


def require_fit(subject: Subject, other: nn.Module, whose: str) -> None:
    """Raise a UsageError unless the weights fit the network that will load them."""
    if problem := misfit(other.state_dict(), subject.backbone.net.state_dict()):
        raise UsageError(
            f"{whose} {subject.name} cannot hold this network: {problem}; for example, only --format safetensors and "
            "onnx hold a small stem"
        )
