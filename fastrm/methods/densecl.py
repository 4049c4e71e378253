"""DenseCL (Wang et al., arXiv 2011.09157): MoCo-v2, and the same contrast between positions of the feature map."""

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
    """An encoding with one vector a position besides; S positions."""

    positions: Tensor
    """[B, S, C] the backbone's map, by which positions of two views are matched."""
    dense: Tensor
    """[B, S, D] behind the dense projector."""


class DenseEncoder(nn.Module):
    """Backbone, global projector on the pooled map, and dense projector on each position."""

    def __init__(self, backbone: Backbone, width: int, config: MethodConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = mlp((width, config.hidden_dim, config.output_dim))
        self.dense_projector = mlp((width, config.hidden_dim, config.output_dim))

    def forward(self, images: Tensor) -> DenseEncoding:
        """[B, C, H, W] images to a dense encoding."""
        pooled, features = self.backbone.encode(images)
        positions = features.flatten(2).transpose(1, 2)
        projection = self.projector(positions.mean(dim=1))
        return DenseEncoding(pooled, projection, projection, positions, self.dense_projector(positions))


@register("densecl")
class DenseCL(Method[DenseEncoding]):
    """Both losses against a queue of their own, weighted (1 - dense_weight) and dense_weight."""

    recipes: ClassVar = {"densecl-r50-coco-800ep": {**QUEUE_R50, "epochs": 800, "lr": 0.3, "dense_weight": 0.5}}
    uses = frozenset({"temperature", "queue_size", "queue_dtype", "dense_weight"})
    linear_protocol = QUEUE_LINEAR

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        width = backbone.map_dim
        if width is None:
            raise UsageError(
                "--method densecl needs a backbone with a feature map [B, D, h, w]; this --arch gives tokens, or "
                "features that are pooled already"
            )
        super().__init__(DenseEncoder(backbone, width, config), config, directions=1, queues=2, backend=backend)
        self.temperature, self.dense_weight = config.temperature, config.dense_weight

    def own_loss(self, direction: int, student: DenseEncoding, key: DenseEncoding) -> Tensor:
        """Each position's positive is the key position whose backbone features are nearest."""
        own = (1 - self.dense_weight) * self._contrast(0, student.output, key.output)
        positives = matched(student.positions, key.positions, key.dense)
        return own + self.dense_weight * self._contrast(1, student.dense.flatten(0, 1), positives.flatten(0, 1))

    def _contrast(self, number: int, rows: Tensor, positives: Tensor) -> Tensor:
        """InfoNCE against one of the queues."""
        queue: Any = self.queues[number]
        return info_nce(rows, positives, queue.features, temperature=self.temperature, backend=self.backend)

    def residual(self, student: DenseEncoding, same: DenseEncoding) -> Tensor:
        """At the output or projector (one and the same here) both kinds of vector, weighted like the loss."""
        whole = super().residual(student, same)
        if self.residual_at == "backbone":
            return whole
        dense = residual_loss(student.dense.flatten(0, 1), same.dense.flatten(0, 1), backend=self.backend)
        return (1 - self.dense_weight) * whole + self.dense_weight * dense

    def keys_of(self, key: DenseEncoding) -> tuple[Tensor, ...]:
        """The dense queue gets one vector an image, the mean over its positions."""
        return key.output, key.dense.mean(dim=1)


@torch.no_grad()
def matched(positions: Tensor, key_positions: Tensor, key_dense: Tensor) -> Tensor:
    """For each of [B, S, C] positions the dense key [B, S, D] where the cosine to the key's features is highest."""
    similarity = nn.functional.normalize(positions, dim=2) @ nn.functional.normalize(key_positions, dim=2).mT
    nearest = similarity.argmax(dim=2, keepdim=True)
    return key_dense.gather(1, nearest.expand(-1, -1, key_dense.shape[2]))
