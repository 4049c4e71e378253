"""A backbone of whatever ``arch`` is."""

from __future__ import annotations

import torch
from torch import nn

from fastrm.errors import UsageError
from fastrm.models.backbone import Backbone
from fastrm.models.module import module_backbone, module_name, renew
from fastrm.models.named import named_backbone
from fastrm.settings.config import check_value


def build_backbone(
    arch: str | nn.Module,
    *,
    image_size: int,
    stem: str = "auto",
    channels: int = 3,
    drop_path: float = 0.0,
    other_sizes: bool = False,
) -> Backbone:
    """Build a backbone: an untrained network of timm's, or a copy of a module.

    A module is copied, never changed, and keeps its weights. The copy is on the CPU and in float32. Its width is found
    by a pass over two random images in evaluation mode, which changes neither buffers nor torch's random state.

    Args:
        arch: timm's name of a network; or a module from images [B, C, H, W] to features [B, D], or to a map
            [B, D, h, w], whose mean over the positions are the features. Parameters that require no gradient stay as
            they are. One with attention that gives no map counts as a transformer. C is that of its first convolution,
            whatever ``channels`` says.
        image_size: side of the images in pixels; at 64 and below ``stem="auto"`` gives timm's ResNets a small stem.
        stem: ``"auto"``, ``"imagenet"`` or ``"small"`` (3×3 at stride 1, no max-pool; timm's ResNets only).
        channels: C of the images; what timm calls ``in_chans``.
        drop_path: rate of stochastic depth at the last block, in training; what timm calls ``drop_path_rate``.
        other_sizes: whether it is to take images of other sizes too. A network of timm's with a place for each patch,
            such as a ViT, then resamples its positions as it computes.

    Raises:
        UsageError: timm has no such model; the network cannot take this image size, stem or number of channels, or
            has no stochastic depth; or the module cannot be copied, gives something else, or has nothing to train.
    """
    check_value("stem", stem)
    if isinstance(arch, str):
        return named_backbone(
            arch, image_size=image_size, stem=stem, channels=channels, drop_path=drop_path, other_sizes=other_sizes
        )
    if not isinstance(arch, nn.Module):
        raise UsageError(f"arch={arch!r:.80} must be the name of a network of timm's, or a torch.nn.Module")
    if drop_path:
        raise UsageError(
            f"--drop-path {drop_path:g} is for timm's networks by name; arch={module_name(arch)} is a module"
        )
    return module_backbone(arch, image_size=image_size, stem=stem, channels=channels)


def untrained(arch: str | nn.Module, *, image_size: int, stem: str = "auto", channels: int = 3) -> Backbone:
    """The same backbone with weights that have learned nothing, from a seed of its own, on the CPU.

    Of a module those are new that belong to layers of ``torch.nn``; others are as they were given.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would change the GPUs' generators too
        backbone = build_backbone(arch, image_size=image_size, stem=stem, channels=channels)
        if isinstance(arch, nn.Module):
            renew(backbone)
    return backbone
