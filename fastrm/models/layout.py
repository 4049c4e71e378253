"""Chooses memory formats of convolutions on a CPU that are fast and safe."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastrm.models.backbone import Backbone

SMALL = 16
"""Positions of a feature map up to which a convolution is faster in contiguous order.

Measured on two AVX-512 cores with a batch of 128, forward and backward: ResNet-18's last 3x3 convolution (512 channels
at 2x2) takes 84 ms with channels last and 38 ms without; its first one (at 64x64) takes 72 ms and 104 ms.
"""


def lay_out(module: nn.Module, small_maps: Iterable[Backbone], image_size: int) -> None:
    """Convert a module to channels-last order, except for layers that are faster or safer in contiguous order.

    Args:
        module: a backbone or a module with backbones, on its device.
        small_maps: those of its backbones that compute on a CPU in float32.
        image_size: side of the images, in pixels.
    """
    module.to(memory_format=torch.channels_last)
    guard_thin_convolutions(module)
    for backbone in small_maps:
        small_maps_contiguous(backbone, image_size)


def small_maps_contiguous(network: Backbone, image_size: int) -> None:
    """Let convolutions larger than 1x1 on small feature maps compute in contiguous order; leave the others.

    Args:
        network: a backbone on the CPU.
        image_size: side of the images, in pixels.
    """
    areas: dict[str, int] = {}
    trial = copy.deepcopy(network).eval()  # a copy, because user modules may store state in each call

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        if inputs:
            areas[name] = inputs[0].shape[-2] * inputs[0].shape[-1]

    for name, module in trial.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial(torch.zeros(1, network.channels, image_size, image_size))
    for name, area in areas.items():
        conv: Any = network.get_submodule(name)
        if area <= SMALL and max(conv.kernel_size) > 1:
            conv.to(memory_format=torch.contiguous_format)
            conv.register_forward_pre_hook(_contiguous)


def guard_thin_convolutions(network: nn.Module) -> None:
    """Keep some convolutions in contiguous order on CPUs, because oneDNN's channels-last code corrupts memory there.

    For a strided 1x1 convolution with fewer than 8 input channels, oneDNN writes the gradient beyond its end if the
    stride does not divide the image. This was seen with torch 2.14 at 32, 64 and 224 pixels if input or weight are
    channels last, and never otherwise. RepVGG, FastViT and MobileOne begin with such a layer. Call this again after a
    change of the network's memory format.
    """
    for conv in network.modules():
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or max(conv.stride) == 1:
            continue
        if conv.in_channels // conv.groups < 8:
            # clone(), because to() keeps the strides of a 1x1 weight, which is contiguous in both orders.
            conv.weight.data = conv.weight.data.clone(memory_format=torch.contiguous_format)
            if _contiguous_on_cpu not in conv._forward_pre_hooks.values():
                conv.register_forward_pre_hook(_contiguous_on_cpu)


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(),)


def _contiguous_on_cpu(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(),) if inputs[0].device.type == "cpu" else inputs
