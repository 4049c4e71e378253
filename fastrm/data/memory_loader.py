"""The whole set on the training device, augmented there a batch at a time: no worker processes, no copies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrm.data import batched
from fastrm.data.augmentation import Augmentation, View
from fastrm.data.draws import Draws, Request, blur_radius, draw_views
from fastrm.data.loader import Batch, Loader, normalising
from fastrm.data.sources import ArrayImages

_TINY = 2**11  # values of a picture below which a call for each costs more than the wasted arithmetic of all together


class MemoryLoader(Loader):
    """Views of images held as arrays."""

    def __init__(
        self,
        images: ArrayImages,
        augmentation: Augmentation,
        *,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        **sampling: int,
    ) -> None:
        super().__init__(len(images), **sampling)
        self._augmentation, self.views = augmentation, len(augmentation.views)
        self._size, self._dtype = image_size, dtype
        self.channels = images.format.channels
        self._mean, self._std = normalising(augmentation, images.format)
        self._pixels = images.tensor().to(device)

    def _batches(self) -> Iterator[Batch]:
        for request in self._sampler:
            yield Batch(self._views(request), request.images)

    def _views(self, request: Request) -> tuple[Tensor, ...]:
        height, width = self._pixels.shape[2:]
        sizes = [(height, width)] * len(request.images)
        drawn = draw_views(self._augmentation.views, sizes, self._size, self._sampler.generator(request))
        return tuple(self._view(request, *pair) for pair in zip(self._augmentation.views, drawn, strict=True))

    def _view(self, request: Request, view: View, draws: Draws) -> Tensor:
        side = view.side(self._size)
        images = self._cropped(request, draws, side, view.interpolation)
        batched.recolour_(images, draws, blur_radius=blur_radius(view, side))
        out = batched.empty_views(len(images), side, self._dtype, images.device, channels=self.channels)
        return batched.normalise(images, self._mean, self._std, out=out)

    def _cropped(self, request: Request, draws: Draws, side: int, interpolation: str) -> Tensor:
        """float32 [B, C, S, S]: in one go on a GPU or where the pictures are tiny; else picture by picture in bytes."""
        if self._pixels.device.type == "cuda" or self._pixels[0].numel() < _TINY:
            index = torch.tensor(request.images).to(self._pixels.device, non_blocking=True)
            bicubic = interpolation == "bicubic"
            return batched.crop_resize(
                self._pixels.index_select(0, index), draws.box, draws.flip, side, bicubic=bicubic
            )
        out = torch.empty(len(request.images), self._pixels.shape[1], side, side)
        places = zip(request.images, draws.box.tolist(), draws.flip.tolist(), strict=True)
        for row, (at, box, flip) in zip(out, places, strict=True):
            row.copy_(batched.crop(self._pixels[at], box, flip, side, interpolation)[0])
        return out
