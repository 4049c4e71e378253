"""Measures of a collapse of the features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastrm.machine.device import in_double

ROWS = 256  # enough rows to detect a collapse; their rank takes milliseconds
LEAST_ROWS = 8
LEAST_STD = 0.02
LEAST_RANK = 1.5


def _directions(features: Tensor) -> Tensor:
    return nn.functional.normalize(features[:ROWS].float(), dim=1)


@torch.no_grad()
def feature_std(features: Tensor) -> Tensor:
    """Spread of the normalised features, 0-d: 0 if all are equal, about 1 if they are spread over all directions.

    The mean over the channels of the standard deviation over the images, times the root of the number of channels
    (Chen and He, arXiv 2011.10566, section 4.1).

    Args:
        features: [B, C].
    """
    rows = _directions(features)
    return rows.std(dim=0, correction=0).mean() * math.sqrt(rows.shape[1])


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Number of directions that the centred features use, 0-d: the exponential of the entropy of the singular values,
    divided by their sum (Roy and Vetterli, EUSIPCO 2007).

    Args:
        features: [B, C]; at most 256 rows are used, so the rank is below 256.
    """
    rows = in_double(_directions(features))
    rows = rows - rows.mean(dim=0)
    gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    gram = gram.nan_to_num(0.0)  # the step itself handles values that are not finite
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-300)
    return (-(share * share.clamp_min(1e-300).log()).sum()).exp()


def collapsed(std: float, rank: float, rows: int) -> str | None:
    """A warning for the user; None if nothing is wrong, or if the batch is too small to judge."""
    if rows < LEAST_ROWS or math.isnan(std) or (std >= LEAST_STD and rank >= LEAST_RANK):
        return None
    return (
        f"the features of all images are nearly the same (spread {std:.2g}, effective rank {rank:.2g}): the network "
        "has collapsed. A lower --lr, a longer --warmup-epochs or a higher --teacher-momentum may help"
    )
