"""Memory formats of convolutions on a CPU: what is fast, and what is safe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SMALL = 16
"""Positions of a feature map up to which a convolution is faster in contiguous order.

Forward and backward of ResNet-18's last 3x3 convolution, 512 channels at 2x2, batch 128, on two AVX-512 cores: 84 ms
with channels last and 38 ms without; its first, at 64x64, 72 ms and 104 ms.
"""


def small_maps_contiguous(network: nn.Module, image_size: int) -> None:
    """Let convolutions wider than 1x1 that see small maps compute in contiguous order, and the others as they are.

    Args:
        network: takes images [B, 3, H, W]; on the CPU.
        image_size: side of the images, in pixels.
    """
    areas: dict[nn.Conv2d, int] = {}

    def note(conv: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        areas[conv] = inputs[0].shape[-2] * inputs[0].shape[-1]

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(note) for conv in convolutions]
    was_training = network.training
    network.eval()
    with torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    for conv, area in areas.items():
        if area <= SMALL and max(conv.kernel_size) > 1:
            conv.to(memory_format=torch.contiguous_format)
            conv.register_forward_pre_hook(_contiguous)


def guard_thin_convolutions(network: nn.Module) -> None:
    """Keep some convolutions in contiguous order on CPUs, since oneDNN's code for channels last damages memory there.

    The gradient of a 1x1 convolution with a stride and fewer than 8 input channels is written past its end where the
    stride leaves a rest at the border: seen with torch 2.14 at 32, 64 and 224 pixels, with input or weight channels
    last and not without. RepVGG, FastViT and MobileOne begin with such a layer. To be called again after the network's
    memory format was changed.
    """
    for conv in network.modules():
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or max(conv.stride) == 1:
            continue
        if conv.in_channels // conv.groups < 8:
            # A clone, since to() leaves a 1x1 weight's strides: it is contiguous in both orders.
            conv.weight.data = conv.weight.data.clone(memory_format=torch.contiguous_format)
            if _contiguous_on_cpu not in conv._forward_pre_hooks.values():
                conv.register_forward_pre_hook(_contiguous_on_cpu)


def _contiguous(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(),)


def _contiguous_on_cpu(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(),) if inputs[0].device.type == "cpu" else inputs
