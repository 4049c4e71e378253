"""An online probe: a linear classifier that is trained during the run on the student's detached features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastrm.probes.linear import LinearHeads, cosine

RATE = 0.1  # for a batch of 256


class OnlineLinear:
    """A linear classifier on the student's detached features of the first view, with its own optimizer.

    Args:
        dim: width of the features.
        labels: int64 [N] of the training images.
        batch_size: images per step over all processes; the learning rate is 0.1 × batch / 256, with a cosine to 0.
        device: device of the classifier.
    """

    def __init__(self, dim: int, labels: NDArray[np.int64], *, batch_size: int, device: torch.device) -> None:
        self.labels = torch.as_tensor(labels, device=device)
        self.heads = LinearHeads(dim, int(labels.max()) + 1, [RATE * batch_size / 256], device=device)
        self.right = torch.zeros((), device=device)
        self.seen = 0

    def step(self, features: Tensor, indices: list[int], progress: float) -> None:
        """Learn from a micro-batch; images whose features are not finite are skipped.

        Args:
            features: [B, C].
            indices: indices of the training images.
            progress: completed fraction of the run.
        """
        truth = self.labels[indices]
        finite = features.isfinite().all(dim=1)
        sound = torch.where(finite[:, None], features, 0).float()
        logits = self.heads.step(sound, truth, cosine(progress), seen=finite[None])
        self.right += (logits[0].argmax(dim=1) == truth).sum()
        self.seen += len(indices)

    def accuracy(self) -> float:
        """Accuracy on the training views since the last call, before each step; the host waits for the device."""
        share = float(self.right) / max(1, self.seen)
        self.right.zero_()
        self.seen = 0
        return share

    def __call__(self, features: Tensor) -> dict[str, Tensor]:
        """Predicted classes int64 [B] of features [B, C], named ``online``."""
        return {"online": self.heads.logits(features)[0].argmax(dim=1)}

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact resume."""
        return {"heads": self.heads.state_dict(), "right": self.right, "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.heads.load_state_dict(state["heads"])
        self.right.copy_(state["right"])
        self.seen = state["seen"]
