"""Backbones by timm's name, with the changes for small images."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrm.errors import UsageError, first_line
from fastrm.machine.memory import exhausted
from fastrm.models.backbone import Backbone, channels_last
from fastrm.models.layout import guard_thin_convolutions


def named_backbone(
    arch: str, *, image_size: int, stem: str, channels: int, drop_path: float = 0.0, other_sizes: bool = False
) -> Backbone:
    """Build an untrained backbone by timm's name; see :func:`fastrm.models.build_backbone`."""
    import timm

    options = _options(arch, image_size, channels)
    training: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    if other_sizes and "img_size" in options:
        training["dynamic_img_size"] = True
    images = f"--image-size {image_size}" + (f" and {channels} channels" if channels != 3 else "")
    with refusing(arch, f"cannot be built for {images}"):
        net = timm.create_model(arch, pretrained=False, num_classes=0, **options, **training)
    if stem == "small" and not _is_resnet(net):
        raise UsageError(f"--stem small is for ResNets; --arch {arch} has no such stem")
    small = _is_resnet(net) and (stem == "small" or (stem == "auto" and image_size <= 64))
    if small:
        _shrink_stem(net, channels)
    guard_thin_convolutions(net)
    with refusing(arch, f"cannot take {images}"):
        features, pooled = _encoded(net, image_size, channels)
    backbone = _measured(net, arch, features, pooled)
    backbone.channels = channels
    backbone.options = options
    if small:
        backbone.notes.append(
            f"{arch} gets a small stem (3x3 at stride 1, no max-pool), unlike timm's and torchvision's own networks: "
            "it can be exported to safetensors and ONNX only; --stem imagenet can be exported to all formats"
        )
    return backbone


def _options(arch: str, image_size: int, channels: int) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` for this image size and number of channels."""
    import timm

    names = timm.list_models()
    if arch not in names:
        plain = arch.rpartition("/")[2].rpartition(":")[2].partition(".")[0]
        if plain in names:
            raise UsageError(f"--arch {arch} names published weights; the network alone is {plain}")
        near = difflib.get_close_matches(plain.lower(), names, n=4)
        raise UsageError(
            f"--arch {arch} is not a timm model; "
            + (f"similar names: {', '.join(near)}" if near else "see timm.list_models()")
        )
    published = _published(arch)
    size = {"img_size": image_size} if published is not None and published.fixed_input_size else {}
    return size | ({"in_chans": channels} if channels != 3 else {})  # some networks of timm have no such option


def _published(arch: str) -> Any:
    """timm's configuration of its weights for a network; None if it has no weights."""
    import timm

    return timm.models.get_pretrained_cfg(arch, allow_unregistered=True)


@contextmanager
def refusing(arch: str, what: str) -> Iterator[None]:
    """Raise any error in this context as a UsageError of one line, which says that ``arch`` ``what``."""
    try:
        yield
    except Exception as error:
        if exhausted(error):
            raise
        published = _published(arch)
        size = "" if published is None else f"; timm's own size for it is {published.input_size[-1]}"
        raise UsageError(f"--arch {arch} {what}: {first_line(error)}{size}") from None


def disable_drop_path(network: nn.Module) -> None:
    """Turn off the stochastic depth of a timm network."""
    from timm.layers import DropPath

    for part in network.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0


def _is_resnet(net: Any) -> bool:
    return type(net).__name__ == "ResNet"


def _shrink_stem(net: Any, channels: int) -> None:
    net.conv1 = nn.Conv2d(channels, net.bn1.num_features, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()


def _encoded(net: Any, image_size: int, channels: int) -> tuple[Any, Any]:
    """Features of one image before and after the pooling."""
    net.eval()
    with torch.no_grad():
        features = net.forward_features(torch.zeros(1, channels, image_size, image_size))
        pooled = net.forward_head(features, pre_logits=True)
    net.train()
    return features, pooled


def _measured(net: Any, arch: str, features: Any, pooled: Any) -> Backbone:
    """Build a backbone with the widths of its features and map, which are read from these outputs."""
    if not isinstance(pooled, Tensor) or pooled.shape[2:].numel() != 1:
        shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise UsageError(f"--arch {arch} returns features of shape {shape}; it must be an image classifier")
    width = pooled.shape[1]
    if not isinstance(features, Tensor) or features.ndim != 4:  # tokens [B, N, C], or several tensors
        return Backbone(net, width, None, transformer=True)
    last = channels_last(net, features)  # some of timm's transformers return [B, H, W, C]
    return Backbone(net, width, features.shape[3 if last else 1], transformer=last, channels_last=last)
