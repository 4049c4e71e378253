"""Images as an evaluation sees them: in order, without augmentation, and without those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional

from fastrm.data.decode import BROKEN, reason
from fastrm.data.formats import RGB, PixelFormat
from fastrm.data.items import ItemImages
from fastrm.data.loader import Batch
from fastrm.data.scan import report
from fastrm.data.sources import Images
from fastrm.data.workers import check_travels
from fastrm.machine.signals import leave_to_the_trainer

_View = tuple[int, Tensor | str]
"""An image's index, and its view, or why it cannot be read."""
_Views = tuple[list[int], Tensor | None, dict[int, str]]
"""Indices and views of a batch's images, and what is wrong with those that are left out."""


_LONG = 16  # times the shorter side: what is resized whole; of longer pictures just the part that is seen


def eval_view(pixels: Tensor, image_size: int, format: PixelFormat = RGB) -> Tensor:
    """The customary evaluation view: shorter side to 256/224 of the size and the centre; small pictures whole.

    Args:
        pixels: [C, H, W] as ``format`` fits them, of any shape; memory is bounded by the picture and the view.
        image_size: S; up to 64, the whole picture is seen, in a square.
        format: of the pixels.

    Returns:
        float32 [channels, S, S], normalised by the format's mean and standard deviation.
    """
    short = round(image_size * 256 / 224)
    seen = [
        functional.to_image(_squared(part, image_size) if image_size <= 64 else _centre(part, short, image_size))
        for part in _parts(pixels)
    ]
    scaled = torch.cat([functional.to_dtype(part, torch.float32, scale=True) for part in seen])
    if not format.bytes:
        scaled = scaled / 255
    views = scaled.expand(format.channels, -1, -1)
    return functional.normalize(views, list(format.mean), list(format.std))


def _parts(pixels: Tensor) -> list[Image.Image]:
    """What Pillow resizes at once: RGB of bytes, or a band."""
    arrays = pixels.numpy()
    if pixels.dtype == torch.uint8 and len(arrays) == 3:
        return [Image.fromarray(np.ascontiguousarray(arrays.transpose(1, 2, 0)))]
    return [Image.fromarray(np.ascontiguousarray(band)) for band in arrays]


def _squared(picture: Image.Image, size: int) -> Image.Image:
    if picture.height > _LONG * picture.width:  # rows last would make a picture of all rows of this width
        picture = picture.resize((picture.width, size), Image.Resampling.BILINEAR)
    return picture.resize((size, size), Image.Resampling.BILINEAR)


def _centre(picture: Image.Image, short: int, size: int) -> Image.Image:
    """Resize so that the shorter side is ``short``, and take ``size`` squared from the centre, as torchvision does."""
    width, height = picture.size
    if max(width, height) <= _LONG * min(width, height):
        return functional.center_crop(functional.resize(picture, [short], antialias=True), [size])
    # The same pixels, without those around them: 256 times the length of a picture that is one pixel wide.
    wide, high = (int(short * side / min(width, height)) for side in (width, height))
    left, top = (round((side - size) / 2) for side in (wide, high))
    x, y = width / wide, height / high
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box=box)


class EvalLoader:
    """Batches of images in order, of one view each; an image that cannot be read is left out, with a warning.

    Of several processes each gets every so many batches, which are the same however many processes there are.

    Attributes:
        broken: images that were left out here, by name, and what is wrong with them.
    """

    def __init__(
        self, images: Images, *, image_size: int, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.broken: dict[str, str] = {images.name(i): why for i, why in images.unreadable.items()}
        self._images = images
        if isinstance(images, ItemImages):
            check_travels(workers, images)
        # A generator of its own, so that an evaluation leaves the run's random numbers as they are.
        self._loader = DataLoader(
            _EvalImages(images, image_size),
            batch_sampler=_Dealt(len(images), batch_size, rank, world_size),
            num_workers=workers,
            collate_fn=_together,
            generator=torch.Generator(),
            worker_init_fn=leave_to_the_trainer,
        )

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield all images of this process once, with one view each.

        Raises:
            UsageError: more than a tenth of the images cannot be read.
        """
        for indices, views, faults in self._loader:
            self._images.unreadable.update(faults)  # nor does the next pass read them: all score the same images
            report(self.broken, self._images, faults)
            if views is not None:
                yield Batch((views,), indices)


class _Dealt(Sampler[list[int]]):
    """Every so many batches of indices in order."""

    def __init__(self, length: int, batch_size: int, rank: int, world_size: int) -> None:
        self._length, self._size = length, batch_size
        self._starts = range(rank * batch_size, length, batch_size * world_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start, min(start + self._size, self._length)))


class _EvalImages(Dataset[_View]):
    def __init__(self, images: Images, image_size: int) -> None:
        self.images, self.image_size = images, image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _View:
        if index in self.images.unreadable:
            return index, self.images.unreadable[index]
        try:
            return index, eval_view(self.images.pixels(index), self.image_size, self.images.format)
        except BROKEN as error:
            return index, reason(error)


def _together(batch: list[_View]) -> _Views:
    seen = {index: view for index, view in batch if isinstance(view, Tensor)}
    faults = {index: why for index, why in batch if isinstance(why, str)}
    return list(seen), torch.stack(list(seen.values())) if seen else None, faults
