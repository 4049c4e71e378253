"""Backbones: timm's families, the small stem, MoCo-v3's ViT, and errors that help."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from fastrm.errors import UsageError
from fastrm.methods import find
from fastrm.models import build_backbone
from fastrm.models.layout import guard_thin_convolutions, small_maps_contiguous
from fastrm.models.vit import is_vit, prepare_moco_vit, sincos_positions


@pytest.mark.parametrize(
    ("arch", "size", "convolutional"),
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
def test_families_of_timm(arch: str, size: int, convolutional: bool) -> None:
    backbone = build_backbone(arch, image_size=size)
    find("mocov3").prepare(backbone, arch)
    images = torch.randn(2, 3, size, size)
    pooled, features = backbone.eval().encode(images)
    assert pooled.shape == (2, backbone.dim)
    assert torch.equal(backbone(images), pooled)
    assert torch.equal(backbone.forward_features(images), features)
    assert backbone.transformer != convolutional
    assert (backbone.map_dim is None) == arch.endswith(("vit_tiny_patch16_224", "test_vit"))
    if backbone.map_dim is not None:
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


@pytest.mark.parametrize("channels", [1, 3, 4, 8, 13])
@pytest.mark.parametrize(
    ("arch", "stem"),
    [("test_resnet", "imagenet"), ("test_resnet", "small"), ("test_convnext", "auto"), ("test_vit", "auto")],
)
def test_images_of_any_number_of_channels(arch: str, stem: str, channels: int) -> None:
    torch.manual_seed(1)
    backbone = build_backbone(arch, image_size=32, stem=stem, channels=channels)
    assert backbone.channels == channels
    assert backbone.options.get("in_chans", 3) == channels
    if stem != "small":
        torch.manual_seed(1)
        theirs = timm.create_model(arch, num_classes=0, **{**backbone.options, "in_chans": channels}).state_dict()
        assert list(theirs) == list(ours := backbone.net.state_dict())
        assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    images = torch.randn(2, channels, 32, 32, requires_grad=True)
    backbone.eval()(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum(dim=(0, 2, 3)) > 0).all()  # every band has an effect on the features
    if arch == "test_vit":
        find("mocov3").prepare(backbone, arch)
        assert not backbone.notes
        assert not backbone.net.patch_embed.proj.weight.requires_grad


def test_channels_that_a_network_cannot_take_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(arch: str, **options: Any) -> Any:
        raise TypeError(f"unexpected keyword {', '.join(options)}")

    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(
        UsageError, match=r"^--arch test_vit cannot be built for --image-size 32 and 8 channels: .*in_chans"
    ):
        build_backbone("test_vit", image_size=32, channels=8)


def test_weights_load_strictly_into_timm() -> None:
    net = build_backbone("resnet18", image_size=224).net
    timm.create_model("resnet18", num_classes=0).load_state_dict(net.state_dict(), strict=True)


def test_last_norm_of_each_residual_block_starts_at_zero() -> None:
    net = build_backbone("resnet50", image_size=224).net
    assert all(bool((block.bn3.weight == 0).all()) for layer in (net.layer1, net.layer4) for block in layer)


def fixed(arch: str, **options: Any) -> tuple[Any, set[str], list[str]]:
    """The timm network of ``arch`` prepared for MoCo-v3, the names of its frozen parameters, and the new notes."""
    backbone = build_backbone(arch, image_size=64, **options)
    before = len(backbone.notes)
    find("mocov3").prepare(backbone, arch)
    frozen = {n for n, p in backbone.net.named_parameters() if not p.requires_grad}
    return backbone.net, frozen, backbone.notes[before:]


def test_moco_vit_has_fixed_positions_and_a_frozen_projection() -> None:
    net, frozen, notes = fixed("vit_tiny_patch16_224")
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not notes
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert 0.95 * bound < net.patch_embed.proj.weight.abs().max() <= bound
    assert (net.pos_embed[0, 0] == 0).all()
    plain = build_backbone("vit_tiny_patch16_224", image_size=64).net
    assert all(p.requires_grad for p in plain.parameters())


PROJECTION = {"patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize(
    ("arch", "frozen", "left_out"),
    [
        ("test_vit2", {"pos_embed", *PROJECTION}, ()),  # registers, and no position for the class token
        ("vit_dwee_patch16_reg1_gap_256", {"pos_embed", *PROJECTION}, ()),  # no class token
        ("vit_tiny_r_s16_p8_224", {"pos_embed"}, ("its stem is not a patch projection",)),
        ("vit_relpos_base_patch32_plus_rpn_256", PROJECTION, ("no table of absolute positions",)),
        ("deit_tiny_distilled_patch16_224", {"pos_embed", *PROJECTION}, ()),  # two tokens before the patches
        ("resnet10t", set(), ()),
        ("swin_tiny_patch4_window7_224", set(), ()),
    ],
)
def test_each_vit_gets_the_parts_of_moco_v3_that_it_can_have(
    arch: str, frozen: set[str], left_out: tuple[str, ...]
) -> None:
    net, found, notes = fixed(arch)
    assert found == frozen
    assert len(notes) == len(left_out)
    assert all(reason in note and arch in note for reason, note in zip(left_out, notes, strict=True))
    if "pos_embed" in found:
        rows, columns = net.patch_embed.grid_size
        codes = sincos_positions(rows, columns, net.embed_dim)
        torch.testing.assert_close(net.pos_embed[0, -rows * columns :], codes)
        assert not net.pos_embed[0, : -rows * columns].any()


def test_a_projection_without_bias_and_positions_on_a_grid() -> None:
    class Flexible(nn.Module):
        """A small ViT that is built like NaFlexViT: a projection without bias, and positions on a grid."""

        def __init__(self) -> None:
            super().__init__()
            self.embed_dim = 8
            self.embeds = nn.Module()
            self.embeds.proj = nn.Conv2d(3, 8, 4, 4, bias=False)
            self.embeds.pos_embed = nn.Parameter(torch.ones(1, 3, 5, 8))
            self.embeds.cls_token = None
            block = nn.Module()
            block.attn = nn.Linear(8, 8)
            self.blocks = nn.Sequential(block)

    net = Flexible()
    assert is_vit(net)
    assert prepare_moco_vit(net) == []
    torch.testing.assert_close(net.embeds.pos_embed[0], sincos_positions(3, 5, 8).view(3, 5, 8))
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {"embeds.proj.weight", "embeds.pos_embed"}


def test_sincos_positions_against_the_formula() -> None:
    codes = sincos_positions(3, 5, 8).double().numpy()
    for row in range(3):
        for column in range(5):
            angles = [at * 10000.0 ** (-4 * i / 8) for at in (column, row) for i in range(2)]
            want = [*np.sin(angles[:2]), *np.cos(angles[:2]), *np.sin(angles[2:]), *np.cos(angles[2:])]
            np.testing.assert_allclose(codes[row * 5 + column], want, atol=1e-6)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--arch resnet51 is not a timm model; similar names: .*resnet50"):
        build_backbone("resnet51", image_size=64)


def test_an_image_size_that_does_not_fit_is_reported() -> None:
    with pytest.raises(UsageError, match=r"--arch vit_tiny_patch16_224 cannot .*--image-size 8"):
        build_backbone("vit_tiny_patch16_224", image_size=8)


@pytest.mark.parametrize("name", ["resnet50.a1_in1k", "timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.ram_in1k"])
def test_a_name_of_published_weights_suggests_the_name_of_the_network(name: str) -> None:
    with pytest.raises(UsageError, match=f"--arch {re.escape(name)} names published weights; .* is resnet50$"):
        build_backbone(name, image_size=64)


class Odd(nn.Module):
    """A network that fails, or returns the given features and pooled features."""

    def __init__(self, features: Any, pooled: Any = None, error: Exception | None = None) -> None:
        super().__init__()
        self.features, self.pooled, self.error = features, pooled, error
        self.num_features = 6

    def forward_features(self, images: torch.Tensor) -> Any:
        if self.error:
            raise self.error
        return self.features

    def forward_head(self, features: Any, pre_logits: bool) -> Any:
        return self.pooled


@pytest.mark.parametrize(
    "error", [KeyError("x"), IndexError(), AttributeError("no"), ZeroDivisionError("division")], ids=str
)
def test_any_error_of_a_network_becomes_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Odd(None, error=error))
    with pytest.raises(
        UsageError, match=r"^--arch test_vit cannot take --image-size 32: .+; timm's own size for it is"
    ):
        build_backbone("test_vit", image_size=32)

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", broken)
    with pytest.raises(UsageError, match=r"^--arch test_vit cannot be built for --image-size 32: .+"):
        build_backbone("test_vit", image_size=32)


@pytest.mark.parametrize(
    ("features", "pooled", "found"),
    [
        (torch.zeros(1, 6, 2, 2), torch.zeros(1, 6), (6, 6, False)),
        (torch.zeros(1, 2, 2, 6), torch.zeros(1, 6), (6, 6, True)),  # [B, H, W, C] without an attribute that says so
        (torch.zeros(1, 6, 6, 6), torch.zeros(1, 6, 1, 1), (6, 6, False)),
        (torch.zeros(1, 5, 6), torch.zeros(1, 6), (6, None, True)),
        ([torch.zeros(1, 6, 2, 2), torch.zeros(1, 6, 1, 1)], torch.zeros(1, 6), (6, None, True)),
        ({"x": torch.zeros(1, 6, 2, 2)}, torch.zeros(1, 6), (6, None, True)),
        (torch.zeros(1, 5, 6), torch.zeros(1, 5, 6), None),
        (torch.zeros(1, 6, 2, 2), (torch.zeros(1, 6), torch.zeros(1, 6)), None),
    ],
)
def test_output_shapes_are_detected_or_refused(
    features: Any, pooled: Any, found: tuple[int | None, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Odd(features, pooled))
    if found is None:
        with pytest.raises(UsageError, match="must be an image classifier"):
            build_backbone("test_vit", image_size=32)
    else:
        backbone = build_backbone("test_vit", image_size=32)
        assert (backbone.dim, backbone.map_dim, backbone.transformer) == found
        assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 6)


def test_contiguous_convolutions_of_small_maps_give_the_same_features() -> None:
    plain = build_backbone("resnet18", image_size=64, stem="imagenet").eval().to(memory_format=torch.channels_last)
    mixed = copy.deepcopy(plain)
    small_maps_contiguous(mixed, 64)
    layers = dict(mixed.net.named_modules())
    wide = {name: m.weight for name, m in layers.items() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)}
    # An image of 64 pixels gives maps of 4x4 from the second convolution of layer3 on. Everything before, and the 1x1
    # shortcuts, stay channels-last.
    for name, weight in wide.items():
        small = name.startswith("layer4") or (name.startswith("layer3") and name != "layer3.0.conv1")
        assert weight.is_contiguous() == small, name
        assert weight.is_contiguous(memory_format=torch.channels_last) != small, name
    images = torch.randn(2, 3, 64, 64)
    for mine, other in zip(mixed.encode(images), plain.encode(images), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not mixed.training


def test_convolutions_that_would_damage_memory_are_contiguous() -> None:
    """A thin convolution gets contiguous inputs and weights, also in a copy and after a change of memory format."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1, 2), nn.Conv2d(16, 4, 1, 2), nn.Conv2d(4, 8, 3, 2), nn.Conv2d(8, 8, 1, 1))
    guard_thin_convolutions(net)
    net = copy.deepcopy(net).to(memory_format=torch.channels_last)
    guard_thin_convolutions(net)
    assert [len(layer._forward_pre_hooks) for layer in net] == [1, 0, 0, 0]
    assert net[0].weight.stride() == (3, 1, 1, 1)
    seen = []
    net[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    net(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert seen == [True]


@pytest.mark.slow
def test_a_network_with_a_thin_convolution_can_be_trained() -> None:
    """Training runs in a process of its own, because damaged memory would end it."""
    program = """
import torch
from fastrm.settings.config import build
from fastrm.methods import build_method
small = {"hidden_dim": 16, "output_dim": 16, "queue_size": 32, "image_size": 32, "batch_size": 4}
for _ in range(2):
    build_method(build(data="digits", arch="fastvit_t8", method="mocov2", **small))
print("sound")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "sound\n", done.stderr
