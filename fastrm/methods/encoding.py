"""The outputs of a network for a view, and the result of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrm.errors import UsageError
from fastrm.models import Backbone


@dataclass(frozen=True)
class Encoding:
    """The outputs of a network for one view; the fields are the values of ``--residual-at``."""

    backbone: Tensor
    """Pooled features [B, C]."""
    projector: Tensor
    """Output of the projector [B, D]."""
    output: Tensor
    """Input of the method's loss [B, D]: the output of the predictor if there is one, otherwise of the projector."""


class StepOutput(NamedTuple):
    """The result of one micro-batch."""

    loss: Tensor
    """The loss to minimise, 0-d, with its graph."""
    contrastive: Tensor
    """The method's own loss with all its factors, 0-d, detached."""
    residual: Tensor | None
    """The residual term without its weight, 0-d, detached; None if it is neither trained nor measured."""
    gap: Tensor | None
    """1 - mean cosine between student and teacher output on the same view, 0-d, detached; None if not measured."""
    keys: tuple[Tensor, ...]
    """Keys for each queue, to push after the optimizer step."""
    features: Tensor
    """The student's backbone features of the first view, [B, C], detached, for hooks."""


def checked_loss(method: str, loss: Any, output: Tensor) -> Tensor:
    """A method's own loss, 0-d.

    Raises:
        UsageError: it is no single number, whose sum over the pairs would hide a forgotten mean over the rows; or it is
            not connected to ``output``, the student's, so that only the residual term would train.
    """
    must = f"own_loss of {method} must return one number, a 0-d tensor of floats with its graph"
    if not isinstance(loss, Tensor):
        raise UsageError(f"{must}; it returns a {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise UsageError(f"{must}, such as a mean over the rows; it returns {loss.dtype} {tuple(loss.shape)}")
    if output.requires_grad and not loss.requires_grad and torch.is_grad_enabled():
        raise UsageError(f"{must}; it returns one without, as after detach(), item() or under torch.no_grad")
    return loss.reshape(())


class Encoder(nn.Module):
    """Backbone and projector, the part of the student that is averaged into the teacher."""

    def __init__(self, backbone: Backbone, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, images: Tensor) -> Encoding:
        """Encode images [B, C, H, W]; ``output`` is the output of the projector."""
        pooled = self.backbone(images)
        projection = self.projector(pooled)
        return Encoding(pooled, projection, projection)
