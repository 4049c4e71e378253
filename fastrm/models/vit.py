"""What MoCo-v3 does to a ViT (Chen et al., arXiv 2104.02057, section 4), as far as a network has the parts."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn


def is_vit(net: Any) -> bool:
    """Whether a timm model is a ViT: patches become tokens once, and blocks with attention keep their number and width.

    Those that merge tokens on the way (Swin, Hiera, MViT) are not: what MoCo-v3 found for ViTs was not shown for them.
    """
    blocks = getattr(net, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not isinstance(getattr(net, "embed_dim", None), int):
        return False
    return hasattr(_embedding(net), "proj") and any(_has_attention(block) for block in blocks)


def patch_size(arch: str | nn.Module) -> int | None:
    """Side of the patches in pixels, of a module from its embedding and of a name of timm's from the name; or None."""
    if isinstance(arch, str):
        found = re.search(r"(?:patch|_p)(\d+)", arch)
        return int(found[1]) if found else None
    size = getattr(_embedding(arch), "patch_size", None)
    size = size[0] if isinstance(size, tuple | list) and size else size
    return size if isinstance(size, int) else None


def prepare_moco_vit(net: Any, channels: int = 3) -> list[str]:
    """Give a ViT Xavier-uniform weights, a frozen random patch projection and fixed sin-cos positions.

    What the network does not have is left out: a convolutional stem is trained, as MoCo-v3 trains it, and so are
    positions of other kinds.

    Args:
        net: the network.
        channels: of the images that it takes.

    Returns:
        What was left out and why, a phrase each.
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
    """Where the class token and the positions are: NaFlexViT keeps them in its embedding."""
    return net if hasattr(net, "patch_embed") else _embedding(net)


def _has_attention(block: nn.Module) -> bool:
    return any("attn" in name for name, _ in block.named_modules())


def _xavier(linear: nn.Linear, *, thirds: bool = False) -> None:
    fan_out, fan_in = linear.weight.shape
    if thirds:  # three matrices in one tensor
        fan_out //= 3
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def _freeze_projection(net: Any, channels: int) -> str | None:
    """Freeze the layer from pixels to tokens at random values; why not, where it is not one projection."""
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
    """Freeze absolute positions at sin-cos codes; why not, where there are none of that form."""
    positions = getattr(_tokens(net), "pos_embed", None)
    if not isinstance(positions, nn.Parameter):
        return "it has no table of absolute positions to fix"
    width = positions.shape[-1]
    if width % 4:
        return f"its positions are {width} wide, no multiple of 4, and are trained"
    if positions.ndim == 4:  # [1, rows, columns, width]
        rows, columns = positions.shape[1:3]
        patches = positions.view(rows * columns, width)
    else:  # [1, tokens, width]; the class token and registers, where they have a place, come first and keep 0
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

    A quarter each: sin and cos of the column, sin and cos of the row, at frequencies 10000^(-4i/dim).
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = (axis.reshape(-1, 1) * frequency for axis in (columns, rows))
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
