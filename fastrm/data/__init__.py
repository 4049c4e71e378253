"""Images in, pairs of augmented views out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastrm.data.augmentation import Augmentation, View, augmentation
from fastrm.data.sources import Images, Source, open_source
from fastrm.data.torch_loader import EvalImages, TorchLoader
from fastrm.errors import UsageError

__all__ = ["Augmentation", "Loader", "Source", "View", "augmentation", "eval_loader", "make_loader", "open_source"]


class Loader(Protocol):
    """What every loader offers; each pass over it is the next epoch, in a new order."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield two views of the same images, [B, 3, H, W] each."""

    def seek(self, batch: int) -> None:
        """Go on from this batch, counted from the start of the run."""


def make_loader(
    data: str | Path | Source,
    *,
    method: str,
    image_size: int,
    batch_size: int,
    device: str | torch.device,
    workers: int,
    seed: int,
    loader: str = "auto",
    crop_min: float = 0.2,
    data_root: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Return a loader of pairs of views, augmented as a method's publication says.

    Args:
        data: a folder, the name of a set, or an opened :class:`Source`.
        method: ``"mocov3"``, ``"mocov2"``, ``"byol"`` or ``"densecl"``: whose augmentation.
        image_size: side of the views, in pixels.
        batch_size: images a batch of this process; what is left over at the end of an epoch is dropped, and another
            part of the data in each epoch.
        device: where the views are put.
        workers: loader processes; 0 loads in this one.
        seed: the same seed gives the same views, whatever the number of workers.
        loader: ``"auto"`` or ``"torch"``.
        crop_min: smallest share of the area that a crop takes.
        data_root: where a named set lies.
        rank, world_size: this process among all; together they see every image once an epoch.

    Returns:
        A :class:`Loader`: iterate it for one epoch of (first, second), float32 [B, 3, H, W] each, normalised by
        ImageNet's mean and standard deviation; ``len`` is the number of batches an epoch.

    Raises:
        UsageError: the data cannot be opened or holds less than a batch, or the loader does not exist.
    """
    if loader not in ("auto", "torch"):
        raise UsageError(f"--loader {loader} does not exist yet; available: auto, torch")
    source = data if isinstance(data, Source) else open_source(str(data), data_root)
    wanted = batch_size * world_size
    if wanted > len(source.train):
        raise UsageError(
            f"--batch-size {wanted} is more than the {len(source.train)} images of {source.name}; "
            f"it must be at most {len(source.train)}"
        )
    return TorchLoader(
        source.train,
        augmentation(method, crop_min=crop_min),
        image_size=image_size,
        batch_size=batch_size,
        device=torch.device(device),
        workers=workers,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def eval_loader(images: Images, *, image_size: int, batch_size: int, workers: int) -> DataLoader[Tensor]:
    """Return the images in order, as the evaluation sees them: float32 [B, 3, H, W]."""
    views = EvalImages(images, image_size)
    # A generator of its own, so that an evaluation leaves the run's random numbers as they are.
    return DataLoader(views, batch_size=batch_size, num_workers=workers, generator=torch.Generator())
