"""timm's image backbones, with the changes that small images and MoCo-v3's ViTs need."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrm.errors import UsageError, first_line
from fastrm.machine.memory import exhausted
from fastrm.models.layout import guard_thin_convolutions
from fastrm.models.vit import is_vit, prepare_moco_vit, sincos_positions
from fastrm.settings.config import check_choice

__all__ = ["Backbone", "build_backbone", "sincos_positions"]


class Backbone(nn.Module):
    """A timm model without its classifier, giving pooled features and, where there is one, their map.

    Attributes:
        net: the timm model; its ``state_dict`` is what other programs load.
        dim: width of the pooled features.
        map_dim: channels of the last feature map, or None where timm gives no [B, C, H, W] map (transformers).
        grid_dim: channels of the map of a transformer that gives [B, H, W, C] (Swin), or None.
        options: what ``timm.create_model`` was given besides ``num_classes=0``.
        notes: what of the wish could not be done, and why, a sentence each.
    """

    def __init__(self, net: nn.Module, dim: int, map_dim: int | None, grid_dim: int | None = None) -> None:
        super().__init__()
        self.net: Any = net
        self.dim = dim
        self.map_dim = map_dim
        self.grid_dim = grid_dim
        self.options: dict[str, Any] = {}
        self.notes: list[str] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        """[B, 3, H, W] images to pooled features [B, dim] and the last layer's output before pooling.

        The latter is [B, C, H, W] where ``map_dim`` or ``grid_dim`` is set, and else as timm gives it.
        """
        features = self.net.forward_features(images)
        pooled: Tensor = self.net.forward_head(features, pre_logits=True)
        return pooled.flatten(1), features.permute(0, 3, 1, 2) if self.grid_dim else features


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
    options = _options(arch, image_size)
    with _refusing(arch, f"cannot be built for --image-size {image_size}"):
        net = timm.create_model(arch, pretrained=False, num_classes=0, **options)
    if stem == "small" and not _is_resnet(net):
        raise UsageError(f"--stem small is for ResNets; --arch {arch} has no such stem")
    if _is_resnet(net) and (stem == "small" or (stem == "auto" and image_size <= 64)):
        _shrink_stem(net)
    guard_thin_convolutions(net)
    left_out: list[str] = []
    if moco_vit and is_vit(net):
        with _refusing(arch, "cannot be prepared as MoCo-v3 prepares ViTs"):
            left_out = prepare_moco_vit(net)
    with _refusing(arch, f"cannot take --image-size {image_size}"):
        features, pooled = _encoded(net, image_size)
    backbone = Backbone(net, *_widths(net, arch, features, pooled))
    backbone.options = options
    backbone.notes = [f"of MoCo-v3's changes to a ViT one is left out for {arch}: {reason}" for reason in left_out]
    return backbone


def _options(arch: str, image_size: int) -> dict[str, Any]:
    """What timm needs to make a network of this name take this size."""
    import timm

    names = timm.list_models()
    if arch not in names:
        plain = arch.rpartition("/")[2].rpartition(":")[2].partition(".")[0]
        if plain in names:
            raise UsageError(f"--arch {arch} names published weights; the network alone is {plain}")
        near = difflib.get_close_matches(plain.lower(), names, n=4)
        raise UsageError(
            f"--arch {arch} is not a timm model; "
            + (f"near it: {', '.join(near)}" if near else "see timm.list_models()")
        )
    published = _published(arch)
    return {"img_size": image_size} if published is not None and published.fixed_input_size else {}


def _published(arch: str) -> Any:
    """What timm knows of its own weights for a network; None where it has none."""
    import timm

    return timm.models.get_pretrained_cfg(arch, allow_unregistered=True)


@contextmanager
def _refusing(arch: str, what: str) -> Iterator[None]:
    """Say in one line what a network cannot do, whatever kind of exception timm's families happen to raise."""
    try:
        yield
    except Exception as error:
        if exhausted(error):
            raise
        published = _published(arch)
        size = "" if published is None else f"; timm's own size for it is {published.input_size[-1]}"
        raise UsageError(f"--arch {arch} {what}: {first_line(error)}{size}") from None


def _is_resnet(net: Any) -> bool:
    return type(net).__name__ == "ResNet"


def _shrink_stem(net: Any) -> None:
    net.conv1 = nn.Conv2d(3, net.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()


def _encoded(net: Any, image_size: int) -> tuple[Any, Any]:
    """Features before and behind the pooling, of one picture."""
    net.eval()
    with torch.no_grad():
        features = net.forward_features(torch.zeros(1, 3, image_size, image_size))
        pooled = net.forward_head(features, pre_logits=True)
    net.train()
    return features, pooled


def _widths(net: Any, arch: str, features: Any, pooled: Any) -> tuple[int, int | None, int | None]:
    """Widths of the pooled features and of the map, read off what came out rather than off each model's attributes."""
    if not isinstance(pooled, Tensor) or pooled.shape[2:].numel() != 1:
        shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise UsageError(f"--arch {arch} gives features of shape {shape}; it must be an image classifier")
    width = pooled.shape[1]
    if not isinstance(features, Tensor) or features.ndim != 4:  # tokens [B, N, C], or several tensors
        return width, None, None
    # timm's transformers give [B, H, W, C], some of them; those that do not say so are known by their width.
    channels = getattr(net, "num_features", None)
    last = features.shape[3] == channels != features.shape[1]
    if last or str(getattr(net, "output_fmt", "NCHW")) == "NHWC":
        return width, None, features.shape[3]
    return width, features.shape[1], None
