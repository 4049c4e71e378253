"""The whole set on the training device, augmented there a batch at a time: no worker processes, no copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrm.data import batched
from fastrm.data.augmentation import Augmentation, View
from fastrm.data.draws import BatchSampler, Sample, batch_generator, blur_radius, draw
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
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._augmentation, self._size, self._seed = augmentation, image_size, seed
        self._sampler = BatchSampler(len(images), batch_size, seed, rank, world_size)
        pixels = torch.from_numpy(images.pixels)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        self._pixels = pixels.contiguous().to(device)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._sampler)

    def seek(self, batch: int) -> None:
        """Go on from this batch, counted from the start of the run."""
        self._sampler.epoch, self._sampler.skip = divmod(batch, len(self))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self._sampler, start=self._sampler.skip):
            yield self._views(batch, number)
        self._sampler.epoch, self._sampler.skip = self._sampler.epoch + 1, 0

    def _views(self, batch: list[Sample], number: int) -> tuple[Tensor, Tensor]:
        index = torch.tensor([index for _, index in batch]).to(self._pixels.device, non_blocking=True)
        pixels = self._pixels.index_select(0, index)
        generator = batch_generator(self._seed, batch[0][0], number, self._sampler.rank)
        first, second = (self._view(pixels, view, generator) for view in self._augmentation.views)
        return first, second

    def _view(self, pixels: Tensor, view: View, generator: torch.Generator) -> Tensor:
        heights, widths = (torch.full((len(pixels),), side) for side in pixels.shape[-2:])
        images = batched.carry_out(
            pixels,
            draw(view, heights, widths, self._size, generator),
            image_size=self._size,
            bicubic=view.interpolation == "bicubic",
            blur_radius=blur_radius(view, self._size),
        )
        return batched.normalise(images, self._augmentation.mean, self._augmentation.std)
