"""What the values of pictures mean: how many bands there are, and in each dtype what is black and what is white."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from fastrm.data.decode import BrokenImage
from fastrm.data.stored import Values
from fastrm.kernels.batched import LUMA

Limits = tuple[tuple[float, ...], tuple[float, ...]]
"""What becomes 0 and what becomes 1: a number per band, or one for all of them."""
BYTES: Limits = ((0.0,), (255.0,))
_WIDE = frozenset({"int32", "uint32", "float64"})
"""Dtypes with values that float32 does not hold."""


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the values of a set's pictures become what a network is given.

    A value v of a band becomes ``(v - low) / (high - low)``, which is 0 to 1 between the limits and is not clipped
    beyond them, and then ``(that - mean) / std``. A value that is no number becomes 0 before that.
    """

    channels: int = 3
    """C of the views [B, C, H, W]."""
    limits: Mapping[str, Limits] = field(default_factory=lambda: {"uint8": BYTES})
    """By dtype, as NumPy names it."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Subtracted per channel, after scaling to [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Divided by per channel."""
    pages: Literal["first", "bands", "images"] = "first"
    """What is read of files with several pages: the first, all as the bands of one picture, or each as a picture."""

    @property
    def bytes(self) -> bool:
        """Whether all values are whole numbers from 0 to 255 in uint8, so that views are bytes too."""
        return dict(self.limits) == {"uint8": BYTES}

    @property
    def rgb(self) -> bool:
        """Whether every picture is taken as RGB of 8 bits per channel."""
        return self.bytes and self.channels == 3 and self.pages == "first"

    def takes(self, bands: int) -> bool:
        """Whether pictures of so many bands become these channels: as many, one for three, or three for one."""
        return bands in (self.channels, {3: 1, 1: 3}.get(self.channels))

    def fitted(self, values: Values) -> Tensor:
        """A picture as its views are made of it.

        Args:
            values: [H, W, bands] of a dtype in ``limits``. One band stands for three channels too, and three make one
                as in ITU-R BT.601.

        Returns:
            [channels, H, W], or [1, H, W] in place of three equal channels: uint8 where ``bytes`` holds, else float32
            in which the limits are 0 and 255.

        Raises:
            BrokenImage: it has another dtype, or bands that do not become these channels.
        """
        bands, dtype = values.shape[2], values.dtype.name
        if not self.takes(bands):
            raise BrokenImage(f"it has {bands} bands, and the pictures are taken as {self.channels}")
        if dtype not in self.limits:
            raise BrokenImage(f"its values are {dtype}, and the pictures are taken as {', '.join(self.limits)}")
        if not self.bytes:
            values = self._scaled(values, dtype)
        if bands == 3 and self.channels == 1:
            gray = (values @ np.array(LUMA))[..., None]
            values = gray.round().astype(np.uint8) if self.bytes else gray.astype(np.float32)
        planes = values.transpose(2, 0, 1)
        return torch.from_numpy(planes if planes.flags.writeable else planes.copy())  # torch warns of others

    def _scaled(self, values: Values, dtype: str) -> Values:
        wide = np.float64 if dtype in _WIDE else np.float32
        low, high = (np.array(limit, dtype=np.float64) for limit in self.limits[dtype])
        if len(low) not in (1, values.shape[2]):
            raise BrokenImage(f"it has {values.shape[2]} bands of {dtype}, and the others of the set {len(low)}")
        scaled = (values.astype(wide) - low.astype(wide)) * (255 / (high - low)).astype(wide)
        if values.dtype.kind == "f":
            np.nan_to_num(scaled, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        return scaled.astype(np.float32, copy=False)

    def plain(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return {
            "channels": self.channels,
            "limits": {dtype: [list(low), list(high)] for dtype, (low, high) in self.limits.items()},
            "mean": list(self.mean),
            "std": list(self.std),
            "pages": self.pages,
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
        pages = plain.get("pages", "first")
        return cls(channels=int(plain["channels"]), limits=limits, mean=mean, std=std, pages=pages)


RGB = PixelFormat()
"""RGB of 8 bits per channel, normalised by ImageNet's mean and standard deviation."""
