"""Loads trained networks from a run folder, a checkpoint, a file with a backbone, or published weights."""

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
from fastrm.data.opening import everywhere
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
"""Name of a network that was not trained by fastrm."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Trained networks, with information about them, for scores and exports.

    Attributes:
        path: the path they were loaded from.
        networks: ``student`` and ``teacher``, only one of them for an exported file, or ``weights`` for
            published weights.
        about: metadata of the networks, as in :func:`fastrm.models.weights.metadata`.
        arch: timm's name of the network, or a module.
        settings: settings of the run by name, as in ``config.json``, if it is a run.
        step: optimizer steps of the run so far.
        state: state dict of the run's method.
        pixels: pixel format of the images.
        license: license of published weights, as their publisher names it.
        said: description of how much of published weights was loaded.
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
        """The folder for results about it."""
        if on_a_hub(self.path):
            return Path()
        return self.path if self.path.is_dir() else self.path.parent

    def network(self, which: str, flag: str) -> Backbone:
        """The backbone of the student or the teacher, or that of published weights.

        Raises:
            UsageError: the file does not hold this network.
        """
        found = self.networks.get(WEIGHTS) or self.networks.get(which)
        if found is None:
            raise UsageError(f"{flag}: {self.path} holds the {', '.join(self.networks)} only")
        return found

    @property
    def image_size(self) -> int:
        """Side of the training images, in pixels."""
        return int(self.about["image_size"])

    def untrained(self) -> Backbone:
        """The same backbone with random weights, on the CPU, without optimisations for speed.

        In a module, only the weights of ``torch.nn`` layers are random; others stay as given.
        """
        size, channels = self.image_size, self.pixels.channels
        return untrained(self.arch, image_size=size, stem=self.about["stem"], channels=channels)

    def start(self) -> tuple[Backbone | None, str]:
        """The backbone with a run's starting weights, or the reason why it is missing; empty without such weights."""
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
        """Open the images in ``options``, or those of the run.

        A file has only the name of its images: without the run, they are found if they are a named set, at a URL or on
        the Hub. Columns that are not given default to those of the run only if the images are the run's.

        Raises:
            UsageError: no images are given, or they cannot be opened.
        """
        run = self.settings or {}
        columns = {} if options.data else run
        data, named = options.data or run.get("data"), self.about.get("data", "")
        if not data and everywhere(named):
            data = named
        if not data:
            why = f"; {self.path} has the name of its images, {named}, and not their folder" if named else ""
            raise UsageError(f"--data is missing{why}; give the images")
        return open_source(
            data,
            options.data_root or run.get("data_root"),
            image_column=options.image_column or columns.get("image_column"),
            label_column=options.label_column or columns.get("label_column"),
        )

    def method(self, device: torch.device) -> Method[Any]:
        """Student and teacher with their heads, on a device.

        Raises:
            UsageError: the method of the run is not registered.
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
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    networks: Sequence[str] = NETWORKS,
) -> Pretrained:
    """Load the networks of a run folder, a checkpoint, a file with a backbone, or published weights, to the CPU.

    Args:
        path: a path that fastrm wrote, or weights as for ``--init-from``.
        arch: a module of the same class, if the trained network is the user's module; its weights do not matter. For
            published weights, timm's name of the network, if they do not say it.
        image_size, mean, std: as in :func:`fastrm.models.published.published`, for published weights.
        networks: the networks of a run to load; an exported file holds one.

    Raises:
        UsageError: the path is missing, damaged or has another format, or ``arch`` is missing or another network.
    """
    if isinstance(arch, str) or describes_itself(path):
        if isinstance(arch, nn.Module):
            raise UsageError(f"{path} is not of {module_name(arch)}; arch and image_size say of what network it is")
        return _of_others(path, published(path, arch=arch, image_size=image_size, mean=mean, std=std))
    if not (image_size is mean is std is None):
        raise UsageError(
            f"--image-size, --mean and --std are for weights of other programs, with --arch; {path} has its "
            "own if a run wrote it"
        )
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
    path: Path, device: torch.device, *, arch: nn.Module | str | None = None, **of_others: Any
) -> Pretrained:
    """Load networks like :func:`read_pretrained`, to a device, with the memory format of the run.

    Args:
        path, arch: as there.
        device: the device.
        of_others: ``image_size``, ``mean`` and ``std``, as there.
    """
    trained = read_pretrained(path, arch=arch, **of_others)
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
        run_or_file: a run folder, whose newest checkpoint is loaded; a checkpoint; a safetensors file with a backbone,
            from a run or from ``python -m fastrm.export``; or published weights, as for ``--init-from``
            (``"timm:resnet50.a1_in1k"``).
        which: ``"student"`` or ``"teacher"``, for a run or a checkpoint.
        arch: a module of the same class, if the trained network is your own module; a copy of it gets the weights. For
            published weights, timm's name of the network, if they do not say it.
        image_size: side of the images in pixels, for published weights; None for the size that timm lists.

    Returns:
        A module on the CPU, in evaluation mode. For normalised images [B, C, H, W], ``model(images)`` returns pooled
        features [B, D], and ``model.feature_map(images)`` features per position [B, D, h, w], which for a ViT are its
        patch tokens. ``model.forward_features(images)`` returns the output of the last layer, as in timm.

    Raises:
        UsageError: there is nothing to load, the file does not hold this network, or ``arch`` is another network.
    """
    check_choice("which", which, NETWORKS)
    check_path("run_or_file", run_or_file)
    path = Path(at_home(run_or_file))
    with torch.random.fork_rng(devices=[]):  # random weights are drawn before the file's are loaded
        found = read_pretrained(path, arch=arch, image_size=image_size, networks=[which])
    return found.network(which, f"which={which!r}").eval()
