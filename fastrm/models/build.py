"""Builds a backbone from a name or a module."""

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
    """Build a backbone: an untrained timm network, or a copy of a module with its weights.

    The copy of a module is on the CPU and in float32; the module itself is not changed. The width of its features is
    found by a pass over two random images in evaluation mode, which changes neither buffers nor torch's random state.

    Args:
        arch: timm's name of a network; or a module from images [B, C, H, W] to features [B, D], or to a map
            [B, D, h, w], which is averaged over its positions. Parameters that require no gradient stay unchanged. A
            module with attention and without a map counts as a transformer. C is taken from the module's first
            convolution, whatever ``channels`` is.
        image_size: side of the images in pixels; up to 64, ``stem="auto"`` gives timm's ResNets a small stem.
        stem: ``"auto"``, ``"imagenet"`` or ``"small"`` (3×3 at stride 1, no max-pool; timm's ResNets only).
        channels: channels C of the images (timm's ``in_chans``).
        drop_path: rate of stochastic depth at the last block in training (timm's ``drop_path_rate``).
        other_sizes: whether the network must also take images of other sizes. If so, a timm network with a position
            embedding per patch, such as a ViT, resamples the embeddings in each forward pass.

    Raises:
        UsageError: timm has no such model; the network cannot take this image size, stem or number of channels, or
            has no stochastic depth; or the module cannot be copied, has another output, or has no trainable parameter.
    """
    check_value("stem", stem)
    if isinstance(arch, str):
        return named_backbone(
            arch, image_size=image_size, stem=stem, channels=channels, drop_path=drop_path, other_sizes=other_sizes
        )
    if not isinstance(arch, nn.Module):
        raise UsageError(f"arch={arch!r:.80} must be the name of a timm network, or a torch.nn.Module")
    if drop_path:
        raise UsageError(
            f"--drop-path {drop_path:g} is for timm networks given by name; arch={module_name(arch)} is a module"
        )
    return module_backbone(arch, image_size=image_size, stem=stem, channels=channels)


def untrained(arch: str | nn.Module, *, image_size: int, stem: str = "auto", channels: int = 3) -> Backbone:
    """The same backbone with random weights from a fixed seed, on the CPU.

    In a module, only the weights of ``torch.nn`` layers are drawn again; others stay as given.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would change the GPUs' generators too
        backbone = build_backbone(arch, image_size=image_size, stem=stem, channels=channels)
        if isinstance(arch, nn.Module):
            renew(backbone)
    return backbone
