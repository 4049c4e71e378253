"""Every setting of a run: one frozen dataclass tree, whose leaves are the command line's flags.

The leaves' names are unique across the groups, so that a recipe, a flag or a keyword of :func:`build` needs no group.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastrm.errors import UsageError
from fastrm.files import at_home
from fastrm.settings.recipes import RECIPES

MethodName = Literal["mocov3", "mocov2", "byol", "densecl"]
ResidualPlace = Literal["output", "projector", "backbone"]


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """The images and how they are read."""

    data: str = ""
    """digits, fashion-mnist, cifar10, cifar100, stl10, photo-patches (of scikit-image), synthetic, or a folder:
    train/CLASS/… with optional val/CLASS/…, CLASS/…, or images at any depth without labels;
    or WebDataset shards: a folder of tar files, or quoted: '/shards/train-{0000..0146}.tar'."""
    data_root: Path | None = None
    """Where a named set lies or is downloaded to; unset: ~/.cache/fastrm.
    For fashion-mnist a folder with the four IDX files, plain or gzip, serves."""
    image_size: int = 224
    """Side of the square views, in pixels."""
    crop_min: float = 0.2
    """Smallest share of the picture's area that a random crop takes."""
    batch_size: int | None = None
    """Images an optimizer step, over all processes; unset: 256 a process."""
    loader: Literal["auto", "dali", "torch", "memory"] = "auto"
    """What reads and augments the images.
    auto: memory, the whole set on the device, for named sets; for files dali on a GPU where it is
    installed, and else torch, worker processes."""
    scan: bool = True
    """Before the run, look for broken files in a folder, leave them out and list them in skipped.txt. Without it, what
    cannot be read is left out when it is met, and DALI shows some damaged JPEGs that are left out otherwise."""
    workers: int | None = None
    """Loader processes a training process, 0 for none; unset: as many as cores, at most 8."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone."""

    arch: str = "resnet50"
    """Any image backbone of timm, by name."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """First layers of a ResNet: as published, or small (3x3 at stride 1, no max-pool).
    auto: small at 64 pixels and below."""
    init_from: Path | None = None
    """Weights to start the backbone from: a run folder or its files, an official MoCo, MoCo-v2 or MoCo-v3 checkpoint,
    or any state dict in timm's or, for ResNets, torchvision's names."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The momentum method, its heads, and the residual term."""

    method: MethodName = "mocov3"
    """The method whose loss between two views is trained."""
    residual_weight: float = 0.1
    """Weight of the residual term, student to teacher on the same view; 0 is the plain method.
    The default cost no method accuracy in docs/study.md; 1 helped MoCo-v2 and harmed MoCo-v3 and BYOL there."""
    residual_at: ResidualPlace = "output"
    """Where the residual term is taken: at what the method's loss uses, behind the projector, or the backbone."""
    residual_warmup_epochs: float = 0.0
    """Epochs over which the residual weight grows linearly from 0."""
    teacher_momentum: float = 0.99
    """Momentum of the teacher at the start; a cosine leads from it to --teacher-momentum-end."""
    teacher_momentum_end: float = 1.0
    """Momentum of the teacher at the end of the run."""
    temperature: float = 1.0
    """Temperature of the contrastive loss (not used by byol)."""
    queue_size: int = 65536
    """Keys held as negatives (mocov2 and densecl)."""
    symmetric: bool = False
    """mocov2: score both directions, each against a queue of its own, and average."""
    dense_weight: float = 0.5
    """densecl: share of the dense loss; the global one gets the rest."""
    hidden_dim: int = 4096
    """Hidden width of the projector."""
    output_dim: int = 256
    """Width of the projector's and the predictor's output."""
    predictor_hidden_dim: int = 4096
    """Hidden width of the predictor (mocov3 and byol)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and the length of the run."""

    epochs: int = 100
    """Passes over the images; all schedules span them."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedules still span --epochs, so that a later resume goes on."""
    optimizer: Literal["lars", "sgd", "adamw", "lamb"] = "lars"
    """lars: tensors of one dimension or none get no decay and no scaling. adamw, lamb: they get no decay.
    lamb is FusedLAMB of NVIDIA's apex, and needs it and a GPU."""
    lr: float = 0.6
    """Peak learning rate for a batch of 256; it is scaled by batch / 256. A cosine leads from it to 0."""
    weight_decay: float = 1e-6
    """Weight decay."""
    trust_coefficient: float = 0.001
    """lars: ratio of an update's norm to its weight's norm, before the learning rate."""
    warmup_epochs: float = 10.0
    """Epochs over which the learning rate grows linearly.
    Where --epochs is less than the recipe's, the default is at most a tenth of it."""
    warmup_start_lr: float = 0.0
    """Learning rate (for a batch of 256) at which the warm-up starts."""
    accumulate: int = 1
    """Micro-batches an optimizer step; each has batch-size / accumulate images and is contrasted within itself."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient, which is scaled down to it; unset: no limit."""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """What computes, and in which precision."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the networks' layers; weights, teacher and losses are in float32 always.
    auto: bf16 on a GPU that has it, fp16 with loss scaling on one that has not, fp32 on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the student and the teacher with torch.compile; --compile alone is on, --no-compile is off.
    auto: on a GPU with Triton, where it pays in minutes; not on the CPU, where a ResNet-18 was no faster."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph: for small images and networks, where launches dominate."""
    channels_last: bool = True
    """Keep images and convolution weights in channels-last order."""
    kernels: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Backend of fastrm.kernels."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is logged, kept and repeated."""

    recipe: str | None = None
    """A named set of defaults, which flags override; RECIPES in fastrm/settings/recipes.py lists them."""
    seed: int = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """What the metrics are sent to besides metrics.jsonl; --log-to alone: nothing."""
    log_every: int = 50
    """Steps between two logged ones; the first and the last are always logged."""
    eval_every: int = 10
    """Epochs between two kNN evaluations, besides the one at the end; 0: never."""
    online_linear: bool = False
    """Train a linear classifier along with the student, on its detached features, and score it at each evaluation."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints, besides the one at the end; unset: an epoch."""
    keep: int = 2
    """Checkpoints that are kept, the newest among them."""
    keep_every: int | None = None
    """Keep besides all checkpoints whose step is a multiple of this."""
    keep_best: bool = False
    """Keep the checkpoint with the best kNN score of the student, or of the online linear classifier where one is
    trained, as checkpoint-best.pt."""
    verify_every: int = 0
    """Steps between two comparisons of the fused losses and their gradient with the reference, on the batch at hand;
    0: never."""
    profile: int = 0
    """Steps to profile, after the first two: a Chrome trace in the folder, and where the time goes on the screen."""
    out: Path | None = None
    """Folder that the run is written to; unset: runs/DATA-METHOD-ARCH."""
    resume: str = "auto"
    """auto: continue the run that is in --out. never: start anew, in its place.
    Or a checkpoint or run folder to continue from."""
    dry_run: bool = False
    """Make a few steps, say what memory and time they and an epoch take, and end; nothing is written."""
    allow_changed_data: bool = False
    """Continue a run whose images have changed: from the next whole epoch on, with the new ones."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pre-train an image backbone with a momentum method and residual momentum."""

    input: InputConfig = field(default_factory=InputConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def flat(self) -> dict[str, Any]:
        """All leaves by name, with paths as text: what config.json holds."""
        groups = (getattr(self, group.name) for group in dataclasses.fields(self))
        leaves = {leaf.name: getattr(group, leaf.name) for group in groups for leaf in dataclasses.fields(group)}
        return {name: _plain(value) for name, value in leaves.items()}

    def replace(self, **leaves: Any) -> Config:
        """Return a copy with some leaves changed, whatever group they are in.

        Raises:
            UsageError: no leaf has that name.
        """
        groups = {}
        for group in dataclasses.fields(self):
            value = getattr(self, group.name)
            own = {leaf.name: leaves.pop(leaf.name) for leaf in dataclasses.fields(value) if leaf.name in leaves}
            groups[group.name] = dataclasses.replace(value, **own)
        if leaves:
            raise UsageError(f"unknown settings: {', '.join(sorted(leaves))}")
        return Config(**groups)


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


_KINDS: Mapping[str, Any] = {
    name: kind for group in get_type_hints(Config).values() for name, kind in get_type_hints(group).items()
}

# What a run uses when it names no recipe: the method's published settings, with 256 images a process.
_UNNAMED = {
    "mocov3": "mocov3-r50-100ep",
    "mocov2": "mocov2-r50-200ep",
    "byol": "byol-r50-300ep",
    "densecl": "densecl-r50-coco-800ep",
}


def defaults(
    *, recipe: str | None = None, method: str | None = None, arch: str | None = None, epochs: int | None = None
) -> Config:
    """The settings that hold where no flag says otherwise, given the flags that choose them.

    Raises:
        UsageError: there is no such recipe or method.
    """
    if method is not None:
        check_choice("method", method)
    if recipe is not None:
        check_choice("recipe", recipe, RECIPES)
        values = dict(RECIPES[recipe])
    else:
        vit = (arch or "").startswith("vit_") and method in (None, "mocov3")
        values = dict(RECIPES["mocov3-vits-300ep" if vit else _UNNAMED[method or "mocov3"]])
        del values["batch_size"]
    if epochs is not None and epochs < values["epochs"]:
        values["warmup_epochs"] = min(values["warmup_epochs"], epochs / 10)
    return Config().replace(recipe=recipe, **values)


def build(**leaves: Any) -> Config:
    """Return the settings of a run from Python, as the command line would: recipe first, then what is given here.

    >>> build(data="digits", arch="test_resnet", image_size=32, epochs=12).optim.warmup_epochs
    1.2
    """
    leaves = _with_paths({name: at_home(value) for name, value in leaves.items()})
    check_kinds(leaves)
    chosen = {name: leaves[name] for name in ("recipe", "method", "arch", "epochs") if name in leaves}
    config = defaults(**chosen).replace(**leaves)
    validate(config)
    return config


def _with_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(leaves.get("log_to"), list):
        leaves = {**leaves, "log_to": tuple(leaves["log_to"])}
    paths = {
        name: Path(leaves[name]) for name in ("data_root", "init_from", "out") if isinstance(leaves.get(name), str)
    }
    return {**leaves, **paths}


def from_flat(leaves: Mapping[str, Any]) -> Config:
    """Rebuild the settings that :meth:`Config.flat` wrote down.

    Raises:
        UsageError: a setting is unknown or out of range.
    """
    config = Config().replace(**_with_paths(leaves))
    validate(config)
    return config


# name: (lowest, highest, whether the lowest itself is left out)
_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "image_size": (8, 4096, False),
    "clip_norm": (0, math.inf, True),
    "profile": (0, 1000, False),
    "crop_min": (0, 1, True),
    "batch_size": (2, math.inf, False),
    "workers": (0, 256, False),
    "residual_weight": (0, math.inf, False),
    "residual_warmup_epochs": (0, math.inf, False),
    "teacher_momentum": (0, 1, False),
    "teacher_momentum_end": (0, 1, False),
    "temperature": (0, math.inf, True),
    "queue_size": (1, 2**24, False),
    "dense_weight": (0, 1, False),
    "hidden_dim": (1, 2**16, False),
    "output_dim": (1, 2**16, False),
    "predictor_hidden_dim": (1, 2**16, False),
    "epochs": (1, math.inf, False),
    "max_steps": (1, math.inf, False),
    "lr": (0, math.inf, True),
    "weight_decay": (0, math.inf, False),
    "trust_coefficient": (0, math.inf, True),
    "warmup_epochs": (0, math.inf, False),
    "warmup_start_lr": (0, math.inf, False),
    "accumulate": (1, math.inf, False),
    "seed": (0, 2**63 - 1, False),
    "log_every": (1, math.inf, False),
    "eval_every": (0, math.inf, False),
    "checkpoint_every": (1, math.inf, False),
    "keep": (1, math.inf, False),
    "keep_every": (1, math.inf, False),
    "verify_every": (0, math.inf, False),
}


def flag(name: str) -> str:
    """Spell a leaf as its command-line flag."""
    return "--" + name.replace("_", "-")


def check_choice(name: str, value: object, choices: Iterable[str] | None = None) -> None:
    """Raise a UsageError unless the value of a setting is one of ``choices``; None stands for those declared above."""
    known = list(get_args(_KINDS[name]) if choices is None else choices)
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{flag(name)} {str(value)[:80]} is unknown; choose one of {', '.join(known)}")


def check_range(name: str, value: float | None) -> None:
    """Raise a UsageError if the value of a setting is out of range; None, for unset, is not."""
    low, high, open_low = _RANGES[name]
    # Not math.isfinite, which raises for an int that no float can hold.
    if value is None or ((value > low if open_low else value >= low) and value <= min(high, sys.float_info.max)):
        return
    wanted = f"above {low:g}" if open_low else f"at least {low:g}"
    most = f" and at most {high:g}" if high < math.inf else ""
    raise UsageError(f"{flag(name)} {value} is out of range; it must be {wanted}{most}")


def check_path(name: str, value: str | Path | None) -> None:
    """Raise a UsageError if the system takes no such path: one that is too long, or has a zero byte in it.

    None, for unset, is none of these.
    """
    if value is None:
        return
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{flag(name)} {str(value)[:80]!r} is no path that can be used: {why}") from None


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a setting's value is of the kind that it is declared as; the choices of a Literal are seen to later."""
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(item in get_args(get_args(kind)[0]) for item in value)
    if options := get_args(kind):
        return any(_is_a(value, option) for option in options)
    if kind in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, kind))
    return isinstance(value, kind)


def check_kinds(leaves: Mapping[str, Any]) -> None:
    """Raise a UsageError if the value of a setting is of another kind than it is declared as."""
    for name, value in leaves.items():
        kind = _KINDS.get(name, object)
        if not _is_a(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("pathlib.", "")
            raise UsageError(f"{flag(name)} {str(value)[:80]!r} is a {type(value).__name__}; it must be {wanted}")


def validate(config: Config) -> None:
    """Check everything that can be checked without the data, the machine or the network.

    Raises:
        UsageError: names the flag, its value and what is right.
    """
    groups = (vars(getattr(config, group.name)) for group in dataclasses.fields(config))
    check_kinds({name: value for group in groups for name, value in group.items()})
    values = config.flat()
    for name in ("data_root", "init_from", "out", "resume"):
        check_path(name, values[name])
    if not values["data"]:
        raise UsageError("--data is missing; give a folder of images, or a named set such as digits")
    for name in _RANGES:
        check_range(name, values[name])
    for name, kind in _KINDS.items():
        if get_origin(kind) is Literal:
            check_choice(name, values[name])
    optim = config.optim
    if optim.warmup_epochs >= optim.epochs:
        raise UsageError(
            f"--warmup-epochs {optim.warmup_epochs:g} must be less than --epochs {optim.epochs}, which includes it"
        )
    if config.method.teacher_momentum > config.method.teacher_momentum_end:
        raise UsageError(
            f"--teacher-momentum {config.method.teacher_momentum} must not be above --teacher-momentum-end "
            f"{config.method.teacher_momentum_end}"
        )


def resolved(config: Config, processes: int) -> Config:
    """Return the settings with the batch size filled in.

    Raises:
        UsageError: the batch does not divide into processes and micro-batches of two images or more.
    """
    batch = config.input.batch_size or 256 * processes
    parts = processes * config.optim.accumulate
    if batch % parts or batch < 2 * parts:
        raise UsageError(
            f"--batch-size {batch} must be a multiple of {parts} ({processes} processes times --accumulate "
            f"{config.optim.accumulate}), and at least twice that for BatchNorm"
        )
    return config.replace(batch_size=batch)
