"""Backbones from modules that the user wrote or took from another library."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastrm.errors import UsageError, first_line
from fastrm.machine.memory import exhausted
from fastrm.models.backbone import Backbone, channels_last
from fastrm.models.layout import guard_thin_convolutions

WANTED = "it must return one tensor of floats, [B, D] or [B, D, h, w], for images [B, C, H, W]"
IMAGES = 2
"""Images in the trial pass; two, so that networks that mix up images are detected."""


class ModuleBackbone(Backbone):
    """A module from images to features [B, D], or to a map [B, D, h, w], which is averaged over its positions."""

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to pooled features [B, D]."""
        return self.net(images) if self.map_dim is None else self.encode(images)[0]

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to the feature map [B, D, h, w].

        Raises:
            UsageError: the module has no map.
        """
        if self.map_dim is None:
            raise UsageError(
                f"{module_name(self.net)} returns [B, {self.dim}] and no map; it must return [B, D, h, w] for that"
            )
        features: Tensor = self._mapped(self.net(images))
        return features

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The results of :meth:`forward` and :meth:`forward_features`, in one pass."""
        features = self.forward_features(images)
        return features.mean(dim=(2, 3)), features


def module_name(module: nn.Module) -> str:
    """The name of a module that a run records as ``arch``: its class, changed if timm has a network of that name."""
    name = type(_plain(module)).__name__
    return f"{name}Module" if _known(name) else name


def needs_module(arch: str) -> bool:
    """Whether a run's ``arch`` names the class of a module, so that building the network needs the module."""
    return not _known(arch)


def renew(module: nn.Module) -> None:
    """Reset the weights of all ``torch.nn`` layers by their own initialisation."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
        if type(part).__module__.startswith("torch.nn.") and callable(reset):
            reset()


def _known(arch: str) -> bool:
    import timm

    known: bool = timm.is_model(arch)
    return known


def _plain(module: nn.Module) -> nn.Module:
    """The module inside the wrapper of torch.compile, whose parameters have their plain names."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


def module_backbone(module: nn.Module, *, image_size: int, stem: str, channels: int) -> Backbone:
    """Build a backbone from a copy of a module; see :func:`fastrm.models.build_backbone`."""
    module, name = _plain(module), module_name(module)
    if stem == "small":
        raise UsageError(f"--stem small is for timm's ResNets given by name; arch={name} is a module")
    try:
        net = copy.deepcopy(module)
    except Exception as error:  # its parts may raise errors of any type
        if exhausted(error):
            raise
        raise UsageError(f"arch={name} cannot be copied: {first_line(error)}") from None
    if not all(p.is_leaf for p in net.parameters()):
        raise UsageError(
            f"arch={name} cannot be copied: parameters of its copy are results of a computation, as those of "
            "TorchScript modules are; give the module that it was made from"
        )
    notes = _on_the_host(net, name)
    channels, out = _tried(net, name, image_size, channels)
    frozen = sum(not p.requires_grad for p in net.parameters())
    if not any(p.requires_grad for p in net.parameters()):
        raise UsageError(f"arch={name} has no parameter that requires a gradient: there is nothing to train")
    if frozen:
        notes.append(f"{frozen} of the parameters of {name} require no gradient and stay as they are")
    guard_thin_convolutions(net)
    last = out.ndim == 4 and channels_last(net, out)
    width = out.shape[3 if last else 1]
    attends = out.ndim == 2 and any("attention" in type(part).__name__.lower() for part in net.modules())
    backbone = ModuleBackbone(
        net,
        width,
        width if out.ndim == 4 else None,
        transformer=attends or last,
        channels_last=last,
        channels=channels,
    )
    backbone.notes = notes
    return backbone.train()


def _on_the_host(net: nn.Module, name: str) -> list[str]:
    """Convert the copy to the CPU and to float32, in which weights are trained; a message if the dtype changed."""
    tensors = [*net.parameters(), *net.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise UsageError(f"arch={name} is on the meta device and has no weights; give a module with weights")
    if strange := next((f"{n} in {p.dtype}" for n, p in net.named_parameters() if p.is_complex()), None):
        raise UsageError(
            f"arch={name} has complex parameters ({strange}); they must be real, as torch.view_as_real makes them"
        )
    others = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point() and t.dtype != torch.float}
    net.cpu()
    if not others:
        return []
    net.float()
    return [f"{name} has weights in {' and '.join(sorted(others))}; it is trained in float32 like all networks"]


def _tried(net: nn.Module, name: str, image_size: int, wanted: int) -> tuple[int, Tensor]:
    """The number of channels that a network takes, and its output for random images in evaluation mode.

    The number is taken from the first convolution; without one, ``wanted`` is tried. Only lazy layers
    (``torch.nn.LazyLinear``) are changed: they are initialised.
    """
    first = next((part for part in net.modules() if isinstance(part, nn.Conv2d)), None)
    guess = first.in_channels if first is not None else 0
    faults = []
    # The first layer by name is not always the first that sees images.
    for channels in dict.fromkeys((guess or wanted, wanted, 3)):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(IMAGES, channels, image_size, image_size, generator=generator)
        try:
            return channels, _checked(_once(net, images), name)
        except UsageError:
            raise
        except Exception as error:  # the network may raise errors of any type
            if exhausted(error):
                raise
            faults.append(f"{tuple(images.shape)}: {first_line(error)}")
    raise UsageError(f"arch={name} cannot take images {faults[0]}; --image-size must be one that it takes")


@torch.no_grad()
def _once(net: nn.Module, images: Tensor) -> Any:
    if any(is_lazy(tensor) for tensor in (*net.parameters(), *net.buffers())):
        net.eval()(images)
    trial = copy.deepcopy(net).eval()  # a copy, because the network may store state in calls
    with torch.random.fork_rng(devices=[]):
        return trial(images)


def _checked(out: Any, name: str) -> Tensor:
    if not isinstance(out, Tensor):
        raise UsageError(f"arch={name} returns a {type(out).__name__}; {WANTED}")
    shape = tuple(out.shape)
    if out.ndim not in (2, 4) or not out.is_floating_point() or not out.numel():
        raise UsageError(f"arch={name} returns {out.dtype} {shape} for {IMAGES} images; {WANTED}")
    if shape[0] != IMAGES:
        raise UsageError(f"arch={name} returns {shape} for {IMAGES} images; {WANTED}, with one row per image")
    if not out.isfinite().all():
        raise UsageError(f"arch={name} returns values that are not finite for random images; its weights must be valid")
    return out
