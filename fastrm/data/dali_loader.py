"""Loads images in files with NVIDIA DALI, which decodes and crops on the GPU or the CPU.

:func:`fastrm.kernels.augment_views` makes the rest of the view on the same device, so that colour changes equal
torchvision's (DALI shifts the hue in YIQ, not in HSV). Order and parameters come from :mod:`fastrm.data.draws`, which
makes ``seek`` exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastrm.data.augmentation import Augmentation, View
from fastrm.data.dali import DaliDecoder, Encode, Files, decode_whole, pipeline
from fastrm.data.draws import Draws, Request, blur_radius, draw_views
from fastrm.data.encoded import EncodedImages
from fastrm.data.loader import Batch, Loader, normalising, one_ahead
from fastrm.data.scan import report
from fastrm.kernels import augment_views


class DaliLoader(Loader):
    """Views of images in files; while one batch is in use, the next is decoded and cropped, and a third is read.

    With ``regions``, only the crops are decoded; otherwise each image is decoded once and then cropped. Decoding once
    is faster on two CPU cores for JPEGs of 500x375 pixels: 463 to 501 images per second against 443 to 466. No GPU was
    timed.
    """

    def __init__(
        self,
        images: EncodedImages,
        augmentation: Augmentation,
        *,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        regions: bool = False,
        **sampling: int,
    ) -> None:
        super().__init__(len(images), **sampling)
        self._augmentation, self.sizes, self.channels = augmentation, augmentation.sizes(image_size), 3
        self._mean, self._std = normalising(augmentation, images.format)
        self._images, self._device, self._dtype, self._size = images, device, dtype, image_size
        batch_size, threads = sampling["batch_size"], max(1, workers)
        crops = partial(_crops, augmentation=augmentation, image_size=image_size, regions=regions)
        build = partial(pipeline, crops, batch_size, device, threads)
        self._decoder = DaliDecoder(build, device=device, threads=threads, most=batch_size)

    def _batches(self) -> Iterator[Batch]:
        yield from one_ahead(self._made(), self._device)

    def _made(self) -> Iterator[Batch]:
        for files, crops in self._decoder.batches(self._sampler, self._read):
            report(self.broken, self._images, dict(self._images.unreadable))
            each = zip(crops, files.about, self._augmentation.views, strict=True)
            yield Batch(tuple(self._recoloured(*one) for one in each), files.indices)

    def _read(self, request: Request, encode: Encode) -> Files[list[Draws]]:
        """Read the files of a batch, and draw its views."""
        read = list(self._decoder.threads.map(lambda index: self._images.read(index, encode), request.images))
        indices, files = [index for index, _ in read], [file for _, file in read]
        sizes = [file.size for file in files]
        drawn = draw_views(self._augmentation.views, sizes, self._size, self._sampler.generator(request))
        inputs: dict[str, Any] = {"encoded": [file.content for file in files]}
        for number, draws in enumerate(drawn):
            inputs |= {f"box{number}": draws.box.int().numpy(), f"flip{number}": draws.flip.int().numpy()}
        return Files(indices, inputs, drawn)

    def _recoloured(self, crops: Tensor, draws: Draws, view: View) -> Tensor:
        """Apply the operations that follow the crop."""
        side = view.side(self._size)
        return augment_views(
            crops,
            draws.after_the_crop(),
            out_size=side,
            dtype=self._dtype,
            mean=self._mean,
            std=self._std,
            blur_radius=blur_radius(view, side),
        )


def _crops(
    file: Any, decoder: dict[str, Any], *, augmentation: Augmentation, image_size: int, regions: bool
) -> tuple[Any, ...]:
    """In a pipeline: decode files and crop each view, uint8 [B, S, S, 3]."""
    from nvidia.dali import fn, types

    filters = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
    whole = None if regions else decode_whole(file, decoder)
    views = []
    for number, view in enumerate(augmentation.views):
        box = fn.external_source(name=f"box{number}", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name=f"flip{number}", dtype=types.INT32, ndim=0)
        start, shape, side = box[0:2], box[2:4], view.side(image_size)
        if regions:
            picture = fn.decoders.image_slice(file, start, shape, axes=(0, 1), **decoder)
        else:
            picture = fn.slice(whole, start, shape, axes=(0, 1))
        resized = fn.resize(
            picture, resize_x=side, resize_y=side, interp_type=filters[view.interpolation], antialias=True
        )
        views.append(fn.flip(resized, horizontal=flip, vertical=0))
    return tuple(views)
