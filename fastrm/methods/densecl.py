"""DenseCL (Wang et al., arXiv 2011.09157): MoCo-v2 with an additional InfoNCE between positions of the feature map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrm.errors import UsageError
from fastrm.kernels import info_nce, residual_loss
from fastrm.methods.base import Encoding, Method
from fastrm.methods.published import QUEUE_LINEAR, QUEUE_R50
from fastrm.methods.registry import register
from fastrm.models import Backbone, mlp
from fastrm.settings.config import MethodConfig


@dataclass(frozen=True)
class DenseEncoding(Encoding):
    """An encoding with additional vectors for each of the S positions of the feature map."""

    positions: Tensor
    """The backbone's feature map [B, S, C], by which positions of two views are matched."""
    dense: Tensor
    """Output of the dense projector [B, S, D]."""


class DenseEncoder(nn.Module):
    """Backbone, global projector of the pooled map, and dense projector of each position."""

    def __init__(self, backbone: Backbone, width: int, config: MethodConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = mlp((width, config.hidden_dim, config.output_dim))
        self.dense_projector = mlp((width, config.hidden_dim, config.output_dim))

    def forward(self, images: Tensor) -> DenseEncoding:
        """Encode images [B, C, H, W]."""
        pooled, features = self.backbone.encode(images)
        positions = features.flatten(2).transpose(1, 2)
        projection = self.projector(positions.mean(dim=1))
        return DenseEncoding(pooled, projection, projection, positions, self.dense_projector(positions))


@register("densecl")
class DenseCL(Method[DenseEncoding]):
    """The global and the dense loss, each with its own queue, weighted (1 - dense_weight) and dense_weight."""

    recipes: ClassVar = {"densecl-r50-coco-800ep": {**QUEUE_R50, "epochs": 800, "lr": 0.3, "dense_weight": 0.5}}
    uses = frozenset({"temperature", "queue_size", "queue_dtype", "dense_weight"})
    linear_protocol = QUEUE_LINEAR

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        width = backbone.map_dim
        if width is None:
            raise UsageError(
                "--method densecl needs a backbone with a feature map [B, D, h, w]; this --arch returns tokens "
                "or pooled features"
            )
        super().__init__(DenseEncoder(backbone, width, config), config, directions=1, queues=2, backend=backend)
        self.temperature, self.dense_weight = config.temperature, config.dense_weight

    def own_loss(self, direction: int, student: DenseEncoding, key: DenseEncoding) -> Tensor:
        """Both losses; the positive of a position is the key position with the nearest backbone features."""
        own = (1 - self.dense_weight) * self._contrast(0, student.output, key.output)
        positives = matched(student.positions, key.positions, key.dense)
        return own + self.dense_weight * self._contrast(1, student.dense.flatten(0, 1), positives.flatten(0, 1))

    def _contrast(self, number: int, rows: Tensor, positives: Tensor) -> Tensor:
        """InfoNCE against the queue ``number``."""
        queue: Any = self.queues[number]
        return info_nce(rows, positives, queue.features, temperature=self.temperature, backend=self.backend)

    def residual(self, student: DenseEncoding, same: DenseEncoding) -> Tensor:
        """At output and projector (the same), the term has global and dense vectors, weighted as in the loss."""
        whole = super().residual(student, same)
        if self.residual_at == "backbone":
            return whole
        dense = residual_loss(student.dense.flatten(0, 1), same.dense.flatten(0, 1), backend=self.backend)
        return (1 - self.dense_weight) * whole + self.dense_weight * dense

    def keys_of(self, key: DenseEncoding) -> tuple[Tensor, ...]:
        """The global keys, and for the dense queue one vector per image, the mean over its positions."""
        return key.output, key.dense.mean(dim=1)


@torch.no_grad()
def matched(positions: Tensor, key_positions: Tensor, key_dense: Tensor) -> Tensor:
    """For each of the positions [B, S, C], the dense key [B, S, D] at the key position with the highest cosine."""
    similarity = nn.functional.normalize(positions, dim=2) @ nn.functional.normalize(key_positions, dim=2).mT
    nearest = similarity.argmax(dim=2, keepdim=True)
    return key_dense.gather(1, nearest.expand(-1, -1, key_dense.shape[2]))
