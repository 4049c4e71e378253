"""Fine-tuning on a fraction of the labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from fastrm.data import Source
from fastrm.data.sources import Images
from fastrm.models import Backbone
from fastrm.probes.features import Setting, evaluating
from fastrm.probes.linear import MOMENTUM, cosine, supervised_loader

BATCH = 256
RATE = 0.05  # learning rate for a batch of 256


def fraction_of(images: Images, fraction: float) -> Images:
    """A fraction of the labelled images, at least one per class; the same images every time."""
    assert images.labels is not None
    rng = np.random.default_rng(0)
    chosen = []
    for label in np.unique(images.labels):
        own = rng.permutation(np.flatnonzero(images.labels == label))
        chosen.append(own[: max(1, round(fraction * len(own)))])
    return images.subset(np.sort(np.concatenate(chosen))).formatted(images.format)


def fine_tuned(
    backbone: Backbone,
    source: Source,
    setting: Setting,
    fraction: float,
    *,
    epochs: int | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> tuple[nn.Module, Callable[[Tensor], dict[str, Tensor]]]:
    """Train a copy of a whole network, with a linear classifier on top, on a fraction of the labelled images.

    As in SimCLR (Chen et al., arXiv 2002.05709, appendix B.5): Nesterov momentum, learning rate 0.05 × batch / 256
    (with a cosine to 0), no warm-up, no weight decay, random crops and flips, 60 epochs for 1 % of the labels and 30
    for 10 %; but with batches of 256.

    Args:
        backbone: starting point; it is not changed.
        source: data set; the fraction is taken from each class of its ``bank``.
        setting: how images reach the network.
        fraction: above 0 and at most 1.
        epochs: None means 60 below a fraction of 0.05, and 30 above.
        progress: called with the completed fraction of the run.

    Returns:
        The trained backbone, and the classifier of its features; its score is named ``semi``.
    """
    assert source.bank is not None
    few = fraction_of(source.bank, fraction)
    loader, labels = supervised_loader(replace(source, bank=few), setting, BATCH)
    network = copy.deepcopy(backbone).requires_grad_(True)
    head = nn.Linear(backbone.dim, int(labels.max()) + 1, device=setting.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    parameters = [*network.parameters(), *head.parameters()]
    rate = RATE * min(BATCH, len(few)) / 256
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=MOMENTUM, nesterov=True)
    epochs = epochs or (60 if fraction < 0.05 else 30)
    steps, done = epochs * len(loader), 0
    network.train()
    for _ in range(epochs):
        for (views,), indices in loader:
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(done / steps)
            loss = nn.functional.cross_entropy(head(network(views).float()), labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done += 1
            progress(done / steps)

    def classifier(batch: Tensor) -> dict[str, Tensor]:
        with evaluating(head):
            return {"semi": head(batch).argmax(dim=1)}

    return network, classifier
