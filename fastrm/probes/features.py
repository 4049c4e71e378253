"""Computes features of images, in evaluation mode and without gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastrm.data import EvalLoader, eval_loader
from fastrm.data.scan import check_share
from fastrm.data.sources import Images
from fastrm.machine.distributed import world
from fastrm.machine.meeting import everyone, meet

BATCH = 256


class Setting(NamedTuple):
    """Size, device and loading of the images for a network."""

    image_size: int
    device: torch.device
    workers: int
    loader: str = "auto"
    """The loader, as in :func:`fastrm.data.eval_loader`."""


class Share(NamedTuple):
    """A process's share of the features of labelled images."""

    features: Tensor
    """float32 [N, C]."""
    labels: Tensor
    """int64 [N]."""
    places: Tensor
    """Indices of these rows among those of all processes, in the order of the images, int64 [N]."""
    rows: int
    """Number of rows in all processes."""
    classes: int
    """One more than the largest label in all processes."""


class Pixels(nn.Module):
    """A network without weights whose features are the pixels of the image.

    Args:
        side: images are averaged down to at most this side.
    """

    def __init__(self, side: int = 32) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C * side * side]."""
        side = min(self.side, images.shape[-1])
        return nn.functional.adaptive_avg_pool2d(images, side).flatten(1)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Keep a network in evaluation mode, without gradient."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


def batches(images: Images, setting: Setting) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield all readable images in order, prepared as for evaluation, float32 [B, C, H, W], with their indices."""
    for batch in _loader(images, setting):
        yield batch.views[0].to(setting.device, non_blocking=True), batch.indices


def rounds(images: Images, setting: Setting) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield this process's batches, as :func:`batches` does, in the same number of rounds in every process.

    All processes meet in each round, so that none waits long at the end. A process without images left yields
    [0, C, H, W]. At the end, each process knows the unreadable images of the others.

    Raises:
        UsageError: more than a tenth of the images cannot be read, in all processes together.
    """
    rank, size = world()
    side = setting.image_size
    loader = iter(_loader(images, setting, rank, size))
    for _ in range(math.ceil(len(images) / (BATCH * size))):
        batch = next(loader, None)
        meet()
        views = torch.empty(0, images.format.channels, side, side) if batch is None else batch.views[0]
        yield views.to(setting.device, non_blocking=True), [] if batch is None else batch.indices
    for faults in everyone(images.unreadable):
        images.unreadable.update(faults)
    check_share(len(images.unreadable), images, {images.name(i): why for i, why in images.unreadable.items()})


def _loader(images: Images, setting: Setting, rank: int = 0, size: int = 1) -> EvalLoader:
    return eval_loader(images, **setting._asdict(), batch_size=BATCH, rank=rank, world_size=size)


def of_round(images: Images, number: int) -> int:
    """Number of images that all processes read in a round."""
    size = BATCH * world().size
    return min(size, len(images) - number * size)


def pooled(network: nn.Module, views: Tensor, width: int = 0) -> Tensor:
    """Features float32 [B, C] of views [B, C, H, W], or [0, width] of none."""
    if not len(views):
        return torch.empty(0, width, device=views.device)
    with evaluating(network):
        found: Tensor = network(views).float()
    return found


def width_of(network: nn.Module, images: Images, setting: Setting) -> int:
    """The width C of a network's features."""
    side = setting.image_size
    return pooled(network, torch.zeros(1, images.format.channels, side, side, device=setting.device)).shape[1]


def shares(
    networks: Mapping[str, nn.Module],
    images: Images,
    setting: Setting,
    done: Callable[[int], None] = lambda count: None,
) -> dict[str, Share]:
    """Features of labelled images from several networks; each image is read once, in one of the processes.

    Features are written in place, so memory never holds them twice. ``done`` is called with the number of images that
    all processes have read.
    """
    rank, size = world()
    every = math.ceil(len(images) / BATCH)
    most = min(len(images), BATCH * len(range(rank, every, size)))
    held = {
        name: torch.empty(most, width_of(network, images, setting), device=setting.device)
        for name, network in networks.items()
    }
    read: list[int] = []
    for number, (views, indices) in enumerate(rounds(images, setting)):
        for name, network in networks.items():
            rows = held[name]
            rows[len(read) : len(read) + len(indices)] = pooled(network, views, rows.shape[1])
        read += indices
        done(of_round(images, number))
    sound = np.sort(np.concatenate([np.array(each, dtype=np.int64) for each in everyone(read)]))
    labels = labels_of(images, setting.device)
    own, all_read = (torch.as_tensor(index, dtype=torch.int64, device=setting.device) for index in (read, sound))
    places, classes = torch.searchsorted(all_read, own), int(labels[all_read].max()) + 1
    return {name: Share(rows[: len(own)], labels[own], places, len(sound), classes) for name, rows in held.items()}


def features(
    backbone: nn.Module, images: Images, setting: Setting, done: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pooled features float32 [B, C] and labels int64 [B] of all readable labelled images, in order.

    ``done`` is called with the size of each batch.
    """
    labels = labels_of(images, setting.device)
    for batch, indices in batches(images, setting):
        yield pooled(backbone, batch), labels[indices]
        done(len(batch))


def labels_of(images: Images, device: torch.device) -> Tensor:
    """Labels int64 [N] of labelled images."""
    assert images.labels is not None
    return torch.as_tensor(images.labels, device=device)
