"""Keeps the whole set on the training device and augments it there, without worker processes and copies."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastrm.data.augmentation import Augmentation, View
from fastrm.data.draws import Draws, Request, blur_radius, draw_views
from fastrm.data.encoded import EncodedImages
from fastrm.data.loader import Batch, Loader, normalising, one_ahead
from fastrm.data.scan import readable, report
from fastrm.data.sources import ArrayImages
from fastrm.errors import UsageError
from fastrm.kernels import augment_views
from fastrm.terminal.progress import bar


def of_one_size(images: EncodedImages) -> bool:
    """Whether all images are 8-bit RGB of one size, as far as is known without reading them."""
    looks = images.looks
    return images.format.rgb and looks is not None and bool((looks.size == looks.size[:1]).all())


class MemoryLoader(Loader):
    """Views of images of one size, which are kept as one array; encoded images are decoded at the start.

    Args:
        images: the images.
        augmentation: augmentation that makes the views.
        image_size: side of views without a size, in pixels.
        device: device that holds the images and makes the views.
        dtype: dtype of the views.
        workers: threads that decode.
        sampling: arguments of :class:`Loader`.
    """

    def __init__(
        self,
        images: ArrayImages | EncodedImages,
        augmentation: Augmentation,
        *,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int = 0,
        **sampling: int,
    ) -> None:
        super().__init__(len(images), **sampling)
        self._augmentation, self.sizes = augmentation, augmentation.sizes(image_size)
        self._size, self._dtype = image_size, dtype
        self.channels = images.format.channels
        self._mean, self._std = normalising(augmentation, images.format)
        self._images, self._faults = images, dict[int, str]()
        self._instead: dict[int, int] = {}
        """Indices of the images that replace unreadable ones, by index."""
        pixels = images.tensor() if isinstance(images, ArrayImages) else self._decoded(images, max(1, workers))
        self._pixels = pixels.to(device).permute(0, 2, 3, 1)

    def _decoded(self, images: EncodedImages, threads: int) -> Tensor:
        """Decode all images to uint8 [N, 3, H, W]."""
        assert images.looks is not None
        height, width = images.looks.size[0].tolist()
        pixels = torch.empty((len(images), 3, height, width), dtype=torch.uint8, device="cpu")

        def decode(index: int) -> None:
            at, picture = readable(images, index, images.pixels, self._faults)
            if picture.shape != pixels.shape[1:]:
                raise UsageError(f"{images.name(at)} has another size than when it was checked; start the run again")
            pixels[index] = picture
            if at != index:
                self._instead[index] = at

        text = f"decoding images of {width}x{height} pixels into memory"
        with bar(text, len(images)) as task, ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(decode, range(len(images))):
                task.advance(1)
        return pixels

    def _batches(self) -> Iterator[Batch]:
        report(self.broken, self._images, self._faults)
        yield from one_ahead(self._made(), self._pixels.device)

    def _made(self) -> Iterator[Batch]:
        for request in self._sampler:
            yield Batch(self._views(request), [self._instead.get(at, at) for at in request.images])

    def _views(self, request: Request) -> tuple[Tensor, ...]:
        height, width = self._pixels.shape[1:3]
        sizes = [(height, width)] * len(request.images)
        drawn = draw_views(self._augmentation.views, sizes, self._size, self._sampler.generator(request))
        return tuple(self._view(request, *pair) for pair in zip(self._augmentation.views, drawn, strict=True))

    def _view(self, request: Request, view: View, draws: Draws) -> Tensor:
        side = view.side(self._size)
        return augment_views(
            self._pixels,
            draws,
            index=torch.tensor(request.images, device="cpu"),
            out_size=side,
            dtype=self._dtype,
            mean=self._mean,
            std=self._std,
            interpolation=view.interpolation,
            blur_radius=blur_radius(view, side),
        )
