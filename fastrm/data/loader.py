"""What the loaders of views have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrm.data.augmentation import Augmentation
from fastrm.data.draws import BatchSampler
from fastrm.data.formats import PixelFormat
from fastrm.errors import UsageError


class Batch(NamedTuple):
    """Views, and the images that they are of."""

    views: tuple[Tensor, ...]
    """[B, C, H, W] each, in one order of the images."""
    indices: list[int]
    """B places in the data set."""


def normalising(augmentation: Augmentation, format: PixelFormat) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the augmentation's where it says them, and else the data's.

    Raises:
        UsageError: the augmentation has another number of channels.
    """
    for name in ("mean", "std"):
        values = getattr(augmentation, name)
        if values is not None and len(values) != format.channels:
            raise UsageError(
                f"augmentation: {name} has {len(values)} numbers, and the images {format.channels} channels"
            )
    return augmentation.mean or format.mean, augmentation.std or format.std


def one_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; on a GPU each is made on a stream of its own, while the one before is in use."""
    if device.type != "cuda":
        yield from batches
        return
    own = torch.cuda.Stream(device)
    own.wait_stream(torch.cuda.current_stream(device))  # on which the images came
    ready: tuple[Batch, torch.cuda.Event] | None = None
    while True:
        with torch.cuda.stream(own):
            batch = next(batches, None)
            made = None if batch is None else (batch, own.record_event())
        if ready is not None:
            user = torch.cuda.current_stream(device)
            user.wait_event(ready[1])
            for view in ready[0].views:
                view.record_stream(user)
            yield ready[0]
        if made is None:
            return
        ready = made


class Loader(ABC):
    """Batches of augmented views; each pass over it is the next epoch, in a new order.

    A batch depends on the seed and its place (epoch, batch, rank) alone, so that ``seek`` gives the same one anywhere.

    Attributes:
        views: how many there are of each image.
        channels: C of the views.
        notes: what a user should know, a sentence each.
        broken: images that were left out while reading, by name, and what is wrong with them.
    """

    views: int
    channels: int

    def __init__(self, length: int, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self._sampler = BatchSampler(length, batch_size, seed, rank, world_size)
        self.broken: dict[str, str] = {}
        self.notes: list[str] = []

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._sampler)

    def seek(self, batch: int) -> None:
        """Go on from this batch, counted from the start of the run."""
        self._sampler.seek(batch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the views of the same images, [B, C, H, W] each: two, or as many as the augmentation gives."""
        yield from self._batches()
        self._sampler.next_epoch()

    @abstractmethod
    def _batches(self) -> Iterator[Batch]:
        """What is left of the epoch."""
