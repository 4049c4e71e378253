"""MoCo-v3's changes to a ViT (Chen et al., arXiv 2104.02057, section 4)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn


def is_vit(net: Any) -> bool:
    """Whether a timm model is a ViT, whose blocks with attention keep the number and width of the tokens.

    Models that merge tokens (Swin, Hiera, MViT) are not, since MoCo-v3's findings for ViTs were not shown for them.
    """
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not isinstance(getattr(net, "embed_dim", None), int):
        return False
    return hasattr(_embedding(net), "proj") and any(_has_attention(block) for block in blocks)


def patch_size(arch: str | nn.Module) -> int | None:
    """Side of the patches in pixels, from a module's embedding or from a timm name; None if unknown."""
    if isinstance(arch, str):
        found = re.search(r"(?:patch|_p)(\d+)", arch)
        return int(found[1]) if found else None
    size = getattr(_embedding(arch), "patch_size", None)
    size = size[0] if isinstance(size, tuple | list) and size else size
    return size if isinstance(size, int) else None


def prepare_moco_vit(net: Any, channels: int = 3) -> list[str]:
    """Give a ViT Xavier-uniform weights, a frozen random patch projection and fixed sin-cos positions.

    Changes that do not apply are left out: a convolutional stem is trained, as in MoCo-v3, and so are positions of
    other kinds.

    Args:
        net: the network.
        channels: channels of its input images.

    Returns:
        The changes that were left out, one phrase with the reason each.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            _xavier(module, thirds=name.endswith("qkv"))
    if isinstance(token := getattr(_tokens(net), "cls_token", None), nn.Parameter):
        nn.init.normal_(token, std=1e-6)
    return [problem for problem in (_freeze_projection(net, channels), _fix_positions(net)) if problem]


def _embedding(net: Any) -> Any:
    return getattr(net, "patch_embed", None) or getattr(net, "embeds", None)


def _tokens(net: Any) -> Any:
    """The module with the class token and the positions, which is the embedding in NaFlexViT."""
    return net if hasattr(net, "patch_embed") else _embedding(net)


def _has_attention(block: nn.Module) -> bool:
    return any("attn" in name for name, _ in block.named_modules())


def _xavier(linear: nn.Linear, *, thirds: bool = False) -> None:
    fan_out, fan_in = linear.weight.shape
    if thirds:  # query, key and value in one tensor
        fan_out //= 3
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _freeze_projection(net: Any, channels: int) -> str | None:
    """Freeze the patch projection at random values; the reason if it is not a single projection."""
    projection = _embedding(net).proj
    patches = isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride
    if not (patches or isinstance(projection, nn.Linear)) or (patches and projection.in_channels != channels):
        return "its stem is not a patch projection, and is trained"
    fan_in = projection.weight[0].numel()
    bound = math.sqrt(6 / (fan_in + len(projection.weight)))
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)
    return None


def _fix_positions(net: Any) -> str | None:
    """Freeze absolute positions at sin-cos codes; the reason if there are none of that form."""
    positions = getattr(_tokens(net), "pos_embed", None)
    if not isinstance(positions, nn.Parameter):
        return "it has no table of absolute positions to fix"
    width = positions.shape[-1]
    if width % 4:
        return f"its positions are {width} wide, which is not a multiple of 4, and are trained"
    if positions.ndim == 4:  # [1, rows, columns, width]
        rows, columns = positions.shape[1:3]
        patches = positions.view(rows * columns, width)
    else:  # [1, tokens, width]; class and register tokens come first, if they have positions, and keep 0
        rows, columns = getattr(_embedding(net), "grid_size", (0, 0))
        tokens, prefix = positions.shape[1], getattr(net, "num_prefix_tokens", 1)
        if rows * columns not in (tokens, tokens - prefix):
            return f"its {tokens} positions are not a grid of {rows} by {columns} and are trained"
        patches = positions[0, -rows * columns :]
    with torch.no_grad():
        positions.zero_()
        patches.copy_(sincos_positions(rows, columns, width))
    positions.requires_grad_(False)
    return None


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Two-dimensional sin-cos position codes [height * width, dim]; ``dim`` must be a multiple of 4.

    The quarters are sin and cos of the column, and sin and cos of the row, at frequencies 10000^(-4i/dim).
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = (axis.reshape(-1, 1) * frequency for axis in (columns, rows))
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
