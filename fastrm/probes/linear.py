"""Linear classifiers on frozen features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastrm.data import SUPERVISED, Loader, Source, make_loader
from fastrm.errors import UsageError
from fastrm.machine.distributed import gather_objects, gather_rows, mean, world
from fastrm.machine.meeting import total
from fastrm.methods import LinearProtocol
from fastrm.probes.features import Setting, evaluating, labels_of

MOMENTUM = 0.9
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Learning rates that :func:`fitted_heads` tries, on features of unit variance."""
HELD_OUT = 10  # every tenth training image chooses the learning rate


def rate_factor(protocol: LinearProtocol, progress: float) -> float:
    """Factor of the learning rate at a fraction of the run."""
    if protocol.milestones:
        return 0.1 ** sum(progress >= milestone for milestone in protocol.milestones)
    return cosine(progress)


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


class LinearHeads:
    """Linear classifiers on the same features, one per learning rate, trained together by SGD with momentum.

    They start from zero, so no random numbers are needed.

    Args:
        dim: width of the features.
        classes: number of classes.
        rates: learning rate of each head.
        weight_decay: weight decay of the weights, not of the biases.
        device: device of the classifiers.
        shared: whether all processes train them together.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        rates: Sequence[float],
        *,
        weight_decay: float = 0.0,
        device: torch.device,
        shared: bool = True,
    ) -> None:
        self.shared = shared and world().size > 1
        self.heads = nn.ModuleList(nn.Linear(dim, classes, device="meta") for _ in rates).to_empty(device=device)
        groups: list[dict[str, Any]] = []
        for head, rate in zip(self.heads, rates, strict=True):
            assert isinstance(head, nn.Linear)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            groups += [
                {"params": [head.weight], "rate": rate, "weight_decay": weight_decay},
                {"params": [head.bias], "rate": rate, "weight_decay": 0.0},
            ]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM)

    def logits(self, features: Tensor) -> Tensor:
        """[B, C] features to [heads, B, classes]."""
        return torch.stack([head(features) for head in self.heads])

    def step(
        self,
        features: Tensor,
        labels: Tensor,
        factor: float,
        *,
        seen: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """Make one step; with several processes, on the mean of their gradients.

        Args:
            features: float32 [B, C].
            labels: int64 [B].
            factor: factor of the learning rates.
            seen: images that a head learns from, bool [heads, B]; None means all.
            counts: their number in all processes, [heads], if batches differ in size; None if each process has the
                same number.

        Returns:
            The logits before the step, [heads, B, classes].
        """
        logits = self.logits(features)
        each = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none"
        ).unflatten(0, logits.shape[:2])
        seen = torch.ones_like(each) if seen is None else seen.to(each.dtype)
        own = (each * seen).sum(dim=1)
        mean_of_own = own / seen.sum(dim=1).clamp_min(1) if counts is None else own / counts * world().size
        mean_of_own.sum().backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        if self.shared:  # one collective for all gradients
            gradients = [parameter.grad for parameter in self.heads.parameters() if parameter.grad is not None]
            vector_to_parameters(mean(parameters_to_vector(gradients)), gradients)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return logits.detach()

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact resume."""
        return {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


def fitted_heads(
    features: Tensor,
    labels: Tensor,
    *,
    rates: Sequence[float] = RATES,
    weight_decay: float = 1e-4,
    epochs: int = 50,
    batch_size: int = 1024,
    places: Tensor | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Fit a linear classifier on stored features, without augmentation, with all learning rates in one pass.

    The features are standardised. Each learning rate has two heads. One does not see every tenth image; these images
    choose the learning rate. The other sees all images, and is the classifier.

    Args:
        features: float32 [N, C].
        labels: int64 [N].
        rates: learning rates to try.
        weight_decay: λ in mean cross-entropy + λ/2 ‖weights‖².
        epochs: passes over the features; the learning rates follow a cosine to 0.
        batch_size: largest batch size; a small set is one batch.
        places: indices of these rows among those of all processes, int64 [N], which then fit together; None for a
            single process.
        progress: called with the share of the run that is done.

    Returns:
        The classifier; its score is named ``linear_quick``.
    """
    device, together = features.device, places is not None and world().size > 1
    here = (len(features), int(labels.max()) if len(labels) else 0)
    counts, largest = zip(*(gather_objects(here) if together else [here]), strict=True)
    count = sum(counts)
    centre, scale = _moments(features, counts) if together else (features.mean(dim=0), features.std(dim=0))
    scale = scale.clamp_min(1e-6)
    both = (*rates, *rates)
    heads = LinearHeads(
        features.shape[1], max(largest) + 1, both, weight_decay=weight_decay, device=device, shared=together
    )
    held = torch.arange(count, device=device) % HELD_OUT == 0
    rows = torch.full((count,), -1, device=device)
    own_places = places if places is not None and together else torch.arange(count, device=device)
    rows[own_places] = torch.arange(len(features), device=device)
    generator = torch.Generator().manual_seed(0)
    steps = epochs * math.ceil(count / batch_size)
    done = 0
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator).to(device)
        for index in order.split(batch_size):
            learned = (~held[index]).sum().expand(len(rates)), torch.full((len(rates),), len(index), device=device)
            index = index[rows[index] >= 0] if together else index
            ours = torch.ones(len(rates), len(index), dtype=torch.bool, device=device)
            seen = torch.cat([~held[index].expand_as(ours), ours])
            own = rows[index]
            rows_seen = (features[own] - centre) / scale
            heads.step(rows_seen, labels[own], cosine(done / steps), seen=seen, counts=torch.cat(learned).clamp_min(1))
            done += 1
            progress(done / steps)

    @torch.no_grad()
    def predictions(batch: Tensor) -> Tensor:
        return heads.logits((batch - centre) / scale).argmax(dim=2)

    right = torch.zeros(len(rates), device=device)
    for part in held[own_places].nonzero()[:, 0].split(batch_size):
        right += (predictions(features[part])[: len(rates)] == labels[part]).sum(dim=1)
    best = int((total(right) if together else right).argmax())
    return lambda batch: {"linear_quick": predictions(batch)[len(rates) + best]}


def _moments(features: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of the rows of all processes; ``counts`` has the rows per process.

    The parts are merged by the formula of Chan, Golub and LeVeque.
    """
    spread = features.var(dim=0) if len(features) > 1 else features.new_zeros(features.shape[1])
    middle = features.mean(dim=0) if len(features) else features.new_zeros(features.shape[1])
    parts = gather_rows(torch.stack([middle, spread])[None])[0]
    rows = torch.tensor(counts, device=features.device)[:, None]
    centre = (parts[:, 0] * (rows / rows.sum())).sum(dim=0)
    squares = parts[:, 1] * (rows - 1).clamp_min(0) + (parts[:, 0] - centre).square() * rows
    return centre, (squares.sum(dim=0) / (rows.sum() - 1)).sqrt()


def published_linear(
    networks: Mapping[str, nn.Module],
    source: Source,
    setting: Setting,
    protocol: LinearProtocol,
    *,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Callable[[Tensor], dict[str, Tensor]]]:
    """Train a linear classifier on each frozen network, on random crops and flips, in this process alone.

    Args:
        networks: networks that map images to features [B, D], by name; all see the same views.
        source: data set; training uses its ``bank``.
        setting: how images reach the networks.
        protocol: how it is trained.
        progress: called with the share of the run that is done.

    Returns:
        The classifiers per network; their score is named ``linear``.
    """
    loader, labels = supervised_loader(source, setting, protocol.batch_size)
    batch_size = min(protocol.batch_size, len(labels))
    rate = protocol.lr * batch_size / 256
    heads: dict[str, LinearHeads] = {}
    steps = protocol.epochs * len(loader)
    done = 0
    for _ in range(protocol.epochs):
        for (views,), indices in loader:
            truth = labels[indices]
            for name, network in networks.items():
                with evaluating(network):
                    pooled = network(views).float()
                if name not in heads:
                    classes = int(labels.max()) + 1
                    heads[name] = LinearHeads(pooled.shape[1], classes, [rate], device=setting.device, shared=False)
                heads[name].step(pooled, truth, rate_factor(protocol, done / steps))
            done += 1
            progress(done / steps)
    return {name: _classifier(head) for name, head in heads.items()}


def _classifier(heads: LinearHeads) -> Callable[[Tensor], dict[str, Tensor]]:
    return lambda batch: {"linear": heads.logits(batch)[0].argmax(dim=1)}


def supervised_loader(source: Source, setting: Setting, batch_size: int) -> tuple[Loader, Tensor]:
    """Crops and flips of the labelled images, at most ``batch_size`` at a time, and the labels, int64 [N]."""
    if source.bank is None:
        raise UsageError(f"{source.name} has no labels, which training a classifier needs")
    loader = make_loader(
        replace(source, train=source.bank),
        method=SUPERVISED,
        image_size=setting.image_size,
        batch_size=min(batch_size, len(source.bank)),
        device=setting.device,
        workers=setting.workers,
        seed=0,
    )
    return loader, labels_of(source.bank, setting.device)
