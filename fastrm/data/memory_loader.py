"""The whole set on the training device, augmented there a batch at a time: no worker processes, no copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastrm.data import batched
from fastrm.data.augmentation import Augmentation, View
from fastrm.data.draws import Batch, BatchSampler, Draws, blur_radius, draw_views
from fastrm.data.sources import ArrayImages


class MemoryLoader:
    """Pairs of views of images held as arrays; each pass over the loader is the next epoch.

    A batch depends on the seed and its place (epoch, batch, rank) alone, so that ``seek`` gives the same one anywhere.
    """

    def __init__(
        self,
        images: ArrayImages,
        augmentation: Augmentation,
        *,
        image_size: int,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._augmentation, self._size, self._dtype = augmentation, image_size, dtype
        self._sampler = BatchSampler(len(images), batch_size, seed, rank, world_size)
        self._pixels = images.tensor().contiguous().to(device)
        self.broken: dict[Path, str] = {}  # an array cannot be

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._sampler)

    def seek(self, batch: int) -> None:
        """Go on from this batch, counted from the start of the run."""
        self._sampler.seek(batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._sampler:
            yield self._views(batch)
        self._sampler.next_epoch()

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        index = torch.tensor(batch.images).to(self._pixels.device, non_blocking=True)
        pixels = self._pixels.index_select(0, index)
        height, width = pixels.shape[2:]
        sizes = [(height, width)] * len(pixels)
        drawn = draw_views(self._augmentation.views, sizes, self._size, self._sampler.generator(batch))
        first, second = (self._view(pixels, *pair) for pair in zip(self._augmentation.views, drawn, strict=True))
        return first, second

    def _view(self, pixels: Tensor, view: View, draws: Draws) -> Tensor:
        bicubic, radius = view.interpolation == "bicubic", blur_radius(view, self._size)
        images = batched.carry_out(pixels, draws, image_size=self._size, bicubic=bicubic, blur_radius=radius)
        out = batched.empty_views(len(images), self._size, self._dtype, images.device)
        return batched.normalise(images, self._augmentation.mean, self._augmentation.std, out=out)
