"""Features of images, in evaluation mode and without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastrm.data import eval_loader
from fastrm.data.sources import Images

BATCH = 256


class Setting(NamedTuple):
    """How images reach a network."""

    image_size: int
    device: torch.device
    workers: int


class Pixels(nn.Module):
    """The features of a network that learned nothing and does nothing: the picture itself.

    Args:
        side: pictures are averaged down to at most this side.
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
    """Hold a network in evaluation mode, without gradient."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)


def batches(images: Images, setting: Setting) -> Iterator[tuple[Tensor, list[int]]]:
    """All images that can be read in order, as the evaluation sees them, float32 [B, C, H, W], and their indices."""
    loader = eval_loader(images, image_size=setting.image_size, batch_size=BATCH, workers=setting.workers)
    for batch in loader:
        yield batch.views[0].to(setting.device, non_blocking=True), batch.indices


def features(
    backbone: nn.Module, images: Images, setting: Setting, done: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pooled features float32 [B, C] and labels int64 [B] of all labelled images that can be read, in order.

    ``done`` gets the size of each batch that was used.
    """
    labels = labels_of(images, setting.device)
    for batch, indices in batches(images, setting):
        with evaluating(backbone):
            pooled: Tensor = backbone(batch).float()
        yield pooled, labels[indices]
        done(len(batch))


def labels_of(images: Images, device: torch.device) -> Tensor:
    """Labels int64 [N] of labelled images."""
    assert images.labels is not None
    return torch.as_tensor(images.labels, device=device)
