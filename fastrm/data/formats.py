"""What the values of pictures mean: how many bands there are, what is black and what is white, in each dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD

Limits = tuple[tuple[float, ...], tuple[float, ...]]
"""What becomes 0 and what becomes 1: for each band, or one number for all of them."""
_BYTES: Limits = ((0.0,), (255.0,))


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the values of a set's pictures become what a network is given.

    A value v of a band becomes ``(v - low) / (high - low)``, which is 0 to 1 between the limits and is not clipped
    beyond them, and then ``(that - mean) / std``.
    """

    channels: int = 3
    """C of the views [B, C, H, W]."""
    limits: Mapping[str, Limits] = field(default_factory=lambda: MappingProxyType({"uint8": _BYTES}))
    """By dtype, as NumPy names it."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted per channel, after scaling to [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by per channel."""

    @property
    def bytes(self) -> bool:
        """Whether the pictures are taken as RGB of 8 bits per channel, which bytes hold without loss."""
        return self.channels == 3 and dict(self.limits) == {"uint8": _BYTES}

    def fitted(self, pixels: Tensor) -> Tensor:
        """A picture as the views are made of it.

        Args:
            pixels: [bands, H, W] of a dtype in ``limits``.

        Returns:
            [channels, H, W]: uint8 as it is where ``bytes`` holds (and [1, H, W] of gray pictures, which stand for
            three channels), else float32 in which the limits are 0 and 255.

        Raises:
            BrokenImage: it has another dtype, or bands that do not become these channels.
        """
        raise NotImplementedError

    def plain(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {
            "channels": self.channels,
            "limits": {dtype: [list(low), list(high)] for dtype, (low, high) in self.limits.items()},
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> PixelFormat:
        """What :meth:`plain` wrote down; RGB of 8 bits for None, which is what files of before held."""
        if plain is None:
            return RGB
        limits: dict[str, Limits] = {
            dtype: (tuple(map(float, low)), tuple(map(float, high))) for dtype, (low, high) in plain["limits"].items()
        }
        mean, std = (tuple(map(float, plain[name])) for name in ("mean", "std"))
        return cls(channels=int(plain["channels"]), limits=limits, mean=mean, std=std)


RGB = PixelFormat()
"""RGB of 8 bits per channel, normalised by ImageNet's mean and standard deviation."""
