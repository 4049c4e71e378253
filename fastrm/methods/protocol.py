"""Settings with which a publication trains the linear classifier that scores its backbones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """SGD on features of a frozen backbone, with random crops and flips. The defaults are MoCo-v3's."""

    lr: float = 0.1
    """Learning rate for a batch of 256; it is multiplied by batch / 256."""
    batch_size: int = 1024
    epochs: int = 90
    milestones: tuple[float, ...] = ()
    """Fractions of the run at which the learning rate is divided by 10; if empty, it follows a cosine to 0."""
