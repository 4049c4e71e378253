"""timm's image backbones, with the changes that small images and MoCo-v3's ViTs need."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrm.config import check_choice
from fastrm.errors import UsageError


class Backbone(nn.Module):
    """A timm model without its classifier, giving pooled features and, for convolutional networks, their map.

    Attributes:
        net: the timm model; its ``state_dict`` is what other programs load.
        dim: width of the pooled features.
        map_dim: channels of the last feature map, or None where there is no [B, C, H, W] map (transformers).
    """

    def __init__(self, net: nn.Module, dim: int, map_dim: int | None) -> None:
        super().__init__()
        self.net: Any = net
        self.dim = dim
        self.map_dim = map_dim

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] images to pooled features [B, dim] and the last layer's output before pooling."""
        features: Tensor = self.net.forward_features(images)
        pooled: Tensor = self.net.forward_head(features, pre_logits=True)
        return pooled, features


def build_backbone(arch: str, *, image_size: int, stem: str = "auto", moco_vit: bool = False) -> Backbone:
    """Build an untrained timm backbone.

    Args:
        arch: timm's name of it.
        image_size: side of the images in pixels; at 64 and below ``stem="auto"`` gives ResNets a small stem.
        stem: ``"auto"``, ``"imagenet"`` or ``"small"`` (3×3 at stride 1, no max-pool; ResNets only).
        moco_vit: give a ViT what MoCo-v3 trains it with (Chen et al., arXiv 2104.02057, section 4): fixed sin-cos
            positions, a frozen random patch projection, Xavier-uniform weights.

    Raises:
        UsageError: timm has no such model, or it cannot take this image size or stem.
    """
    import timm

    check_choice("stem", stem)
    if arch not in timm.list_models():
        near = difflib.get_close_matches(arch, timm.list_models(), n=4)
        raise UsageError(
            f"--arch {arch} is not a timm model; "
            + (f"near it: {', '.join(near)}" if near else "see timm.list_models()")
        )
    pretrained = timm.models.get_pretrained_cfg(arch, allow_unregistered=True)
    fixed_size = pretrained is not None and pretrained.fixed_input_size
    sized = {"img_size": image_size} if fixed_size else {}
    try:
        net = timm.create_model(arch, pretrained=False, num_classes=0, **sized)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"--arch {arch} cannot be built for --image-size {image_size}: {error}") from None
    if stem == "small" and not _is_resnet(net):
        raise UsageError(f"--stem small is for ResNets; --arch {arch} has no such stem")
    if _is_resnet(net) and (stem == "small" or (stem == "auto" and image_size <= 64)):
        _shrink_stem(net)
    if moco_vit and type(net).__name__ == "VisionTransformer":
        _prepare_moco_vit(net)
    return Backbone(net, *_measure(net, arch, image_size))


def _is_resnet(net: Any) -> bool:
    return type(net).__name__ == "ResNet"


def _shrink_stem(net: Any) -> None:
    net.conv1 = nn.Conv2d(3, net.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()


def _measure(net: Any, arch: str, image_size: int) -> tuple[int, int | None]:
    """Widths of the pooled features and of the map, read off one picture rather than off each model's attributes."""
    net.eval()
    try:
        with torch.no_grad():
            features = net.forward_features(torch.zeros(1, 3, image_size, image_size))
            pooled = net.forward_head(features, pre_logits=True)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"--arch {arch} cannot take --image-size {image_size}: {str(error).splitlines()[0]}") from None
    net.train()
    if pooled.ndim != 2:
        raise UsageError(f"--arch {arch} gives features of shape {tuple(pooled.shape)}; it must be an image classifier")
    # timm's transformers give [B, tokens, C], some of them [B, H, W, C].
    is_map = features.ndim == 4 and str(getattr(net, "output_fmt", "NCHW")) == "NCHW"
    return pooled.shape[1], features.shape[1] if is_map else None


def _prepare_moco_vit(net: Any) -> None:
    patch = net.patch_embed
    grid_height, grid_width = patch.grid_size
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            if name.endswith("qkv"):  # three matrices in one tensor
                fan_out //= 3
            bound = math.sqrt(6 / (fan_in + fan_out))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(net.cls_token, std=1e-6)
    bound = math.sqrt(6 / (3 * math.prod(patch.patch_size) + net.embed_dim))
    nn.init.uniform_(patch.proj.weight, -bound, bound)
    nn.init.zeros_(patch.proj.bias)
    patch.proj.requires_grad_(False)
    with torch.no_grad():
        net.pos_embed.zero_()
        # The class token, where there is one, comes first and keeps the position 0.
        net.pos_embed[0, -grid_height * grid_width :] = sincos_positions(grid_height, grid_width, net.embed_dim)
    net.pos_embed.requires_grad_(False)


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Two-dimensional sin-cos position codes [height * width, dim]; ``dim`` must be a multiple of 4.

    A quarter each: sin and cos of the column, sin and cos of the row, at frequencies 10000^(-4i/dim).
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = (axis.reshape(-1, 1) * frequency for axis in (columns, rows))
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)
