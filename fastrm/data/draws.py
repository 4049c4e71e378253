"""The random parameters of views, drawn per batch, and the order of an epoch; all loaders use these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrm.data.augmentation import View
from fastrm.kernels.view_parameters import Drawn


class Request(NamedTuple):
    """A requested batch: its images, and what its random numbers depend on besides seed and rank."""

    epoch: int
    number: int
    """Number of the batch in the epoch."""
    images: list[int]


_CROP_TRIES = 10


class BatchSampler:
    """Samples batches in a new order each epoch, sharded by rank, without incomplete batches."""

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Request]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        for number in range(self.skip, len(self)):
            start = (number * self.world_size + self.rank) * self.batch_size
            yield Request(self.epoch, number, order[start : start + self.batch_size].tolist())

    def seek(self, batch: int) -> None:
        """Continue from this batch, counted from the start of the run."""
        self.epoch, self.skip = divmod(batch, len(self))

    def next_epoch(self) -> None:
        """Continue from the start of the next epoch."""
        self.epoch, self.skip = self.epoch + 1, 0

    def generator(self, request: Request) -> torch.Generator:
        """The random generator of a batch, which depends only on seed, rank and request."""
        place = (self.seed, request.epoch, request.number, self.rank)
        state = np.random.SeedSequence(place).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state))


@dataclass(frozen=True, kw_only=True)
class Draws(Drawn):
    """The drawn parameters of one view of B images, on the CPU."""

    box: Tensor
    """Top, left, height and width of the crop in pixels, int64 [B, 4]."""
    tries: Tensor
    """Random numbers from which :func:`boxes` computes the crop, float64 [B, 22]."""


def draw(view: View, heights: Tensor, widths: Tensor, side: int, generator: torch.Generator) -> Draws:
    """Draw the parameters of a view for B images.

    They are drawn on the CPU, so that the same seed gives the same views on every device, and so that the images of
    each operation are known without synchronising with the device.

    Args:
        view: distributions of the parameters.
        heights, widths: sizes of the images in pixels, int64 [B].
        side: side of the view, in pixels.
        generator: random generator on the CPU.
    """
    count = len(heights)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device="cpu").uniform_(low, high, generator=generator)

    def chosen(probability: float) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu") < probability

    tries = _tries(view, count, generator)
    strengths = (view.brightness, view.contrast, view.saturation)
    factors = [uniform(max(0.0, 1 - strength), 1 + strength) for strength in strengths]
    scale = side / 224
    return Draws(
        box=boxes(view, tries, heights, widths),
        jitter=chosen(view.jitter_probability),
        factors=torch.stack([*factors, uniform(-view.hue, view.hue)], dim=1),
        order=torch.rand(count, 4, generator=generator, dtype=torch.float32, device="cpu").argsort(dim=1),
        gray=chosen(view.grayscale_probability),
        sigma=uniform(*(sigma * scale for sigma in view.blur_sigma)) * chosen(view.blur_probability),
        solarize=chosen(view.solarize_probability),
        flip=chosen(view.flip_probability),
        tries=tries,
    )


def blur_radius(view: View, side: int) -> int:
    """Radius of the blur in pixels: three times the largest standard deviation."""
    return max(1, int(np.ceil(3 * view.blur_sigma[1] * side / 224)))


def _tries(view: View, count: int, generator: torch.Generator) -> Tensor:
    """Draw the random numbers for boxes, independent of the sizes of the images, float64 [B, 22]."""

    def uniform(low: float, high: float) -> Tensor:
        made = torch.empty((count, _CROP_TRIES), dtype=torch.float64, device="cpu")
        return made.uniform_(low, high, generator=generator)

    area, ratio = uniform(*view.crop_scale), uniform(*np.log(view.crop_ratio)).exp()
    where = torch.rand(2, count, generator=generator, dtype=torch.float64, device="cpu")
    return torch.cat([area, ratio, where.T], dim=1)


def boxes(view: View, tries: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Crops int64 [B, 4] of images with these sizes.

    Each is the first of ten tries that fits the image, or else as much of its centre as the ratio allows.
    """
    share, ratio, where = tries.split([_CROP_TRIES, _CROP_TRIES, 2], dim=1)
    area = (heights * widths)[:, None] * share
    tried_w, tried_h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (tried_w > 0) & (tried_h > 0) & (tried_w <= widths[:, None]) & (tried_h <= heights[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = tried_w.gather(1, first)[:, 0], tried_h.gather(1, first)[:, 0]

    narrow, wide = view.crop_ratio
    centre_w = torch.minimum(widths, (heights.float() * wide).round().long())
    centre_h = torch.minimum(heights, (widths.float() / narrow).round().long())
    found = fits.any(dim=1)
    w, h = torch.where(found, w, centre_w).clamp(min=1), torch.where(found, h, centre_h).clamp(min=1)
    top = torch.where(found, (where[:, 0] * (heights - h + 1)).long(), (heights - h) // 2)
    left = torch.where(found, (where[:, 1] * (widths - w + 1)).long(), (widths - w) // 2)
    return torch.stack([top, left, h, w], dim=1)


def draw_views(
    views: Sequence[View], sizes: Sequence[tuple[int, int]], image_size: int, generator: torch.Generator
) -> list[Draws]:
    """Draw the parameters of each view for images of these (height, width); ``image_size`` is the default size."""
    heights, widths = torch.tensor(sizes, dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
    return [draw(view, heights, widths, view.side(image_size), generator) for view in views]
