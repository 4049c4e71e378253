"""``augment_views`` in Triton: at most two launches for small views, and three for large ones.

Each program loads a region of at most 64 x 64 pixels into its registers and applies all operations there, in the order
that was drawn for the image. One launch makes the views without blur, and another the views with blur. A view of up to
64 pixels is one region, so the program itself computes the mean that contrast needs. Larger views are cut into tiles.
For those whose contrast changes, a first launch sums the gray of each tile, with the colour changes that precede the
contrast. A blurred tile is computed from a region that extends beyond the tile by the blur radius, so no intermediate
image is written. The blur multiplies the region by a band matrix on each side.

The rows of the parameter table are sorted, so that each launch reads consecutive rows: no blur and no colour change, no
blur and colour changes, blur and colour changes, blur and no colour change.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._augment_ops import COLUMN, COLUMNS
from .dispatch import triton
from .multi_tensor import guard
from .view_parameters import Drawn

if TYPE_CHECKING:
    from .augment import Work

if triton is not None:
    from ._augment_kernel import gray_kernel, view_kernel

_REGION = 64  # side in pixels; the values of a larger region would not fit in the registers
_TILE = 32  # side of a tile without blur, which reads only the pixels that it writes
_LEAST = 16  # smallest side of a tile with blur


class Plan(NamedTuple):
    """How views are cut into regions; sides are in pixels."""

    height: int
    width: int
    sums: bool
    """Whether a separate launch sums the gray of an image."""
    plain: int
    """Side of a region without blur, which is also its tile."""
    region: int
    """Side of a region with blur."""
    tile: int
    """Side of the tile that such a region writes."""

    def gray(self) -> dict[str, int]:
        """Compile-time arguments of ``gray_kernel``."""
        return {**self._cut(self.plain), "R": self.plain}

    def view(self, blur: bool) -> dict[str, int]:
        """Compile-time arguments of ``view_kernel``."""
        sums = self._cut(self.plain)["TILES"]
        side, tile = (self.region, self.tile) if blur else (self.plain, self.plain)
        sides = {"R": side, "T": tile, "GRAY_TILES": sums, "SUMS": 1 << (sums - 1).bit_length()}
        return {**self._cut(tile), **sides, "BLUR": blur}

    def warps(self, blur: bool) -> int:
        """Warps per program, enough that no register is spilled."""
        side = self.region if blur else self.plain
        return 8 if side > _TILE else 4 if side == _TILE else 1

    def _cut(self, side: int) -> dict[str, int]:
        across = -(-self.width // side)
        return {"TILES_X": across, "TILES": across * -(-self.height // side)}


def plan(height: int, width: int, bands: int, radius: int) -> Plan:
    """Cut views of ``height`` x ``width`` pixels and ``bands`` bands, with a blur of ``radius`` pixels."""
    whole = max(height, width) <= _REGION
    region = max(_LEAST, 1 << (max(height, width) - 1).bit_length()) if whole else _REGION
    tile = region if whole else (_REGION - 2 * radius) // 8 * 8
    return Plan(height, width, not whole or bands not in (1, 3), region if whole else _TILE, region, tile)


def _table(drawn: Drawn, index: Tensor | None, bands: int) -> tuple[NDArray[np.int32], list[int]]:
    """The sorted table [B, COLUMNS], and the ends of its first three kinds of rows; the fourth ends at B.

    Computed in NumPy, whose calls are much faster than torch's for so few numbers.
    """
    columns = {name: value.detach().numpy() for name, value in vars(drawn).items() if value is not None}
    jitter, order = columns.pop("jitter"), columns["order"]
    kind = np.where(columns["sigma"] > 0, 3 - jitter.astype(np.int8), jitter)
    rows = kind.argsort(kind="stable")
    if bands != 3:  # saturation and hue need RGB
        order = order[order < 2].reshape(-1, 2)
    columns |= {
        "image": np.arange(len(rows)) if index is None else index.numpy(),
        "view": np.arange(len(rows)),
        "steps": order.shape[1] * jitter,
        "before": (order == 1).argmax(axis=1),
        "order": order,
    }
    table = np.zeros((len(rows), COLUMNS), np.int32)
    for name, values in columns.items():
        width = values.size // len(rows)
        part = table if values.dtype != np.float32 else table.view(np.float32)
        part[:, COLUMN[name] : COLUMN[name] + width] = values.reshape(-1, width)[rows]
    return table, np.bincount(kind, minlength=4).cumsum()[:3].tolist()


@lru_cache(maxsize=32)  # because uploading host values makes the host wait for the GPU
def _numbers(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """The factors and the summands [2, C] that normalise values from 0 to 255."""
    pairs = [(1 / (255 * s), -m / s) for m, s in zip(mean, std, strict=True)]
    return torch.tensor(pairs, dtype=torch.float32, device="cpu").T.contiguous().to(device)


def launch(work: Work) -> bool:
    """Make the views and return True, or return False if the blur is too wide for the kernels."""
    images, drawn = work.images, work.drawn
    count, channels, height, width = work.out.shape
    bands, device = images.shape[3], images.device
    rows, (some, more, most) = _table(drawn, work.index, bands)
    cut = plan(height, width, bands, work.radius)
    if more < count and cut.tile < _LEAST:
        return False
    table = torch.from_numpy(rows)
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    summing = cut.gray()
    shared = {
        "images_ptr": images,
        "table_ptr": table,
        "sums_ptr": torch.empty(count, summing["TILES"], device=device) if cut.sums else None,
        "image_stride": images.stride(0),
        "row_stride": images.stride(1),
        "column_stride": images.stride(2),
        "band_stride": images.stride(3),
        "BANDS": bands,
        "OUT_H": height,
        "OUT_W": width,
        "BOXES": drawn.box is not None,
        "BICUBIC": work.bicubic,
    }
    numbers = _numbers(work.mean, work.std, device)
    with guard(device):
        if cut.sums and some < most:
            gray_kernel[((most - some) * summing["TILES"],)](
                **shared, **summing, first=some, num_warps=cut.warps(False)
            )
        for blur, start, stop in ((False, 0, more), (True, more, count)):
            making = cut.view(blur)
            if start < stop:
                view_kernel[((stop - start) * making["TILES"],)](
                    **shared,
                    **making,
                    out_ptr=work.out,
                    numbers_ptr=numbers,
                    first=start,
                    radius=work.radius,
                    CHANNELS=channels,
                    num_warps=cut.warps(blur),
                )
    return True
