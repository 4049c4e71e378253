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
from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, Augmentation
from fastrm.data.called import Augment, CalledViews
from fastrm.data.decode import BROKEN, BrokenImage, Header, decode, inspect, reason
from fastrm.data.draws import BatchSampler, Request, blur_radius, boxes, draw_views
from fastrm.data.encoded import EncodedImages
from fastrm.data.items import ItemImages
from fastrm.data.loader import Batch, Loader
from fastrm.data.pixels import as_bytes
from fastrm.data.scan import check_share, readable, report
from fastrm.data.seeding import seeded
from fastrm.data.sources import ArrayImages, Images
from fastrm.data.workers import Loaded, check_travels
from fastrm.errors import UsageError
from fastrm.machine.signals import leave_to_the_trainer

try:  # a third faster than Pillow, but torchvision 0.29 announces that it will go
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # type: ignore[assignment, unused-ignore]

AHEAD = 2
"""Batches that each loader process makes ready ahead."""
_CPU = torch.device("cpu")


class _Broken(Exception):
    """A file turned out to be broken when it was decoded."""


class _Views(Dataset[Loaded]):
    """A batch whose views are made in bytes, by the built-in augmentations."""

    def __init__(self, images: Images, augmentation: Augmentation, image_size: int, sampler: BatchSampler) -> None:
        self.images, self.augmentation, self.image_size, self.sampler = images, augmentation, image_size, sampler

    def __getitem__(self, request: Request) -> Loaded:
        images = self.images
        if isinstance(images, ArrayImages):
            pixels = images.tensor()
            sizes = [(pixels.shape[2], pixels.shape[3])] * len(request.images)
            views = self._views(request, sizes, lambda i: pixels[request.images[i]])
            return Loaded(request.images, views, {})
        if isinstance(images, ItemImages):
            return self._of_items(images, request)
        assert isinstance(images, EncodedImages)
        while True:
            # The sizes, which the crops are drawn for, come from the headers, so that one picture at a time is held.
            try:
                files = [images.read(index, lambda content: (inspect(content), content)) for index in request.images]
            except UsageError as error:  # none is left
                return Loaded([], (), dict(images.unreadable), str(error))
            sizes = [header.size for _, (header, _) in files]
            with contextlib.suppress(_Broken):  # it is left out in the next try
                views = self._views(request, sizes, partial(self._decoded, images, files))
                return Loaded([index for index, _ in files], views, dict(images.unreadable))

    def _of_items(self, images: ItemImages, request: Request) -> Loaded:
        """One item at a time is held, so that its size is known only when its crops are due."""
        indices = list(request.images)
        faults: dict[int, str] = {}

        def read(at: int) -> Tensor:
            with seeded(self.sampler.seed, request.epoch, at):
                return as_bytes(images.given(at))

        def pixels(i: int) -> Tensor:
            indices[i], picture = readable(images, indices[i], read, faults)
            return picture

        try:
            views = self._views(request, None, pixels)
        except UsageError as error:  # torch would add a traceback: the process that trains says it
            return Loaded([], (), faults, str(error))
        return Loaded(indices, views, faults)

    def _decoded(self, images: EncodedImages, files: list[tuple[int, tuple[Header, bytes]]], i: int) -> Tensor:
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
        self, request: Request, sizes: Sequence[tuple[int, int]] | None, pixels: Callable[[int], Tensor]
    ) -> tuple[Tensor, ...]:
        """uint8 [B, 3, S, S], channels last, of uint8 [C, H, W] pictures, for each view.

        Their sizes are (height, width), or None for those that the pictures turn out to have.
        """
        size, views = self.image_size, self.augmentation.views
        count = len(request.images)
        drawn = draw_views(views, sizes or [(1, 1)] * count, size, self.sampler.generator(request))
        crops, flips = ([getattr(draws, name).tolist() for draws in drawn] for name in ("box", "flip"))
        outs = [batched.empty_views(count, size, torch.uint8, _CPU) for _ in views]
        for i in range(count):
            picture = pixels(i)
            for view, draws, box, flip, out in zip(views, drawn, crops, flips, outs, strict=True):
                if sizes is None:
                    height, width = torch.tensor(picture.shape[1:]).split(1)
                    box[i] = boxes(view, draws.tries[i : i + 1], height, width)[0].tolist()
                crop = batched.crop(picture, box[i], flip[i], size, view.interpolation)
                image = crop.to(torch.float32, memory_format=torch.contiguous_format)
                batched.recolour_(image, draws.part(slice(i, i + 1)), blur_radius=blur_radius(view, size))
                out[i] = image[0].round_().to(torch.uint8)  # first to bytes, then to channels last: twice as fast
        return tuple(outs)


class TorchLoader(Loader):
    """Views from worker processes, a batch each; the same whatever the number of workers.

    Bytes travel to the device, and are normalised there. Floats, which a callable may make, are left as they are.

    Args:
        images: what the views are of.
        augmentation: a built-in one, or a callable.
        image_size: side of a built-in augmentation's views.
        device, dtype: of the views.
        workers: loader processes.
        sampling: as :class:`Loader` takes it.
    """

    def __init__(
        self,
        images: Images,
        augmentation: Augmentation | Augment,
        *,
        image_size: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        **sampling: int,
    ) -> None:
        super().__init__(len(images), **sampling)
        self._images, self._device, self._dtype = images, device, dtype
        dataset: Dataset[Loaded]
        if isinstance(augmentation, Augmentation):
            self._mean, self._std = augmentation.mean, augmentation.std
            dataset = _Views(images, augmentation, image_size, self._sampler)
            self.views = len(augmentation.views)
        else:
            check_travels(workers, augmentation)
            self._mean, self._std = IMAGENET_MEAN, IMAGENET_STD
            dataset = called = CalledViews(images, augmentation, self._sampler)
            self.views = len(called.kinds)
        if isinstance(images, ItemImages):
            check_travels(workers, images)
        self._loader = DataLoader(
            dataset,
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
        for indices, views, faults, refusal in self._loader:
            if refusal:
                check_share(len(faults), self._images, {self._images.name(at): why for at, why in faults.items()})
                raise UsageError(refusal)
            report(self.broken, self._images, faults)
            yield Batch(tuple(map(self._placed, views)), indices)

    def _placed(self, views: Tensor) -> Tensor:
        views = views.to(self._device, non_blocking=True)
        if views.is_floating_point():
            return views.to(self._dtype, memory_format=torch.channels_last)
        out = batched.empty_views(len(views), views.shape[-2:], self._dtype, self._device)
        return batched.normalise(views, self._mean, self._std, out=out)
