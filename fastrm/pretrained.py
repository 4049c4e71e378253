"""Trained networks from what a run leaves: its folder, its checkpoint, or a file with a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrm import own
from fastrm.data import Source, open_source
from fastrm.data.formats import RGB, PixelFormat
from fastrm.errors import UsageError
from fastrm.files import at_home
from fastrm.methods import Method, build_method
from fastrm.models import Backbone, untrained
from fastrm.models.layout import lay_out
from fastrm.models.module import module_name
from fastrm.models.published import Published, describes_itself, published
from fastrm.models.starting import on_a_hub, starting_weights
from fastrm.models.weights import backbone_of, metadata, pixels_of, read_backbone
from fastrm.run import checkpoint
from fastrm.settings.config import check_choice, check_path, check_value, from_flat
from fastrm.settings.of_run import OfRunAndImages

NETWORKS = ("student", "teacher")
WEIGHTS = "weights"
"""What a network is called that no run of fastrm trained."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What can be scored or exported.

    Attributes:
        path: where it came from.
        networks: ``student`` and ``teacher``; of an exported file only the one that it holds; ``weights`` of others.
        about: of the networks in general, as :func:`fastrm.models.weights.metadata` has it.
        arch: what the networks are built of: timm's name, or a module.
        settings: of the run, if it is one, by name: what ``config.json`` holds.
        step: optimizer steps that the run has made.
        state: of the run's method, by name.
        pixels: what the values of pictures mean to the networks.
        license: of weights of others, as their publisher calls it.
        said: how much of weights of others was taken.
    """

    path: Path
    networks: dict[str, Backbone]
    about: dict[str, str]
    arch: str | nn.Module
    settings: Mapping[str, Any] | None = None
    step: int | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    pixels: PixelFormat = RGB
    license: str | None = None
    said: str = ""

    @property
    def folder(self) -> Path:
        """Where what is found out about it belongs."""
        if on_a_hub(self.path):
            return Path()
        return self.path if self.path.is_dir() else self.path.parent

    def network(self, which: str, flag: str) -> Backbone:
        """The student's or the teacher's backbone, or that of weights of others.

        Raises:
            UsageError: the file does not hold it.
        """
        found = self.networks.get(WEIGHTS) or self.networks.get(which)
        if found is None:
            raise UsageError(f"{flag}: {self.path} holds the {', '.join(self.networks)} only")
        return found

    @property
    def image_size(self) -> int:
        """Side of the images that it was trained on, in pixels."""
        return int(self.about["image_size"])

    def untrained(self) -> Backbone:
        """The same backbone with new weights, on the CPU, and without what a run does to it for speed.

        Of a module those are new that belong to layers of ``torch.nn``; others are as they were given.
        """
        size, channels = self.image_size, self.pixels.channels
        return untrained(self.arch, image_size=size, stem=self.about["stem"], channels=channels)

    def start(self) -> tuple[Backbone | None, str]:
        """The backbone as a run that starts from weights began, or why that cannot be had; empty if it did not."""
        given = (self.settings or {}).get("init_from")
        if given is None:
            return None, ""
        backbone = self.untrained()
        try:
            state, _ = starting_weights(backbone, Path(given), partial=True)
        except UsageError as error:
            return None, str(error)
        backbone.net.load_state_dict(state, strict=False)
        return backbone, ""

    def images(self, options: OfRunAndImages) -> Source:
        """Open the images that ``options`` name, or those of the run.

        Columns that are not given are those of the run only if the images are its own.

        Raises:
            UsageError: no images are named, or they cannot be opened.
        """
        run = self.settings or {}
        columns = {} if options.data else run
        data = options.data or self.about.get("data", "")
        if not data:
            raise UsageError("--data is missing; give the images")
        return open_source(
            data,
            options.data_root or run.get("data_root"),
            image_column=options.image_column or columns.get("image_column"),
            label_column=options.label_column or columns.get("label_column"),
        )

    def method(self, device: torch.device) -> Method[Any]:
        """Student and teacher with their heads, on a device.

        Raises:
            UsageError: the run's method is not known here.
        """
        assert self.settings is not None
        module = self.arch if isinstance(self.arch, nn.Module) else None
        method = build_method(
            from_flat(self.settings), device=device, trained=False, channels=self.pixels.channels, arch=module
        )
        with checkpoint.fitting(self.path):
            method.load_state_dict(self.state)
        return method


def read_pretrained(
    path: Path,
    *,
    arch: nn.Module | str | None = None,
    image_size: int | None = None,
    networks: Sequence[str] = NETWORKS,
) -> Pretrained:
    """Rebuild the networks of a run folder, a checkpoint, a file with a backbone, or weights of others, on the CPU.

    Args:
        path: what fastrm wrote; or what ``--init-from`` takes.
        arch: where a module of the user's was trained, another one that is built alike; its weights do not matter. Of
            weights of others timm's name of the network, where they do not say it.
        image_size: for weights of others: :func:`fastrm.models.published.published`.
        networks: which of a run's are wanted; a file holds one.

    Raises:
        UsageError: it is missing, damaged, or of another layout; or ``arch`` is missing, or is another network.
    """
    if isinstance(arch, str) or image_size is not None or describes_itself(path):
        if isinstance(arch, nn.Module):
            raise UsageError(f"{path} is not of {module_name(arch)}; arch and image_size say of what network it is")
        return _of_others(path, published(path, arch=arch, image_size=image_size))
    if path.is_file() and (path.suffix == ".safetensors" or (path.suffix == ".pth" and own.safely(own.state, path))):
        backbone, about = read_backbone(path, arch=arch)
        found = {about["which"]: backbone}
        return Pretrained(
            path=path,
            networks=found,
            about=about,
            arch=about["arch"] if arch is None else arch,
            pixels=pixels_of(about, path),
        )
    state = checkpoint.load(path)
    settings, tensors = state["config"], state["method"]
    with checkpoint.fitting(path):
        pixels = PixelFormat.of(state.get("pixels"))
        about = metadata(settings, "student", pixels)
        check_value("image_size", settings["image_size"])
        parts = {which: _part(tensors, f"{which}.backbone.net.") for which in networks}
    found = {which: backbone_of(part, about, path, arch=arch) for which, part in parts.items()}
    return Pretrained(
        path=path,
        networks=found,
        about=about,
        arch=about["arch"] if arch is None else arch,
        settings=settings,
        step=state["step"],
        state=tensors,
        pixels=pixels,
    )


def _of_others(path: Path, found: Published) -> Pretrained:
    known = {"arch": found.arch, "stem": found.stem, "image_size": found.image_size, "method": "", "data": ""}
    return Pretrained(
        path=path,
        networks={WEIGHTS: found.backbone},
        about=metadata(known, WEIGHTS, found.pixels),
        arch=found.arch,
        pixels=found.pixels,
        license=found.license,
        said=found.said,
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def open_pretrained(
    path: Path, device: torch.device, *, arch: nn.Module | str | None = None, image_size: int | None = None
) -> Pretrained:
    """Rebuild the networks as :func:`read_pretrained` does, on a device, and laid out for it as the run's were."""
    trained = read_pretrained(path, arch=arch, image_size=image_size)
    settings = trained.settings or {"channels_last": False}
    small_maps = device.type == "cpu" and settings.get("precision", "auto") in ("auto", "fp32")
    for backbone in trained.networks.values():
        backbone.to(device)
        if settings.get("channels_last", True):
            lay_out(backbone, [backbone] if small_maps else [], trained.image_size)
    return trained


def load(
    run_or_file: str | Path,
    which: str = "student",
    *,
    arch: nn.Module | str | None = None,
    image_size: int | None = None,
) -> Backbone:
    """Load a trained backbone, ready to use.

    Args:
        run_or_file: a run folder, of which the newest checkpoint is taken; a checkpoint; or a file of safetensors with
            a backbone, as runs leave it and ``python -m fastrm.export`` writes it; or weights of others, as
            ``--init-from`` takes them (``"timm:resnet50.a1_in1k"``).
        which: ``"student"`` or ``"teacher"``, of what a run left.
        arch: where a module of yours was trained: another one that is built alike, of which a copy gets the weights. Of
            weights of others timm's name of the network, where they do not say it.
        image_size: side of the images in pixels, of weights of others; None: what timm publishes.

    Returns:
        A module on the CPU, in evaluation mode. For normalised images [B, C, H, W], ``model(images)`` gives pooled
        features [B, D], and ``model.feature_map(images)`` a feature per position, [B, D, h, w]; of a ViT these are its
        patch tokens. ``model.forward_features(images)`` gives the last layer's output as timm does.

    Raises:
        UsageError: there is nothing to load, it does not hold that network, or it is of a module that ``arch`` is not.
    """
    check_choice("which", which, NETWORKS)
    check_path("run_or_file", run_or_file)
    path = Path(at_home(run_or_file))
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, which the file's take the place of
        found = read_pretrained(path, arch=arch, image_size=image_size, networks=[which])
    return found.network(which, f"which={which!r}").eval()
