"""Every setting of a run: one frozen dataclass tree, whose leaves are the command line's flags.

A leaf's type says all that it may be. The leaves' names are unique across the groups, so that a recipe, a flag or a
keyword of :func:`fastrm.settings.config.build` needs no group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from fastrm.errors import UsageError
from fastrm.settings.kinds import Range
from fastrm.settings.near import near

ResidualPlace = Literal["output", "projector", "backbone"]

Channels = Literal["auto"] | Annotated[int, Range(at_least=1, at_most=256)]
CropMin = Annotated[float, Range(above=0, at_most=1)]
ImageSize = Annotated[int, Range(at_least=8, at_most=4096)]
Numbers = tuple[float, ...]
Pages = Literal["auto", "first", "bands", "images"]
Positive = tuple[Annotated[float, Range(above=0)], ...]
Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
Width = Annotated[int, Range(at_least=1, at_most=2**16)]
Workers = Annotated[int, Range(at_least=0, at_most=256)]


def methods() -> Any:
    """The package of the methods, which knows their names and published settings; it imports the settings."""
    from fastrm import methods

    return methods


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """The images and how they are read."""

    data: str = ""
    """digits, fashion-mnist, cifar10, cifar100, stl10, photo-patches (of scikit-image), synthetic, or a folder:
    train/CLASS/… with optional val/CLASS/…, CLASS/…, or images at any depth without labels;
    or WebDataset shards: a folder of tar files, or quoted: '/shards/train-{0000..0146}.tar';
    or a list of paths, @paths.txt; a table, .csv, .tsv or .parquet; a Hugging Face dataset, hf:PATH or hf:owner/name;
    an array, .npy, .h5 or .hdf5; or a URL of shards, tables or arrays, which are copied to ~/.cache/fastrm once."""
    image_column: str | None = None
    """Column of a table or a Hugging Face dataset, or array of an HDF5 file, that holds the images.
    Unset: the one of encoded images, or called image, path, file or the like."""
    label_column: str | None = None
    """The one that holds the labels, numbers or text; unset: label or class."""
    data_root: Path | None = None
    """Where a named set lies or is downloaded to; unset: ~/.cache/fastrm.
    For fashion-mnist a folder with the four IDX files, plain or gzip, serves."""
    image_size: ImageSize = 224
    """Side of the square views, in pixels."""
    crop_min: CropMin = 0.2
    """Smallest share of the picture's area that a random crop takes."""
    augmentation: str | None = None
    """How views are made; unset: as the method's publication says. Numbers and sizes of views, 2x224,8x96 for example,
    or a TOML file with what differs from the publication (docs/tutorial.md), or a run's config.json, for its views."""
    batch_size: Annotated[int, Range(at_least=2)] | None = None
    """Images an optimizer step, over all processes; unset: 256 a process."""
    loader: Literal["auto", "dali", "torch", "memory"] = "auto"
    """What reads and augments the images.
    memory: named sets on the device; of others each image is decoded once, and kept at full size, or shrunk where
    memory does not suffice. auto: memory for named sets; for files dali on a GPU where it is installed, and else torch,
    worker processes, which keep what they decode of a set that takes at most 3 % of the memory."""
    scan: bool = True
    """Before the run, look for broken files in a folder, leave them out and list them in skipped.txt. Without it, what
    cannot be read is left out when it is met, and DALI shows some damaged JPEGs that are left out otherwise."""
    channels: Channels = "auto"
    """Bands that the network gets. auto: 3 for images of which any is RGB, or all are gray of 8 bits; otherwise the
    bands that they have."""
    value_range: Numbers | None = None
    """The values that become black and white, as in 0,4095. unset: 0 and 255 in uint8; in another dtype the .1 and 99.9
    percentiles of each band, measured once; where there are several dtypes, the range of each."""
    mean: Numbers | None = None
    """Subtracted per channel once black is 0 and white is 1; unset: ImageNet's for RGB of 8 bits, else measured."""
    std: Positive | None = None
    """Divided by per channel; unset: as for --mean."""
    pages: Pages = "auto"
    """What is read of TIFF and other files with several pages: the first, all as the bands of one image, or each as an
    image. auto: as bands where all files have as many gray ones of one size, and else the first."""
    workers: Workers | None = None
    """Loader processes a training process, 0 for none; unset: its share of the machine's cores, at most 8."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone."""

    arch: str = "resnet50"
    """Any image backbone of timm, by name."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """First layers of a ResNet: as published, or small (3x3 at stride 1, no max-pool).
    auto: small at 64 pixels and below."""
    init_from: Path | None = None
    """Weights to start the backbone from: timm:NAME, hf:OWNER/NAME, a run folder, or a file of tensors by name: of
    fastrm, timm, torchvision, or of MoCo, DINO, MAE and the like."""
    init_partial: bool = False
    """Take what matches of --init-from, also where that is less than 95 % of the parameters."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The momentum method, its heads, and the residual term."""

    method: str = field(default_factory=lambda: methods().names()[0])
    """The method whose loss between two views is trained."""
    residual_weight: Annotated[float, Range(at_least=0)] = 0.1
    """Weight of the residual term, student to teacher on the same view; 0 is the plain method.
    The default cost no method accuracy in docs/study.md; 1 helped some and harmed others there."""
    residual_at: ResidualPlace = "output"
    """Where the residual term is taken: at what the method's loss uses, behind the projector, or the backbone."""
    residual_warmup_epochs: Annotated[float, Range(at_least=0)] = 0.0
    """Epochs over which the residual weight grows linearly from 0."""
    teacher_momentum: Share = 0.99
    """Momentum of the teacher at the start; a cosine leads from it to --teacher-momentum-end."""
    teacher_momentum_end: Share = 1.0
    """Momentum of the teacher at the end of the run."""
    temperature: Annotated[float, Range(above=0)] = 1.0
    """Temperature of the contrastive loss, in methods with one."""
    queue_size: Annotated[int, Range(at_least=1, at_most=2**24)] = 65536
    """Keys held as negatives, in methods with a queue."""
    queue_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """How the queue holds its keys; losses are summed in float32 always.
    auto: float32 on the CPU; bfloat16 on a GPU, where a product of float32 rows is made of three in TF32."""
    symmetric: bool = False
    """Score both directions, each against a queue of its own, and average, in methods that otherwise score one."""
    dense_weight: Share = 0.5
    """Share of the dense loss, in methods with one; the global loss gets the rest."""
    hidden_dim: Width = 4096
    """Hidden width of the projector."""
    output_dim: Width = 256
    """Width of the projector's and the predictor's output."""
    predictor_hidden_dim: Width = 4096
    """Hidden width of the predictor, in methods with one."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and the length of the run."""

    epochs: Annotated[int, Range(at_least=1)] = 100
    """Passes over the images; all schedules span them."""
    max_steps: Annotated[int, Range(at_least=1)] | None = None
    """Stop after this many optimizer steps; the schedules still span --epochs, so that a later resume goes on."""
    optimizer: Literal["lars", "sgd", "adamw", "lamb"] = "lars"
    """lars: tensors of one dimension or none get no decay and no scaling. adamw, lamb: they get no decay.
    lamb is FusedLAMB of NVIDIA's apex, and needs it and a GPU."""
    lr: Annotated[float, Range(above=0)] = 0.6
    """Peak learning rate for a batch of 256; it is scaled by batch / 256. A cosine leads from it to 0.
    With --init-from the default is a tenth of what it is from scratch."""
    weight_decay: Annotated[float, Range(at_least=0)] = 1e-6
    """Weight decay."""
    trust_coefficient: Annotated[float, Range(above=0)] = 0.001
    """lars: ratio of an update's norm to its weight's norm, before the learning rate."""
    warmup_epochs: Annotated[float, Range(at_least=0)] = 10.0
    """Epochs over which the learning rate grows linearly.
    Where --epochs is less than the recipe's, the default is at most a tenth of it; with --init-from a twentieth."""
    warmup_start_lr: Annotated[float, Range(at_least=0)] = 0.0
    """Learning rate (for a batch of 256) at which the warm-up starts."""
    accumulate: Annotated[int, Range(at_least=1)] = 1
    """Micro-batches an optimizer step; each has batch-size / accumulate images and is contrasted within itself."""
    layer_decay: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Factor of the learning rate per layer of the backbone, from the last to the first; heads get the whole rate.
    1: all alike. .65 to .75 is what ViTs are fine-tuned with."""
    clip_norm: Annotated[float, Range(above=0)] | None = None
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
    checkpoint_activations: bool = False
    """Keep only the input of each block of the student, and compute the block again in the backward pass: less memory,
    the same bits, about a third more time. For networks that timm can do it with, such as ResNets and ViTs."""
    channels_last: bool = True
    """Keep images and convolution weights in channels-last order."""
    kernels: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Backend of fastrm.kernels."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is logged, kept and repeated."""

    recipe: str | None = None
    """A named set of defaults, which flags override; docs/recipes.md lists them."""
    seed: Seed = 0
    """Seed of everything random; on the CPU the same seed gives the same bits."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """What the metrics are sent to besides metrics.jsonl; --log-to alone: nothing."""
    log_every: Annotated[int, Range(at_least=1)] = 50
    """Steps between two logged ones; the first and the last are always logged."""
    eval_every: Annotated[int, Range(at_least=0)] = 10
    """Epochs between two kNN evaluations, besides the one at the end; 0: never."""
    eval_images: Annotated[int, Range(at_least=1)] = 100_000
    """Images that a kNN evaluation looks neighbours up in at most, and is tried on: of more, as many drawn at random,
    the same ones each time. The default keeps evaluations below 2 % of the time of ImageNet on 8 GPUs."""
    online_linear: bool = False
    """Train a linear classifier along with the student, on its detached features, and score it at each evaluation."""
    checkpoint_every: Annotated[int, Range(at_least=1)] | None = None
    """Steps between two checkpoints, besides the one at the end; unset: an epoch."""
    checkpoint_minutes: Annotated[float, Range(at_least=0)] = 15.0
    """Save besides when this many minutes have passed since the last checkpoint; 0: never for that."""
    keep: Annotated[int, Range(at_least=1)] = 2
    """Checkpoints that are kept, the newest among them."""
    keep_every: Annotated[int, Range(at_least=1)] | None = None
    """Keep besides all checkpoints whose step is a multiple of this."""
    keep_best: bool = False
    """Keep the checkpoint with the best kNN score of the student, or of the online linear classifier where one is
    trained, as checkpoint-best.pt."""
    verify_every: Annotated[int, Range(at_least=0)] = 0
    """Steps between two comparisons of the fused losses and their gradient with the reference, on the batch at hand;
    0: never."""
    profile: Annotated[int, Range(at_least=0, at_most=1000)] = 0
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
    """All settings of a run."""

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
            known = [leaf for group in dataclasses.fields(self) for leaf in vars(getattr(self, group.name))]
            meant = [name + (f" (did you mean {found}?)" if (found := near(name, known)) else "") for name in leaves]
            raise UsageError(f"unknown settings: {', '.join(meant)}")
        return Config(**groups)


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


KINDS: Mapping[str, Any] = {
    name: kind
    for group in get_type_hints(Config).values()
    for name, kind in get_type_hints(group, include_extras=True).items()
}
"""The type of each leaf."""
