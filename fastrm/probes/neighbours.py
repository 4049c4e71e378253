"""Finds and draws the nearest neighbours of some images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastrm.data import Source
from fastrm.data.sheets import GREEN, SIDE, Row, Tile, draw, whole
from fastrm.data.sources import Images
from fastrm.machine.meeting import everyone
from fastrm.probes.features import Setting, batches, evaluating, of_round, pooled, rounds
from fastrm.terminal.progress import bar


class Neighbours(NamedTuple):
    """Images and their nearest images by cosine."""

    test: list[int]
    """Indices of the N test images."""
    bank: Tensor
    """Indices of images in the bank, nearest first, int64 [N, K]."""


def spread(images: Images, count: int) -> NDArray[np.int64]:
    """Indices of up to ``count`` labelled images, evenly from all classes; the same each time."""
    assert images.labels is not None
    order = np.argsort(images.labels, kind="stable")
    return order[((np.arange(min(count, len(order))) + 0.5) * len(order) / min(count, len(order))).astype(np.int64)]


def nearest(network: nn.Module, source: Source, setting: Setting, *, count: int = 16, k: int = 5) -> Neighbours:
    """Find the ``k`` nearest images of ``source.bank`` for test images from all classes.

    Memory does not grow with the bank. All processes share the bank; call this in all of them.

    Args:
        network: images to features [B, D].
        source: labelled data set.
        setting: how images reach the network.
        count: largest number of test images.
        k: largest number of neighbours.
    """
    assert source.bank is not None
    assert source.test is not None
    chosen = spread(source.test, count)
    few = source.test.subset(chosen).formatted(source.test.format)
    queries, asked = directions(network, few, setting)
    best = queries.new_zeros(len(queries), 0)
    index = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    with bar(f"nearest neighbours, {len(source.bank):,} images", len(source.bank)) as task:
        for number, (batch, own) in enumerate(rounds(source.bank, setting)):
            rows = nn.functional.normalize(pooled(network, batch, queries.shape[1]), dim=1)
            numbers = torch.as_tensor(own, dtype=torch.int64, device=rows.device).expand(len(queries), -1)
            both, numbers = torch.cat([best, queries @ rows.T], dim=1), torch.cat([index, numbers], dim=1)
            best, order = both.topk(min(k, both.shape[1]), dim=1)
            index = numbers.gather(1, order)
            task.advance(of_round(source.bank, number))
    best, index = (torch.cat(parts, dim=1) for parts in zip(*everyone((best.cpu(), index.cpu())), strict=True))
    order = best.topk(min(k, best.shape[1]), dim=1).indices
    return Neighbours([int(chosen[i]) for i in asked], index.gather(1, order))


def directions(network: nn.Module, images: Images, setting: Setting) -> tuple[Tensor, list[int]]:
    """Normalised features [N, C] of the readable images, and their indices."""
    rows, indices = [], []
    for batch, own in batches(images, setting):
        with evaluating(network):
            rows.append(nn.functional.normalize(network(batch).float(), dim=1))
        indices += own
    return torch.cat(rows), indices


def picture(found: Neighbours, source: Source, *, side: int = SIDE) -> Image.Image:
    """Draw a row per test image with its neighbours; neighbours of the same class have a green frame."""
    assert source.bank is not None
    assert source.test is not None
    ours, theirs = source.test.labels, source.bank.labels
    assert ours is not None
    assert theirs is not None
    rows = [
        Row(
            source.test.name(i),
            f"label {ours[i]}",
            [
                Tile(whole(source.test.picture(i), side)),
                *(Tile(whole(source.bank.picture(j), side), GREEN if theirs[j] == ours[i] else None) for j in row),
            ],
        )
        for i, row in zip(found.test, found.bank.tolist(), strict=True)
    ]
    return draw(rows, titles=["image", "nearest"])
