"""Every setting of a run: a tree of frozen dataclasses, whose leaves are the flags of the command line.

The type of a leaf defines its valid values. The names of the leaves are unique across the groups, so a recipe, a flag
or a keyword of :func:`fastrm.settings.config.build` needs no group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from fastrm.errors import UsageError
from fastrm.settings.inputs import InputConfig
from fastrm.settings.kinds import Range
from fastrm.settings.near import near

ResidualPlace = Literal["output", "projector", "backbone"]

Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
Width = Annotated[int, Range(at_least=1, at_most=2**16)]


def methods() -> Any:
    """The package of the methods, with their names and published settings; it imports this module."""
    from fastrm import methods

    return methods


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone."""

    arch: str = "resnet50"
    """Any image backbone of timm, by name."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """First layers of a ResNet. small is a 3x3 convolution at stride 1, no max-pool. auto is small up to 64 pixels."""
    init_from: Path | None = None
    """Weights that the backbone starts from, instead of random ones. Pass a run folder, a file of named tensors from
    fastrm, timm, torchvision, MoCo, DINO, MAE and the like, timm:NAME, or hf:OWNER/NAME."""
    init_partial: bool = False
    """Load the tensors of --init-from that match, even if they are less than 95 % of the parameters."""
    drop_path: Annotated[float, Range(at_least=0, at_most=0.9)] = 0.0
    """Stochastic depth of the student, in networks of timm that have it. The probability of leaving out a block grows
    linearly from 0 at the first block to this value at the last. The teacher leaves out none."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The momentum method, its heads, and the residual term."""

    method: str = field(default_factory=lambda: methods().names()[0])
    """Momentum method to train with."""
    residual_weight: Annotated[float, Range(at_least=0)] = 0.1
    """Weight of the residual term between student and teacher on the same view; 0 is the plain method.
    The default cost no method accuracy in docs/study.md; 1 helped MoCo-v2 there, and not the others."""
    residual_at: ResidualPlace = "output"
    """Where the residual term is computed.
    output is what the method's loss uses; projector and backbone are the outputs of these parts."""
    residual_warmup_epochs: Annotated[float, Range(at_least=0)] = 0.0
    """Epochs over which the residual weight grows linearly from 0."""
    teacher_momentum: Share = 0.99
    """Momentum of the teacher at the start; a cosine schedule leads to --teacher-momentum-end."""
    teacher_momentum_end: Share = 1.0
    """Momentum of the teacher at the end of the run."""
    temperature: Annotated[float, Range(above=0)] = 1.0
    """Temperature of the contrastive loss, in methods that have one, and of the student in DINO."""
    teacher_temperature: Annotated[float, Range(above=0)] = 0.04
    """Temperature of the teacher, in methods with prototypes."""
    teacher_temperature_start: Annotated[float, Range(above=0)] = 0.04
    """Temperature of the teacher at the start of its warm-up."""
    teacher_temperature_warmup_epochs: Annotated[float, Range(at_least=0)] = 0.0
    """Epochs over which the temperature of the teacher grows linearly."""
    prototypes: Annotated[int, Range(at_least=2, at_most=2**20)] = 65536
    """Number of prototypes, in methods that have them."""
    norm_prototypes: bool = True
    """Keep the norm of each prototype at 1. If off, the norms are trained, which helps a ViT-S and can make other
    networks unstable."""
    freeze_prototypes_epochs: Annotated[float, Range(at_least=0)] = 1.0
    """Epochs at the start in which the prototypes are not trained."""
    queue_size: Annotated[int, Range(at_least=1, at_most=2**24)] = 65536
    """Number of keys kept as negatives, in methods with a queue."""
    queue_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the keys in the queue; losses are always summed in float32.
    auto is float32 on the CPU and bfloat16 on a GPU, where a product of float32 rows takes three products in TF32."""
    symmetric: bool = False
    """Average the losses of both directions, each with its own queue, in methods that otherwise use one."""
    dense_weight: Share = 0.5
    """Weight of the dense loss, from 0 to 1, in methods that have one; the global loss gets the rest."""
    hidden_dim: Width = 4096
    """Hidden width of the projector."""
    output_dim: Width = 256
    """Output width of the projector and the predictor."""
    predictor_hidden_dim: Width = 4096
    """Hidden width of the predictor, in methods that have one."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and the length of the run."""

    epochs: Annotated[int, Range(at_least=1)] = 100
    """Passes over the images. All schedules span them."""
    max_steps: Annotated[int, Range(at_least=1)] | None = None
    """Stop after this number of optimizer steps. The schedules still span --epochs, so a later resume can continue."""
    optimizer: Literal["lars", "sgd", "adamw", "lamb"] = "lars"
    """Optimizer of the student. Except with sgd, tensors of one dimension or none get no weight decay; with lars, no
    scaling either. lamb is FusedLAMB of NVIDIA's apex, and needs it and a GPU."""
    lr: Annotated[float, Range(above=0)] = 0.6
    """Peak learning rate for a batch of 256, scaled by batch size / 256. A cosine schedule reduces it to --min-lr."""
    min_lr: Annotated[float, Range(at_least=0)] = 0.0
    """Learning rate at the end of the run. It is not scaled by the batch size."""
    weight_decay: Annotated[float, Range(at_least=0)] = 1e-6
    """Weight decay, or its value at the start, if --weight-decay-end is given."""
    weight_decay_end: Annotated[float, Range(at_least=0)] | None = None
    """Weight decay at the end of the run, to which a cosine schedule leads. If not given, it is constant."""
    trust_coefficient: Annotated[float, Range(above=0)] = 0.001
    """For lars, the ratio of an update's norm to the norm of its weight, before the learning rate."""
    warmup_epochs: Annotated[float, Range(at_least=0)] = 10.0
    """Epochs over which the learning rate grows linearly.
    If --epochs is less than the recipe's, the default is at most a tenth of it."""
    warmup_start_lr: Annotated[float, Range(at_least=0)] = 0.0
    """Learning rate at the start of the warm-up, for a batch size of 256."""
    accumulate: Annotated[int, Range(at_least=1)] = 1
    """Micro-batches per step, of batch size / accumulate images each. Negatives come only from the same one."""
    layer_decay: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Factor of the learning rate per layer of the backbone, from the last layer to the first; 1 turns it off.
    Heads get the full learning rate. ViTs are usually fine-tuned with 0.65 to 0.75."""
    clip_norm: Annotated[float, Range(above=0)] | None = None
    """Largest norm of the whole gradient; larger gradients are scaled down to it. If not given, no limit."""
    clip_each: bool = False
    """Apply --clip-norm to the gradient of each parameter separately, as DINO's code does."""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Device, precision and compilation."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to train on. auto is the GPU if there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of the layers; weights, teacher and losses are always float32.
    auto is bf16 on a GPU that supports it, fp16 with loss scaling on other GPUs, and fp32 on the CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile student and teacher with torch.compile; --compile alone means on, --no-compile means off. auto is on for
    a GPU with Triton, where it pays off within minutes, and off for the CPU, where a ResNet-18 was no faster."""
    cuda_graph: bool = False
    """Capture the whole step as one CUDA graph.
    Use it for small images and networks, where launch overhead dominates."""
    checkpoint_activations: bool = False
    """Keep only the input of each block of the student, and compute the block again in the backward pass.
    This saves memory, gives the same bits, and takes about a third more time. timm must support it for the network."""
    channels_last: bool = True
    """Keep images and convolution weights in channels-last memory format."""
    kernels: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Backend of fastrm.kernels."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Logging, evaluations, checkpoints and the run folder."""

    recipe: str | None = None
    """Named set of published settings, which flags override; docs/recipes.md lists them."""
    seed: Seed = 0
    """Seed of all random numbers. On the CPU, the same seed gives the same bits."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Loggers that get the metrics in addition to metrics.jsonl. Without a name, --log-to means none."""
    log_every: Annotated[int, Range(at_least=1)] = 50
    """Steps between two logged steps. The first and the last step are always logged."""
    eval_every: Annotated[int, Range(at_least=0)] = 10
    """Epochs between two kNN evaluations, in addition to the one at the end; 0 means never."""
    eval_images: Annotated[int, Range(at_least=1)] = 100_000
    """Largest number of images in the bank of a kNN evaluation, and of its test images.
    Of larger sets, this many are drawn at random, the same ones each time.
    The default keeps evaluations below 2 % of the time of ImageNet on 8 GPUs."""
    online_linear: bool = False
    """Train a linear classifier during the run on the student's detached features, and score it at each evaluation."""
    checkpoint_every: Annotated[int, Range(at_least=1)] | None = None
    """Steps between two checkpoints, in addition to the one at the end. If not given, one epoch."""
    checkpoint_minutes: Annotated[float, Range(at_least=0)] = 15.0
    """Also save a checkpoint when this many minutes have passed since the last one; 0 turns this off."""
    keep: Annotated[int, Range(at_least=1)] = 2
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int, Range(at_least=1)] | None = None
    """Also keep all checkpoints whose step is a multiple of this number."""
    keep_best: bool = False
    """Keep the best checkpoint as checkpoint-best.pt, by the student's kNN, or the classifier of --online-linear."""
    verify_every: Annotated[int, Range(at_least=0)] = 0
    """Steps between two checks of the fused losses and gradients against the reference; 0 means never."""
    profile: Annotated[int, Range(at_least=0, at_most=1000)] = 0
    """Number of steps to profile, after the first two.
    Writes a Chrome trace to the run folder, and prints where the time goes."""
    out: Path | None = None
    """Folder of the run. If not given, runs/DATA-METHOD-ARCH."""
    resume: str = "auto"
    """auto continues the run in --out; never replaces it. Or a checkpoint or run folder to continue from."""
    export: tuple[
        Literal["timm", "torchvision", "safetensors", "onnx", "transformers", "detectron2", "mmdet"], ...
    ] = ()
    """Formats to export the student to at the end, in the folder export of the run; see fastrm.export.
    Each is written once before the run starts, to find out what cannot be exported."""
    dry_run: bool = False
    """Make a few steps, print their memory and time and those of an epoch, and stop; nothing is written."""
    allow_changed_data: bool = False
    """Continue a run although its images have changed; the new images are used from the next whole epoch on."""


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
        """All leaves by name, with paths as strings, as in config.json."""
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
    """A setting as a JSON-compatible value."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


KINDS: Mapping[str, Any] = {
    name: kind
    for group in get_type_hints(Config).values()
    for name, kind in get_type_hints(group, include_extras=True).items()
}
"""The type of each leaf."""
