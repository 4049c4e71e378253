"""ResNets for Detectron2 and MMDetection.

Names of Detectron2's tensors: ``detectron2/modeling/backbone/resnet.py`` and ``tools/convert-torchvision-to-d2.py`` of
https://github.com/facebookresearch/detectron2. MMDetection's ResNet (``mmdet/models/backbones/resnet.py`` of
https://github.com/open-mmlab/mmdetection) has torchvision's names.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrm import own
from fastrm.errors import UsageError
from fastrm.exports.base import Loaded, Subject, Target, write_state
from fastrm.files import write_whole
from fastrm.models.weights import misfit, plain_state

_DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101, "resnet152": 152}


def _refuse(subject: Subject, kind: str) -> None:
    """Raise a UsageError unless the network is a ResNet of 18 to 152 layers with its usual stem, for any channels."""
    import torchvision

    if subject.name not in _DEPTHS:
        raise UsageError(f"--format {kind} holds {', '.join(_DEPTHS)} only, and this network is {subject.name}")
    with torch.device("meta"):
        state = torchvision.models.get_model(subject.name).state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    state["conv1.weight"] = state["conv1.weight"][:, :1].expand(-1, subject.backbone.channels, -1, -1)
    if problem := misfit(state, subject.backbone.net.state_dict()):
        raise UsageError(
            f"--format {kind} cannot hold this {subject.name}: {problem}; for example, only --format safetensors and "
            "onnx hold a small stem"
        )


def detectron2_name(name: str) -> str:
    """The name that a tensor of torchvision's ResNet has in Detectron2."""
    stage = re.match(r"layer(\d)\.", name)
    name = f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def _write_detectron2(subject: Subject, out: Path) -> None:
    """Write a pickle of arrays, in the layout of Detectron2's model zoo."""
    state = plain_state(subject.backbone)
    # Its frozen BatchNorm, which is the default, has no counter.
    tensors = {detectron2_name(n): value.numpy() for n, value in state.items() if not n.endswith("num_batches_tracked")}
    content = {"__author__": own.MARK, "about": subject.about, "matching_heuristics": True, "model": tensors}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda partial: partial.write_bytes(pickle.dumps(content, protocol=4)))


def _settings(subject: Subject, out: str) -> dict[str, Any]:
    """Settings of Detectron2 by their names in its config, for values of pixels from 0 to 255."""
    pixels = subject.pixels
    rescaled = {"MEAN": pixels.mean, "STD": pixels.std}
    basic = {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64} if _DEPTHS[subject.name] < 50 else {}
    return {
        "MODEL.WEIGHTS": out,
        "MODEL.RESNETS.DEPTH": _DEPTHS[subject.name],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        **basic,
        **{f"MODEL.PIXEL_{name}": [round(255 * value, 4) for value in each] for name, each in rescaled.items()},
        "INPUT.FORMAT": "RGB",
    }


def _loading_detectron2(subject: Subject, out: Path) -> str:
    """Code that changes a config of Detectron2."""
    pairs = [each for pair in _settings(subject, out.name).items() for each in pair]
    return f"cfg.merge_from_list({pairs!r})"


def _load_detectron2(subject: Subject, out: Path) -> Loaded:
    """Build Detectron2's ResNet, and load the file with its checkpointer."""
    from detectron2.checkpoint import DetectionCheckpointer  # type: ignore[import-not-found]
    from detectron2.config import get_cfg  # type: ignore[import-not-found]
    from detectron2.modeling import build_backbone  # type: ignore[import-not-found]

    cfg = get_cfg()
    settings = {**_settings(subject, str(out)), "MODEL.BACKBONE.NAME": "build_resnet_backbone"}
    settings |= {"MODEL.RESNETS.OUT_FEATURES": ["res5"], "MODEL.DEVICE": "cpu"}
    cfg.merge_from_list([each for pair in settings.items() for each in pair])
    net = build_backbone(cfg)
    DetectionCheckpointer(net).load(str(out))
    net.eval()
    return Loaded(lambda images: _outputs(net(images)["res5"]))


def _loading_mmdet(subject: Subject, out: Path) -> str:
    """The backbone of a config of MMDetection."""
    channels = "" if subject.backbone.channels == 3 else f", in_channels={subject.backbone.channels}"
    return (
        f'backbone = dict(type="ResNet", depth={_DEPTHS[subject.name]}{channels}, '
        f'init_cfg=dict(type="Pretrained", checkpoint="{out.name}"))'
    )


def _load_mmdet(subject: Subject, out: Path) -> Loaded:
    """Build MMDetection's ResNet, and load the file as its configs do."""
    from mmdet.models.backbones import ResNet  # type: ignore[import-not-found]

    start = {"type": "Pretrained", "checkpoint": str(out)}
    net = ResNet(_DEPTHS[subject.name], in_channels=subject.backbone.channels, init_cfg=start)
    net.init_weights()
    net.eval()
    return Loaded(lambda images: _outputs(net(images)[-1]))


def _outputs(found: Tensor) -> dict[str, Tensor]:
    return {"features": found.mean(dim=(2, 3)), "map": found}


DETECTRON2 = Target(
    (".pkl",),
    lambda subject: _refuse(subject, "detectron2"),
    _write_detectron2,
    _loading_detectron2,
    "detectron2",
    _load_detectron2,
)
MMDET = Target((".pth",), lambda subject: _refuse(subject, "mmdet"), write_state, _loading_mmdet, "mmdet", _load_mmdet)
