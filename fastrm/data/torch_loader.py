"""The augmentation in worker processes: decoding and crops in bytes, and the rest by :mod:`fastrm.data.batched`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastrm.data import batched
from fastrm.data.augmentation import Augmentation
from fastrm.data.decode import BROKEN, BrokenImage, Header, decode, inspect, reason
from fastrm.data.draws import BatchSampler, Request, blur_radius, draw_views
from fastrm.data.loader import Batch, Loader
from fastrm.data.scan import report
from fastrm.data.sources import ArrayImages, FileImages, Images
from fastrm.errors import UsageError
from fastrm.machine.signals import leave_to_the_trainer

try:  # a third faster than Pillow, but torchvision 0.29 announces that it will go
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # type: ignore[assignment, unused-ignore]

AHEAD = 2
"""Batches that each loader process makes ready ahead."""
_CPU = torch.device("cpu")
_Loaded = tuple[list[int], tuple[Tensor, ...], dict[int, str]]


class _Broken(Exception):
    """A file turned out to be broken when it was decoded."""


class _Views(Dataset[_Loaded]):
    """The images that a batch is of, their views in bytes, and what is wrong with the files that could not be read."""

    def __init__(self, images: Images, augmentation: Augmentation, image_size: int, sampler: BatchSampler) -> None:
        self.images, self.augmentation, self.image_size, self.sampler = images, augmentation, image_size, sampler

    def __getitem__(self, request: Request) -> _Loaded:
        images = self.images
        if isinstance(images, ArrayImages):
            pixels = images.tensor()
            sizes = [(pixels.shape[2], pixels.shape[3])] * len(request.images)
            return request.images, self._views(request, sizes, lambda i: pixels[request.images[i]]), {}
        while True:
            # The sizes, which the crops are drawn for, come from the headers, so that one picture at a time is held.
            try:
                files = [images.read(index, lambda content: (inspect(content), content)) for index in request.images]
            except UsageError:  # none is left: the process that trains says so, since torch would add a traceback
                return [], (), dict(images.unreadable)
            sizes = [header.size for _, (header, _) in files]
            with contextlib.suppress(_Broken):  # it is left out in the next try
                views = self._views(request, sizes, partial(self._decoded, images, files))
                return [index for index, _ in files], views, dict(images.unreadable)

    def _decoded(self, images: FileImages, files: list[tuple[int, tuple[Header, bytes]]], i: int) -> Tensor:
        """uint8 [3, H, W] of one of the files."""
        index, (header, content) = files[i]
        try:
            if header.plain == "JPEG" and decode_jpeg is not None:
                with contextlib.suppress(RuntimeError):  # Pillow says what is wrong, or reads it nevertheless
                    pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
                    if pixels.shape[1:] == header.size:
                        return pixels
            pixels = torch.from_numpy(np.array(decode(content))).permute(2, 0, 1)
            if pixels.shape[1:] != header.size:  # which the crop was drawn for
                raise BrokenImage("it has another size than its header says")
            return pixels
        except BROKEN as error:
            images.unreadable[index] = reason(error)
            raise _Broken from None

    def _views(
        self, request: Request, sizes: Sequence[tuple[int, int]], pixels: Callable[[int], Tensor]
    ) -> tuple[Tensor, ...]:
        """uint8 [B, 3, S, S], channels last, of uint8 [C, H, W] pictures, for each view."""
        size, views = self.image_size, self.augmentation.views
        drawn = draw_views(views, sizes, size, self.sampler.generator(request))
        boxes, flips = ([getattr(draws, name).tolist() for draws in drawn] for name in ("box", "flip"))
        outs = [batched.empty_views(len(sizes), size, torch.uint8, _CPU) for _ in views]
        for i in range(len(sizes)):
            picture = pixels(i)
            for view, draws, box, flip, out in zip(views, drawn, boxes, flips, outs, strict=True):
                crop = batched.crop(picture, box[i], flip[i], size, view.interpolation)
                image = crop.to(torch.float32, memory_format=torch.contiguous_format)
                batched.recolour_(image, draws.part(slice(i, i + 1)), blur_radius=blur_radius(view, size))
                out[i] = image[0].round_().to(torch.uint8)  # first to bytes, then to channels last: twice as fast
        return tuple(outs)


class TorchLoader(Loader):
    """Views from worker processes, a batch each; the same whatever the number of workers.

    Bytes travel to the device, and are normalised there.
    """

    def __init__(
        self,
        images: Images,
        augmentation: Augmentation,
        *,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        **sampling: int,
    ) -> None:
        super().__init__(len(images), augmentation, **sampling)
        self._images, self._device, self._dtype = images, device, dtype
        self._loader = DataLoader(
            _Views(images, augmentation, image_size, self._sampler),
            batch_size=None,  # the sampler's elements are batches already
            sampler=self._sampler,
            num_workers=workers,
            prefetch_factor=AHEAD if workers > 0 else None,
            generator=torch.Generator(),  # it would draw from the global one, and shift a resumed run's numbers
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=leave_to_the_trainer,
        )

    def _batches(self) -> Iterator[Batch]:
        for indices, views, faults in self._loader:
            if isinstance(self._images, FileImages):
                report(self.broken, self._images, faults)
            yield Batch(tuple(map(self._placed, views)), indices)

    def _placed(self, views: Tensor) -> Tensor:
        views = views.to(self._device, non_blocking=True)
        out = batched.empty_views(len(views), views.shape[-1], self._dtype, self._device)
        return batched.normalise(views, self._augmentation.mean, self._augmentation.std, out=out)
