"""Shared code of the trainers in this folder: images of digits, a network, and a stopwatch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.transforms import v2


class Run:
    """A training run: its settings, its losses, and the milliseconds of each part per step.

    Args:
        steps: optimizer steps.
        arch: backbone of timm.
        batch_size: images per step.
    """

    def __init__(self, steps: int, arch: str = "resnet50", batch_size: int = 32) -> None:
        self.steps, self.arch, self.batch_size = steps, arch, batch_size
        self.dtype = torch.get_default_dtype()
        self.losses: list[float] = []
        self.ms: dict[str, list[float]] = defaultdict(list)

    def backbone(self, **options: int) -> nn.Module:
        """A new network with features [B, C]."""
        return timm.create_model(self.arch, num_classes=options.pop("classes", 0), **options)

    def batches(self, sizes: Sequence[int] = (32, 32)) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield batches of views of digits, [B, 3, S, S] each, with their labels, one per step, and time each step."""
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
        images = images.to(self.dtype)
        views = [v2.RandomResizedCrop(size, scale=(0.4, 1), antialias=True) for size in sizes]
        for _ in range(self.steps):
            chosen = torch.randint(len(images), (self.batch_size,))
            batch = [torch.stack([view(image) for image in images[chosen]]) for view in views]
            with self.part("step"):
                yield batch, torch.from_numpy(labels)[chosen]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure the time of the block."""
        begin = time.perf_counter()
        yield
        self.ms[name].append(1000 * (time.perf_counter() - begin))

    def end(self, loss: Tensor) -> None:
        """Record the loss of a step."""
        self.losses.append(loss.item())
