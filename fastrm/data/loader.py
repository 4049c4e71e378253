"""The base class of the loaders of views."""

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
    """Views, and the indices of their images."""

    views: tuple[Tensor, ...]
    """Views [B, C, H, W], all in the same order of images."""
    indices: list[int]
    """Indices of the B images in the data set."""


def normalising(augmentation: Augmentation, format: PixelFormat) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of the augmentation if it has them, otherwise of the data.

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
    """Yield the same batches; on a GPU, prepare each on a separate stream while the previous one is in use."""
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
    """Batches of augmented views. Each iteration is the next epoch, in a new order.

    A batch depends only on the seed and its position (epoch, batch, rank), so ``seek`` leads to the same batch.

    Attributes:
        sizes: height and width of each view.
        channels: number of channels C of the views.
        notes: messages for the user, one sentence each.
        broken: images that were left out while reading, by name, with the reason.
    """

    sizes: tuple[tuple[int, int], ...]
    channels: int

    @property
    def views(self) -> int:
        """Number of views per image."""
        return len(self.sizes)

    def __init__(self, length: int, *, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self._sampler = BatchSampler(length, batch_size, seed, rank, world_size)
        self.broken: dict[str, str] = {}
        self.notes: list[str] = []

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._sampler)

    def seek(self, batch: int) -> None:
        """Continue from this batch, counted from the start of the run."""
        self._sampler.seek(batch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches that are left of this epoch, and move on to the next epoch."""
        yield from self._batches()
        self._sampler.next_epoch()

    @abstractmethod
    def _batches(self) -> Iterator[Batch]:
        """The batches that are left of the epoch."""
