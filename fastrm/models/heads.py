"""Projection and prediction heads."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(
    dims: tuple[int, ...],
    *,
    bias: bool = True,
    hidden_norm: bool = False,
    last_norm: bool = False,
    gelu: bool = False,
) -> nn.Sequential:
    """Linear layers with ReLU, or GELU, between them.

    Args:
        dims: widths from input to output.
        bias: whether the linear layers have a bias.
        hidden_norm: whether to put BatchNorm before each activation.
        last_norm: whether to put BatchNorm without scale and shift after the last layer (MoCo-v3).
        gelu: GELU instead of ReLU.
    """
    layers: list[nn.Module] = []
    last = len(dims) - 2
    for i, (width_in, width_out) in enumerate(itertools.pairwise(dims)):
        layers.append(nn.Linear(width_in, width_out, bias=bias))
        if i < last:
            if hidden_norm:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(nn.GELU() if gelu else nn.ReLU(inplace=True))
        elif last_norm:
            layers.append(nn.BatchNorm1d(width_out, affine=False))
    return nn.Sequential(*layers)
