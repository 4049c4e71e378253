"""Networks of timm that transformers has too: ResNet, ConvNeXt, and ViT, which it has as Dinov2.

Dinov2 computes a ViT with a class token whose patches have positions, and layer scales, which are 1 if a ViT has none.
transformers' ViTModel would add a pooler of random weights, and AutoBackbone does not have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastrm.errors import UsageError
from fastrm.exports.base import Subject
from fastrm.exports.check import same
from fastrm.models.weights import misfit, plain_state

_ACTIVATIONS = {
    "ReLU": "relu", "GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu",
}  # fmt: skip


def native(subject: Subject) -> Any:
    """Build the same network in transformers, with its weights, as the class that ``AutoModel`` loads.

    Returns:
        The model, or None if transformers has no network that gives the same features and map.
    """
    kind = type(subject.backbone.net).__name__
    if subject.is_module or kind not in _KINDS:
        return None
    from transformers import AutoModel

    settings, renamed = _KINDS[kind]
    try:
        config = settings(subject)
    except (AttributeError, KeyError, TypeError, ValueError):  # a variant with other parts
        return None
    if config is None:
        return None
    state = renamed(plain_state(subject.backbone), config)
    with torch.random.fork_rng(devices=[]):  # first weights are drawn
        model = AutoModel.from_config(config).eval()
    if misfit(model.state_dict(), state):
        return None
    model.load_state_dict(state)
    try:
        same(subject, called(model), "transformers")
    except UsageError:
        return None
    return model


def called(model: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """The features and the map of a model of transformers."""

    def network(images: Tensor) -> dict[str, Tensor]:
        found = model(images)
        return {"features": found.pooler_output.flatten(1), "map": found.last_hidden_state}

    return network


def as_backbone(model: Any, last: Tensor, images: Tensor) -> Tensor:
    """The map [B, C, h, w] that transformers' backbone of the same network gives.

    Args:
        model: the model.
        last: its ``last_hidden_state``.
        images: the images [B, C, H, W].
    """
    if model.config.model_type == "convnext":  # normalised over the channels, by a weight of 1 and a bias of 0
        return functional.layer_norm(last.permute(0, 2, 3, 1), last.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
    if model.config.model_type == "dinov2":
        grid = [side // model.config.patch_size for side in images.shape[2:]]
        return last[:, 1:].transpose(1, 2).unflatten(2, grid)
    return last


def _activation(module: nn.Module) -> str:
    tanh = getattr(module, "approximate", "none") == "tanh"
    return "gelu_pytorch_tanh" if tanh else _ACTIVATIONS[type(module).__name__]


def _eps(net: nn.Module, kind: type[nn.Module], leave_out: str = "") -> set[Any]:
    return {part.eps for name, part in net.named_modules() if isinstance(part, kind) and name != leave_out}


def _resnet(subject: Subject) -> Any:
    from transformers import ResNetConfig

    net = subject.backbone.net
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    (block,) = {type(block).__name__ for stage in stages for block in stage}
    last = {"BasicBlock": "bn2", "Bottleneck": "bn3"}[block]
    if _eps(net, nn.BatchNorm2d) != {1e-5}:
        return None
    return ResNetConfig(
        num_channels=subject.backbone.channels,
        embedding_size=net.bn1.num_features,
        hidden_sizes=[getattr(stage[-1], last).num_features for stage in stages],
        depths=[len(stage) for stage in stages],
        layer_type={"bn2": "basic", "bn3": "bottleneck"}[last],
        hidden_act=_activation(net.act1),
        downsample_in_bottleneck=False,
    )


def _convnext(subject: Subject) -> Any:
    from transformers import ConvNextConfig

    net = subject.backbone.net
    if _eps(net, nn.LayerNorm, leave_out="head.norm") != {1e-6}:
        return None
    block = net.stages[0].blocks[0]
    return ConvNextConfig(
        num_channels=subject.backbone.channels,
        patch_size=net.stem[0].kernel_size[0],
        num_stages=len(net.stages),
        hidden_sizes=[stage.blocks[-1].conv_dw.out_channels for stage in net.stages],
        depths=[len(stage.blocks) for stage in net.stages],
        hidden_act=_activation(block.mlp.act),
        layer_norm_eps=net.head.norm.eps,
        layer_scale_init_value=0.0 if block.gamma is None else 1e-6,
        image_size=subject.image_size,
    )


def _vit(subject: Subject) -> Any:
    from transformers import Dinov2Config

    net = subject.backbone.net
    block = net.blocks[0]
    ratio, rest = divmod(block.mlp.fc1.out_features, net.embed_dim)
    if rest or len(_eps(net, nn.LayerNorm)) != 1:
        return None
    return Dinov2Config(
        num_channels=subject.backbone.channels,
        image_size=subject.image_size,
        patch_size=net.patch_embed.patch_size[0],
        hidden_size=net.embed_dim,
        num_hidden_layers=len(net.blocks),
        num_attention_heads=block.attn.num_heads,
        mlp_ratio=ratio,
        hidden_act=_activation(block.mlp.act),
        layer_norm_eps=net.norm.eps,
        qkv_bias=block.attn.qkv.bias is not None,
        use_mask_token=False,
    )


def _replaced(name: str, patterns: Mapping[str, str | Callable[[re.Match[str]], str]]) -> str:
    for pattern, by in patterns.items():
        name = re.sub(pattern, by, name)
    return name


def _resnet_state(state: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    patterns: dict[str, Any] = {
        r"^conv1\.": "embedder.embedder.convolution.",
        r"^bn1\.": "embedder.embedder.normalization.",
        r"^layer(\d)\.(\d+)": lambda found: f"encoder.stages.{int(found[1]) - 1}.layers.{found[2]}",
        r"\.conv(\d)\.": lambda found: f".layer.{int(found[1]) - 1}.convolution.",
        r"\.bn(\d)\.": lambda found: f".layer.{int(found[1]) - 1}.normalization.",
        r"\.downsample\.0\.": ".shortcut.convolution.",
        r"\.downsample\.1\.": ".shortcut.normalization.",
    }
    return {_replaced(name, patterns): value for name, value in state.items()}


def _convnext_state(state: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    patterns: dict[str, Any] = {
        r"^stem\.0\.": "embeddings.patch_embeddings.",
        r"^stem\.1\.": "embeddings.layernorm.",
        r"^head\.norm\.": "layernorm.",
        r"^stages\.(\d)\.downsample": r"encoder.stages.\1.downsampling_layer",
        r"^stages\.(\d)\.blocks": r"encoder.stages.\1.layers",
        r"\.conv_dw\.": ".dwconv.",
        r"\.norm\.": ".layernorm.",
        r"\.mlp\.fc(\d)\.": r".pwconv\1.",
        r"\.gamma$": ".layer_scale_parameter",
    }
    # Small networks compute the MLP by 1x1 convolutions.
    flat = {name: value.flatten(1) if ".mlp." in name and value.ndim == 4 else value for name, value in state.items()}
    return {_replaced(name, patterns): value for name, value in flat.items()}


def _vit_state(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    patterns: dict[str, Any] = {
        r"^cls_token$": "embeddings.cls_token",
        r"^pos_embed$": "embeddings.position_embeddings",
        r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
        r"^blocks\.": "encoder.layer.",
        r"^norm\.": "layernorm.",
        r"\.attn\.proj\.": ".attention.o_proj.",
        r"\.ls(\d)\.gamma$": r".layer_scale\1.lambda1",
    }
    renamed = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for part, each in zip("qkv", value.chunk(3), strict=True):
                by = f".attention.{part}_proj."
                renamed[_replaced(name.replace(".attn.qkv.", by), patterns)] = each.contiguous()
        else:
            renamed[_replaced(name, patterns)] = value
    for layer in range(config.num_hidden_layers):
        for number in (1, 2):
            renamed.setdefault(f"encoder.layer.{layer}.layer_scale{number}.lambda1", torch.ones(config.hidden_size))
    return renamed


_KINDS: Mapping[str, tuple[Callable[[Subject], Any], Callable[[dict[str, Tensor], Any], dict[str, Tensor]]]] = {
    "ResNet": (_resnet, _resnet_state),
    "ConvNeXt": (_convnext, _convnext_state),
    "VisionTransformer": (_vit, _vit_state),
}
"""By timm's class: the config of transformers, which is None if the network differs, and the renamed tensors."""
