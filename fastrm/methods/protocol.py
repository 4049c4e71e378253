"""How a publication trains the linear classifier that it scores its backbones by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """SGD on a frozen backbone, with random crops and flips. The defaults are those of MoCo-v3."""

    lr: float = 0.1
    """For a batch of 256; scaled by batch / 256."""
    batch_size: int = 1024
    epochs: int = 90
    milestones: tuple[float, ...] = ()
    """Shares of the run after which the rate falls to a tenth; without any, it follows a cosine to 0."""
