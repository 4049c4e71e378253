"""The base class of methods whose own loss is InfoNCE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastrm.kernels import info_nce, residual_info_nce
from fastrm.machine.distributed import gather_rows
from fastrm.methods.base import Encoding, Method
from fastrm.settings.config import MethodConfig

FEW = 128
"""Batch size below which a warning says that negatives are few; our own value: published batches have 4,096 images."""


class Contrastive(Method[Encoding]):
    """InfoNCE between the student's output and the teacher's, times ``scale``.

    The negatives are the direction's queue or, in methods without queues, the other keys in the batches of all
    processes. A residual term on the output is computed in the same pass over the keys.
    """

    def __init__(self, encoder: nn.Module, config: MethodConfig, *, scale: float = 1.0, **options: Any) -> None:
        super().__init__(encoder, config, **options)
        self.temperature, self.scale = config.temperature, scale

    def cautions(self, batch: int, images: int) -> Iterator[str]:
        """As in :class:`Method`, and a warning if the negatives come from a small batch."""
        yield from super().cautions(batch, images)
        if not self.queues and batch < FEW:
            yield (
                f"each image has only the {batch - 1} others of its batch as negatives; --method {self.name} was "
                f"published with thousands, and for small sets --batch-size {FEW} or more is enough"
            )

    def own_loss(self, direction: int, student: Encoding, key: Encoding) -> Tensor:
        """InfoNCE, scaled."""
        keys, queue, offset = self._candidates(direction, key)
        return self.scale * info_nce(
            student.output, keys, queue, temperature=self.temperature, key_offset=offset, backend=self.backend
        )

    def direction(
        self, d: int, student: Encoding, key: Encoding, same: Encoding | None, residual_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As in :class:`Method`; both terms are one operation if the residual term is on the output."""
        if same is None or not self.trains_residual or self.residual_at != "output":
            return super().direction(d, student, key, same, residual_weight)
        keys, queue, offset = self._candidates(d, key)
        loss, contrastive, residual = residual_info_nce(
            student.output,
            keys,
            same.output,
            queue,
            temperature=self.temperature,
            residual_weight=residual_weight,
            contrastive_weight=self.scale,
            key_offset=offset,
            backend=self.backend,
        )
        return loss, self.scale * contrastive, residual

    def _candidates(self, direction: int, key: Encoding) -> tuple[Tensor, Tensor | None, int]:
        """Keys, queue, and the row of the first query's positive among the keys."""
        queue: Any = self.queues[direction].features if self.queues else None
        keys, offset = (key.output, 0) if queue is not None else gather_rows(key.output)
        return keys, queue, offset
