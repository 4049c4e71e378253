"""The momentum methods: one file each, with networks, loss, published settings, augmentation and linear protocol."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastrm.errors import UsageError, first_line
from fastrm.machine.device import choose_queue_dtype
from fastrm.machine.distributed import world
from fastrm.machine.memory import exhausted
from fastrm.methods.base import Encoder, Encoding, Method, StepOutput
from fastrm.methods.contrastive import Contrastive

from fastrm.methods.mocov3 import MoCoV3  # isort: skip (in the order of names(), whose first is the default)
from fastrm.methods.mocov2 import MoCoV2  # isort: skip
from fastrm.methods.byol import BYOL  # isort: skip
from fastrm.methods.densecl import DenseCL  # isort: skip
from fastrm.methods.dino import DINO  # isort: skip
from fastrm.methods.multicrop import Size
from fastrm.methods.protocol import LinearProtocol
from fastrm.methods.registry import find, names, recipes, register
from fastrm.methods.unused import counted, freeze_unused
from fastrm.models import Backbone, build_backbone, mlp, module_name
from fastrm.models.layout import lay_out
from fastrm.models.named import disable_drop_path, refusing
from fastrm.models.starting import starting_weights
from fastrm.models.synchronised import synchronise_norms
from fastrm.settings.config import Config, ModelConfig, check_value

__all__ = [
    "BYOL",
    "DINO",
    "Contrastive",
    "DenseCL",
    "Encoder",
    "Encoding",
    "LinearProtocol",
    "Method",
    "MoCoV2",
    "MoCoV3",
    "StepOutput",
    "build_method",
    "find",
    "mlp",
    "names",
    "recipes",
    "register",
]


def build_method(
    config: Config,
    *,
    device: torch.device | None = None,
    precision: str = "fp32",
    backend: str | None = None,
    trained: bool = True,
    channels: int = 3,
    arch: nn.Module | None = None,
    kind: type[Method[Any]] | None = None,
    sizes: Collection[Size] = (),
) -> Method[Any]:
    """Build a method with an untrained backbone, heads and queues from a run's settings, on a device.

    Args:
        config: settings of the run.
        device: device of the method; None means the CPU.
        precision: precision of its layers, ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        backend: backend of fastrm.kernels; None chooses by device.
        trained: whether the method will be trained. If so, it loads the weights that the settings name, freezes
            parameters without a gradient, which one pass over random images finds, and synchronises BatchNorm between
            processes, except for methods with queues.
        channels: channels of the images.
        arch: a module to use as the backbone instead of the network in the settings; it is copied, see
            :func:`fastrm.models.build_backbone`.
        kind: the method to use instead of the one in the settings.
        sizes: height and width of each view; empty if all have the image size.

    Raises:
        UsageError: there is no such backbone, it does not fit the image size, the stem or the method, or a name is
            unknown.
    """
    kind = find(config.method.method if kind is None else kind)
    check_value("residual_at", config.method.residual_at)
    device = device or torch.device("cpu")
    size, name = config.input.image_size, config.model.arch if arch is None else module_name(arch)
    wanted = config.model.arch if arch is None else arch
    others = set(sizes) - {(size, size)}
    backbone = build_backbone(
        wanted,
        image_size=size,
        stem=config.model.stem,
        channels=channels,
        drop_path=config.model.drop_path if trained else 0.0,
        other_sizes=bool(others),
    )
    _check_sizes(backbone, name, others)
    trainable = {name for name, p in backbone.net.named_parameters() if p.requires_grad}
    with refusing(name, f"cannot be prepared for --method {kind.name}"):
        kind.prepare(backbone, name)
    held = trainable - {name for name, p in backbone.net.named_parameters() if p.requires_grad}
    method: Method[Any] = kind(backbone, config.method, backend=backend).to(device)
    if config.model.drop_path:
        disable_drop_path(method.teacher)
    method.queues.to(choose_queue_dtype(config.method.queue_dtype, device))
    layout = torch.contiguous_format
    if config.device.channels_last:
        layout = torch.channels_last
        small_maps = device.type == "cpu" and precision == "fp32"
        with _trying(name, kind.name, size):
            lay_out(method, (method.student.backbone, method.teacher.backbone) if small_maps else (), size)
    method.notes = list(backbone.notes)
    if trained:
        if config.device.checkpoint_activations:
            method.student.backbone.checkpoint_activations()
        _start(method, config.model, held)
        _freeze(method, config, layout, name)
        if not method.queues:
            synchronise_norms(method)
    return method


def _check_sizes(backbone: Backbone, arch: str, sizes: Iterable[Size]) -> None:
    """Raise a UsageError for sizes of views that the network cannot take; many transformers take one size only."""
    for height, width in sizes:
        trial = copy.deepcopy(backbone).eval()
        with refusing(arch, f"cannot take views of {height}x{width} pixels"), torch.no_grad():
            trial(torch.zeros(1, backbone.channels, height, width))


def _start(method: Method[Any], config: ModelConfig, held: Set[str]) -> None:
    """Load the starting weights of the backbone, if there are any.

    Parameters that the method froze at its own values (``held``), such as a ViT's patch projection in MoCo-v3, are
    trained if the weights replace them.
    """
    if config.init_from is not None:
        backbone = method.student.backbone
        state, said = starting_weights(backbone, config.init_from, partial=config.init_partial)
        for network in (method.student, method.teacher):
            network.backbone.net.load_state_dict(state, strict=False)
        for name in held & state.keys():
            backbone.net.get_parameter(name).requires_grad_(True)
        method.notes.append(f"the backbone starts from {said}")


@contextmanager
def _trying(arch: str, method: str, size: int, images: str = "") -> Iterator[None]:
    """Raise any error of the network in this context as a UsageError of one line."""
    try:
        yield
    except Exception as error:
        if exhausted(error):
            raise
        order = "; --no-channels-last keeps maps in the order that view takes" if "view size" in str(error) else ""
        raise UsageError(
            f"--arch {arch} cannot be trained with --method {method} at --image-size {size}{images}: "
            f"{first_line(error)}{order}"
        ) from None


def _freeze(method: Method[Any], config: Config, layout: torch.memory_format, arch: str) -> None:
    """Run one training pass, and freeze the parameters that its loss does not reach."""
    name, size = method.name, config.input.image_size
    batch = (config.input.batch_size or 256) // (world().size * config.optim.accumulate)
    # Two images are enough. If the steps have one image, the pass has one too, so that BatchNorm fails now; a BatchNorm
    # that is synchronised between processes gets two.
    together = world().size > 1 and not method.queues
    with _trying(arch, name, size, f", {batch} images per process and micro-batch"):
        unused = freeze_unused(method, images=2 if together else max(1, min(2, batch)), image_size=size, layout=layout)
    if not any(p.requires_grad for p in method.student.backbone.parameters()):
        raise UsageError(
            f"--arch {arch} cannot be trained with --method {name}: the loss does not reach any of its parameters; its "
            "forward must not detach its output, nor run under torch.no_grad"
        )
    if unused:
        method.notes.append(f"the loss of {name} does not reach {counted(unused)} of {arch}, which stay as they are")
