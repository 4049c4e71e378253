"""Backbones: timm's families, the small stem, MoCo-v3's ViT, and errors that help."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fastrm.errors import UsageError
from fastrm.models import build_backbone
from fastrm.models.backbone import sincos_positions
from fastrm.models.layout import small_maps_contiguous


@pytest.mark.parametrize(
    ("arch", "size", "has_map"),
    [
        ("resnet10t", 32, True),
        ("convnext_atto", 64, True),
        ("efficientnet_b0", 64, True),
        ("mobilenetv3_small_050", 64, True),
        ("vit_tiny_patch16_224", 64, False),
        ("test_vit", 48, False),
        ("swin_tiny_patch4_window7_224", 64, False),
    ],
)
def test_families_of_timm(arch: str, size: int, has_map: bool) -> None:
    backbone = build_backbone(arch, image_size=size, moco_vit=True)
    pooled, features = backbone(torch.randn(2, 3, size, size))
    assert pooled.shape == (2, backbone.dim)
    assert (backbone.map_dim is not None) == has_map
    if has_map:
        assert features.shape[1] == backbone.map_dim
        assert features.ndim == 4


def test_small_images_get_the_small_stem() -> None:
    small, large = build_backbone("resnet18", image_size=64).net, build_backbone("resnet18", image_size=65).net
    assert (small.conv1.kernel_size, small.conv1.stride, type(small.maxpool)) == ((3, 3), (1, 1), nn.Identity)
    assert (large.conv1.kernel_size, large.conv1.stride, type(large.maxpool)) == ((7, 7), (2, 2), nn.MaxPool2d)
    kept = build_backbone("resnet18", image_size=32, stem="imagenet").net
    assert kept.conv1.kernel_size == (7, 7)
    with pytest.raises(UsageError, match="--stem small is for ResNets"):
        build_backbone("convnext_atto", image_size=64, stem="small")


def test_weights_load_strictly_into_timm() -> None:
    net = build_backbone("resnet18", image_size=224).net
    timm.create_model("resnet18", num_classes=0).load_state_dict(net.state_dict(), strict=True)


def test_last_norm_of_each_residual_block_starts_at_zero() -> None:
    net = build_backbone("resnet50", image_size=224).net
    assert all(bool((block.bn3.weight == 0).all()) for layer in (net.layer1, net.layer4) for block in layer)


def test_moco_vit_has_fixed_positions_and_a_frozen_projection() -> None:
    net = build_backbone("vit_tiny_patch16_224", image_size=64, moco_vit=True).net
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert 0.95 * bound < net.patch_embed.proj.weight.abs().max() <= bound
    assert (net.pos_embed[0, 0] == 0).all()
    plain = build_backbone("vit_tiny_patch16_224", image_size=64).net
    assert all(p.requires_grad for p in plain.parameters())


def test_sincos_positions_against_the_formula() -> None:
    codes = sincos_positions(3, 5, 8).double().numpy()
    for row in range(3):
        for column in range(5):
            angles = [at * 10000.0 ** (-4 * i / 8) for at in (column, row) for i in range(2)]
            want = [*np.sin(angles[:2]), *np.cos(angles[:2]), *np.sin(angles[2:]), *np.cos(angles[2:])]
            np.testing.assert_allclose(codes[row * 5 + column], want, atol=1e-6)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--arch resnet51 is not a timm model; near it: .*resnet50"):
        build_backbone("resnet51", image_size=64)


def test_a_size_that_does_not_fit_is_said() -> None:
    with pytest.raises(UsageError, match=r"--arch vit_tiny_patch16_224 cannot .*--image-size 8"):
        build_backbone("vit_tiny_patch16_224", image_size=8)


def test_convolutions_of_small_maps_are_contiguous_and_give_the_same() -> None:
    plain = build_backbone("resnet18", image_size=64, stem="imagenet").eval().to(memory_format=torch.channels_last)
    mixed = copy.deepcopy(plain)
    small_maps_contiguous(mixed, 64)
    layers = dict(mixed.net.named_modules())
    wide = {name: m.weight for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}
    # 64 pixels leave maps of 4x4 before the last stage; its shortcut and all before stay as they were.
    for name, weight in wide.items():
        small = name.startswith("layer4") or (name.startswith("layer3") and name != "layer3.0.conv1")
        assert weight.is_contiguous() == small, name
        assert weight.is_contiguous(memory_format=torch.channels_last) != small, name
    images = torch.randn(2, 3, 64, 64)
    for mine, other in zip(mixed(images), plain(images), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not mixed.training
