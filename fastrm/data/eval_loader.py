"""Loads images for evaluation: in order, without augmentation, and without unreadable ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastrm.data.dali_views import DaliViews
from fastrm.data.decode import BROKEN, reason
from fastrm.data.encoded import EncodedImages
from fastrm.data.eval_view import eval_view
from fastrm.data.items import ItemImages
from fastrm.data.loader import Batch
from fastrm.data.scan import report
from fastrm.data.sources import Images
from fastrm.data.workers import Sent, check_travels, received, sent, started
from fastrm.machine.signals import leave_to_the_trainer

_View = tuple[int, Tensor | str]
"""The index of an image, and its view or the reason why it cannot be read."""


class EvalLoader:
    """Batches of one view per image, in order; unreadable images are left out with a warning.

    Process ``rank`` gets every ``world_size``-th batch; the batches do not depend on the number of processes. ``dali``
    is the device on which DALI decodes files of RGB images; if it is None, ``workers`` processes decode.

    Attributes:
        broken: images that were left out here, by name, with the reason.
    """

    def __init__(
        self,
        images: Images,
        *,
        image_size: int,
        batch_size: int,
        workers: int,
        dali: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.broken: dict[str, str] = {images.name(i): why for i, why in images.unreadable.items()}
        self._images = images
        if isinstance(images, ItemImages):
            check_travels(workers, images)
        batches = _RankBatches(len(images), batch_size, rank, world_size)
        self._loader: DaliViews | DataLoader[_View]
        if dali is not None:
            assert isinstance(images, EncodedImages)
            self._loader = DaliViews(images, batches, image_size=image_size, device=dali, threads=max(1, workers))
            return
        # A separate generator, so that an evaluation does not change the random numbers of the run.
        self._loader = DataLoader(
            _EvalImages(images, image_size),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collated,
            generator=torch.Generator(),
            worker_init_fn=leave_to_the_trainer,
        )

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield all images of this process once, with one view each.

        Raises:
            UsageError: more than a tenth of the images cannot be read.
        """
        for indices, views, faults in started(self._loader):
            self._images.unreadable.update(faults)  # later passes skip them too, so that all use the same images
            report(self.broken, self._images, faults)
            if views is not None:
                yield Batch((received(views),), indices)


class _RankBatches(Sampler[list[int]]):
    """Samples every ``world_size``-th batch of indices, in order."""

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


def _collated(batch: list[_View]) -> tuple[list[int], Sent | None, dict[int, str]]:
    seen = {index: view for index, view in batch if isinstance(view, Tensor)}
    faults = {index: why for index, why in batch if isinstance(why, str)}
    return list(seen), sent(torch.stack(list(seen.values()))) if seen else None, faults
