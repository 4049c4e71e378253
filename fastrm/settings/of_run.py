"""Options of commands that read a run, given as ``RUN`` or as ``--checkpoint RUN``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fastrm.errors import UsageError
from fastrm.settings.inputs import ImageSize, Numbers, Positive


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """The trained networks."""

    run: Positional[Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")]] = None
    """A run folder, a checkpoint, or a backbone.safetensors; or what fastrm.train --init-from takes."""
    checkpoint: Path | None = None
    """RUN, given by name."""
    arch: str | None = None
    """timm's name of the network, for weights of other programs that do not say it."""
    image_size: ImageSize | None = None
    """Side of the images in pixels, for weights of other programs. If not given, the size that timm lists."""
    mean: Numbers | None = None
    """Mean per channel, where black is 0 and white is 1, for weights of other programs. If not given, what the weights
    say, or ImageNet's."""
    std: Positive | None = None
    """Standard deviation per channel, for weights of other programs. If not given, what the weights say, or
    ImageNet's."""

    @property
    def of_others(self) -> dict[str, Any]:
        """The options for weights of other programs, apart from ``arch``."""
        return {"image_size": self.image_size, "mean": self.mean, "std": self.std}

    @property
    def path(self) -> Path:
        """The given path.

        Raises:
            UsageError: none was given, or two.
        """
        return given([] if self.run is None else [self.run], self.checkpoint)[0]


@dataclass(frozen=True, kw_only=True)
class OfRunAndImages(OfRun):
    """The trained networks, and images for them."""

    data: str | None = None
    """Images, as for fastrm.train. If not given, those of the run."""
    data_root: Path | None = None
    """Folder of a named set. If not given, that of the run."""
    image_column: str | None = None
    """As for fastrm.train. If neither this nor --data is given, as in the run."""
    label_column: str | None = None
    """As for fastrm.train. If neither this nor --data is given, as in the run."""


def given(runs: Sequence[Path], checkpoint: Path | None) -> list[Path]:
    """The positional paths, or the one of ``--checkpoint``.

    Raises:
        UsageError: none was given, or both.
    """
    if runs and checkpoint is not None:
        raise UsageError(f"{runs[0]} and --checkpoint {checkpoint} are both given; give one of them")
    if not runs and checkpoint is None:
        raise UsageError("name a run folder, or one of its files: RUN, or --checkpoint RUN")
    return [*runs] if checkpoint is None else [checkpoint]
