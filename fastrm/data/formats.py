"""The meaning of pixel values: the number of bands, and the values of black and white per dtype."""

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
"""The values that become 0 and 1: one number per band, or one for all bands."""
BYTES: Limits = ((0.0,), (255.0,))
_WIDE = frozenset({"int32", "uint32", "float64"})
"""Dtypes with values that float32 cannot represent."""


@dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the stored values of a set's images become the input of a network.

    A value v of a band becomes ``(v - low) / (high - low)``, which is 0 to 1 between the limits and is not clipped
    beyond them, and then ``(that - mean) / std``. A value that is not a number first becomes 0.
    """

    channels: int = 3
    """C of the views [B, C, H, W]."""
    limits: Mapping[str, Limits] = field(default_factory=lambda: {"uint8": BYTES})
    """Limits per dtype, by NumPy's name."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean per channel to subtract after scaling to [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation per channel to divide by."""
    pages: Literal["first", "bands", "images"] = "first"
    """How files with several pages are read, which is the first page, all pages as the bands of one image, or each page
    as an image."""

    @property
    def bytes(self) -> bool:
        """Whether all values are uint8 with limits 0 and 255, so that views are uint8 too."""
        return dict(self.limits) == {"uint8": BYTES}

    @property
    def rgb(self) -> bool:
        """Whether every image is read as RGB with 8 bits per channel."""
        return self.bytes and self.channels == 3 and self.pages == "first"

    def takes(self, bands: int) -> bool:
        """Whether images with this number of bands fit: the same number, one for three channels, or three for one."""
        return bands in (self.channels, {3: 1, 1: 3}.get(self.channels))

    def fitted(self, values: Values) -> Tensor:
        """Convert the values of an image to the form that views are made from.

        Args:
            values: [H, W, bands] of a dtype in ``limits``. One band stands for three channels too, and three make one
                as in ITU-R BT.601.

        Returns:
            A tensor [channels, H, W], or [1, H, W] instead of three equal channels. It is uint8 if ``bytes`` holds,
            otherwise float32 with limits 0 and 255.

        Raises:
            BrokenImage: the image has another dtype, or bands that do not fit.
        """
        bands, dtype = values.shape[2], values.dtype.name
        if not self.takes(bands):
            raise BrokenImage(f"it has {bands} bands, and the images of this run have {self.channels}")
        if dtype not in self.limits:
            raise BrokenImage(f"its values are {dtype}, and the images of this run are {', '.join(self.limits)}")
        if not self.bytes:
            values = self._scaled(values, dtype)
        if bands == 3 and self.channels == 1:
            gray = (values @ np.array(LUMA))[..., None]
            values = gray.round().astype(np.uint8) if self.bytes else gray.astype(np.float32)
        planes = values.transpose(2, 0, 1)
        # torch refuses negative strides, as of an image that was flipped or turned, and warns of read-only arrays.
        usable = planes.flags.writeable and min(planes.strides) >= 0
        return torch.from_numpy(planes if usable else planes.copy())

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
        """The format as JSON-compatible values."""
        return {
            "channels": self.channels,
            "limits": {dtype: [list(low), list(high)] for dtype, (low, high) in self.limits.items()},
            "mean": list(self.mean),
            "std": list(self.std),
            "pages": self.pages,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> PixelFormat:
        """Read what :meth:`plain` returned; None means 8-bit RGB, as in files of earlier versions."""
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
