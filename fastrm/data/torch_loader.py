"""Augments in worker processes: decodes and crops in uint8, and applies :mod:`fastrm.kernels.batched` to the crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import starmap

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastrm.data.augmentation import Augmentation, View
from fastrm.data.called import Augment, CalledViews
from fastrm.data.draws import BatchSampler, Draws, Request, blur_radius, boxes, draw_views
from fastrm.data.formats import RGB
from fastrm.data.items import ItemImages
from fastrm.data.loader import Batch, Loader, normalising
from fastrm.data.scan import readable, report
from fastrm.data.seeding import seeded
from fastrm.data.sources import Images
from fastrm.data.workers import Loaded, check_travels, received, sent, started
from fastrm.errors import UsageError
from fastrm.kernels import ViewParameters, augment_views, batched
from fastrm.machine.signals import leave_to_the_trainer

AHEAD = 2
"""Batches that each loader process prepares ahead."""
_HELD = 8  # decoded images in memory at a time
_CPU = torch.device("cpu")
_OWN_GENERATOR = (
    "the augmentation draws from a generator of its own: loader processes may draw the same numbers, and a resumed run "
    "is not exact; seed it in each call from torch's, NumPy's or Python's global generator, as in "
    "transform.set_random_seed(random.getrandbits(32)) with albumentations"
)


class _Views(Dataset[Loaded]):
    """Batches of views by the built-in augmentations; uint8 if the images are uint8, otherwise float32."""

    def __init__(self, images: Images, augmentation: Augmentation, image_size: int, sampler: BatchSampler) -> None:
        self.images, self.augmentation, self.image_size, self.sampler = images, augmentation, image_size, sampler

    def __getitem__(self, request: Request) -> Loaded:
        faults: dict[int, str] = {}
        try:
            return self._views(request, faults)
        except UsageError as error:  # the training process raises it; torch would add a traceback
            return Loaded([], (), faults, str(error))

    def _views(self, request: Request, faults: dict[int, str]) -> Loaded:
        """The views of a batch [B, C, S, S], channels last; a few images at a time are decoded and cropped."""
        views, images = self.augmentation.views, self.images
        sizes = [view.side(self.image_size) for view in views]
        indices = list(request.images)
        drawn = draw_views(views, [(1, 1)] * len(indices), self.image_size, self.sampler.generator(request))
        flips = [draws.flip.tolist() for draws in drawn]
        crops: list[list[Tensor]] = [[] for _ in views]

        def read(at: int) -> Tensor:
            with seeded(self.sampler.seed, request.epoch, at) if isinstance(images, ItemImages) else nullcontext():
                return images.drawn(at) if isinstance(images, ItemImages) else images.pixels(at)

        for start in range(0, len(indices), _HELD):
            held = [readable(images, at, read, faults) for at in indices[start : start + _HELD]]
            indices[start : start + _HELD] = [at for at, _ in held]
            sides = torch.tensor([picture.shape[1:] for _, picture in held], device="cpu").unbind(1)
            for view, size, draws, flip, cut in zip(views, sizes, drawn, flips, crops, strict=True):
                found = boxes(view, draws.tries[start : start + _HELD], *sides).tolist()
                for i, (_, picture) in enumerate(held):
                    cut.append(batched.crop(picture, found[i], flip[start + i], size, view.interpolation))
        outs = starmap(self._recoloured, zip(views, sizes, drawn, crops, strict=True))
        return Loaded(indices, tuple(map(sent, outs)), faults)

    def _recoloured(self, view: View, size: int, draws: Draws, crops: Sequence[Tensor]) -> Tensor:
        """Apply the operations after the crop to crops [1, C or 1, S, S]; returns [B, C, S, S], channels last."""
        format = self.images.format
        dtype = torch.uint8 if format.bytes else torch.float32
        wide = max(crop.shape[1] for crop in crops)  # gray images may be mixed with others
        out = batched.empty_views(len(crops), size, dtype, _CPU, channels=format.channels)
        steps = batched.steps(draws, wide, blur_radius(view, size), _CPU)
        count = batched.at_a_time(wide * size * size, _CPU)
        for start in range(0, len(crops), count):
            some = slice(start, start + count)
            part = crops[start] if count == 1 else torch.cat([crop.expand(-1, wide, -1, -1) for crop in crops[some]])
            images = torch.empty(len(part), wide, size, size, dtype=torch.float32, device="cpu")
            _copy(part, images)
            batched.carry_out_(steps, images, start)
            # NumPy converts to uint8 ten times as fast as torch.
            made = torch.from_numpy(images.round_().numpy().astype(np.uint8)) if format.bytes else images
            _copy(made, out[some])
        return out


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy [B, C or 1, S, S] to or from channels last; per channel with NumPy, up to five times as fast as torch."""
    for channel in range(target.shape[1]):
        target[:, channel].numpy()[...] = source[:, min(channel, source.shape[1] - 1)].numpy()


class TorchLoader(Loader):
    """Views from worker processes, each of which makes whole batches; they do not depend on the number of workers.

    uint8 views are sent to the device and normalised there. Float views of a callable are left unchanged.

    Args:
        images: the images.
        augmentation: a built-in augmentation, or a callable.
        image_size: side of built-in views without a size, in pixels.
        device, dtype: device and dtype of the views.
        workers: loader processes.
        sampling: arguments of :class:`Loader`.
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
        self.channels = images.format.channels
        self._mean, self._std = images.format.mean, images.format.std
        self._made_here = isinstance(augmentation, Augmentation)
        if isinstance(augmentation, Augmentation):
            self._mean, self._std = normalising(augmentation, images.format)
            dataset = _Views(images, augmentation, image_size, self._sampler)
            self.sizes = augmentation.sizes(image_size)
        else:
            check_travels(workers, augmentation)
            dataset = called = CalledViews(images, augmentation, self._sampler)
            self.sizes, self.channels = tuple((kind.shape[1], kind.shape[2]) for kind in called.kinds), called.channels
            if not called.same and (not isinstance(images, ItemImages) or images.items.same):
                self.notes.append(_OWN_GENERATOR)
        if isinstance(images, ItemImages):
            check_travels(workers, images)
        self._loader = DataLoader(
            dataset,
            batch_size=None,  # the sampler yields whole batches
            sampler=self._sampler,
            num_workers=workers,
            prefetch_factor=AHEAD if workers > 0 else None,
            generator=torch.Generator(),  # drawing from the global generator would change a resumed run
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=leave_to_the_trainer,
        )

    def _batches(self) -> Iterator[Batch]:
        for indices, views, faults, refusal in started(self._loader):
            report(self.broken, self._images, faults)
            if refusal:
                raise UsageError(refusal)
            yield Batch(tuple(self._placed(received(view)) for view in views), indices)

    def _placed(self, views: Tensor) -> Tensor:
        views = views.to(self._device, non_blocking=True)
        if views.is_floating_point() and not self._made_here:
            return views.to(self._dtype, memory_format=torch.channels_last)
        mean, std = self._mean, self._std
        if views.shape[1] not in (1, len(mean)):  # RGB views that a callable made from other bands
            mean, std = RGB.mean, RGB.std
        size = tuple(views.shape[-2:])
        return augment_views(
            views.permute(0, 2, 3, 1), ViewParameters(), out_size=size, dtype=self._dtype, mean=mean, std=std
        )
