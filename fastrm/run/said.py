"""The messages of a run at its start and its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastrm.data import Augmentation, Source
from fastrm.machine.distributed import World
from fastrm.machine.joined import Machine
from fastrm.methods import Method, find, names
from fastrm.models.module import needs_module
from fastrm.models.weights import BACKBONE
from fastrm.optim import Schedule
from fastrm.settings.config import Config, defaults, flag

_SCORED = {
    "student": "student",
    "teacher": "teacher",
    "start": "start weights",
    "untrained": "untrained",
    "pixels": "raw pixels",
}


def asked(config: Config, world: World) -> str:
    """Describe the memory request of a run, for an error."""
    batch = config.input.batch_size or world.size * 256
    images = batch // (world.size * config.optim.accumulate)
    return (
        f"{config.method.method} with {config.model.arch} on {images} images of {config.input.image_size} pixels at a "
        f"time per process (--batch-size {batch}, --accumulate {config.optim.accumulate}"
        + (f", {world.size} processes)" if world.size > 1 else ")")
    )


def described(config: Config, machine: Machine) -> str:
    """Describe the method and the choices of ``auto`` in one line."""
    device, world = machine.device, machine.world
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    settings = config.method
    residual = f"residual weight {settings.residual_weight:g} at the {settings.residual_at}"
    extras = {
        "compiled": machine.compiled,
        "one CUDA graph": config.device.cuda_graph,
        f"{world.size} processes": world.size > 1,
    }
    parts = [
        f"{settings.method}, {residual}; {config.model.arch}; batch {config.input.batch_size}; {name}; "
        f"{machine.precision}",
        *(extra for extra, chosen in extras.items() if chosen),
    ]
    return ", ".join(parts)


def rates(config: Config, method: Method[Any], scales: Iterable[float]) -> str | None:
    """Describe an unusual learning rate, in runs from weights or with ``--layer-decay``; None in other runs.

    Args:
        config: settings of the run.
        method: the method that is trained.
        scales: factors of the learning rate of the parameter groups.
    """
    optim, parts = config.optim, []
    if config.model.init_from is not None:
        usual = defaults(method=type(method), arch=config.model.arch, epochs=optim.epochs).optim
        parts.append(
            f"from weights, {optim.lr:g} with {optim.warmup_epochs:g} epochs of warm-up "
            f"(defaults from scratch: {usual.lr:g} and {usual.warmup_epochs:g})"
        )
    if optim.layer_decay < 1:
        first = f"the first, which gets {min(scales):.2g} of it"
        parts.append(f"times {optim.layer_decay:g} per layer of the backbone, from the last to {first}")
    return "; ".join(parts) or None


def views(augmentation: Augmentation, image_size: int) -> str:
    """Describe the number and sizes of the views in one line."""
    counts = Counter(view.side(image_size) for view in augmentation.views)
    told = ", ".join(f"{count} of {side} pixels" for side, count in counts.items())
    other = f"; the network is built for --image-size {image_size}, and evaluated at it"
    return told + (other if image_size not in counts else "")


def part(source: Source, labelled: Mapping[str, int]) -> str | None:
    """Describe the part of the labelled images that evaluations use; None if they use all."""
    if source.scored == labelled:
        return None
    bank, test = (f"{source.scored[name]:,} of {labelled[name]:,} images" for name in ("bank", "test"))
    return f"the kNN bank has {bank}, and the test set {test} (--eval-images)"


def cautions(config: Config, method: Method[Any], schedule: Schedule, images: int) -> Iterator[str]:
    """Yield warnings about the settings at the start of the run."""
    yield from without_effect(config, type(method))
    yield from method.cautions(schedule.batch_size // schedule.accumulate, images)
    start = config.method.teacher_momentum
    horizon = 1 / (1 - start) if start < 1 else float("inf")
    if horizon > schedule.span / 10:
        yield (
            f"the teacher averages over {horizon:,.0f} steps (--teacher-momentum {start:g}), more than a tenth of the "
            f"{schedule.span:,} steps of the run: it will lag; "
            f"--teacher-momentum {max(0.0, 1 - 10 / schedule.span):.2g} averages over a tenth"
        )


def without_effect(config: Config, kind: type[Method[Any]]) -> Iterator[str]:
    """Yield warnings about changed settings that this run does not use."""
    usual = defaults(
        recipe=config.run.recipe, method=kind, arch=config.model.arch, epochs=config.optim.epochs,
        init_from=config.model.init_from,
    ).flat()  # fmt: skip
    given = config.flat()
    changed = [name for name, value in given.items() if value != usual[name]]
    for name in changed if "uses" in vars(kind) else ():
        users = [other for other in names() if name in find(other).uses]
        if users and name not in kind.uses:
            read = f"only {' and '.join(users)} read{'s' * (len(users) == 1)} it"
            yield f"{flag(name)} {given[name]} has no effect with --method {kind.name}: {read}"
    needs = {
        "clip_each": ("--clip-norm", config.optim.clip_norm is not None),
        "init_partial": ("--init-from", config.model.init_from is not None),
        "trust_coefficient": ("--optimizer lars", config.optim.optimizer == "lars"),
        "residual_warmup_epochs": ("--residual-weight above 0", config.method.residual_weight > 0),
    }
    for name, (other, there) in needs.items():
        if name in changed and not there:
            yield f"{flag(name)} has no effect without {other}"
    frozen, epochs = config.method.freeze_prototypes_epochs, config.optim.epochs
    if "freeze_prototypes_epochs" in kind.uses and frozen >= epochs:
        yield f"the prototypes are never trained: --freeze-prototypes-epochs {frozen:g} of --epochs {epochs}"


def lengthened(schedule: Schedule, step: int, warmup_epochs: float) -> str:
    """Describe how the schedules of an extended run continue."""
    rates = schedule.at(step)
    return (
        f"the run is extended: its schedules now span {schedule.optim.epochs} epochs, and continue at epoch "
        f"{schedule.epoch(step):.0f} with a learning rate of {rates.lr:.4g} and a teacher momentum of "
        f"{rates.teacher_momentum:.6g}; the warm-up stays at {warmup_epochs:g} epochs"
    )


def ended(summary: Mapping[str, Any], out: Path, *, named: bool) -> Iterator[str]:
    """Scores beside those of what has learned nothing, where the weights are, and the next two commands.

    Args:
        summary: what ``summary.json`` holds.
        out: the run folder.
        named: whether the images have a place that a command can be given.
    """
    scores = [
        f"{words} {100 * summary[f'knn_{name}']:.1f} %" for name, words in _SCORED.items() if f"knn_{name}" in summary
    ]
    if scores:
        yield f"kNN        {', '.join(scores)}"
    for name, above in summary.get("knn_above_start", {}).items():
        low, high = (100 * end for end in above["interval"])
        yield f"           {name} {100 * above['value']:+.1f} points from the start weights ({low:+.1f} to {high:+.1f})"
    yield f"weights    {out / BACKBONE}"
    if needs_module(summary["arch"]):
        yield f'next       fastrm.load("{out}", arch={summary["arch"]}(…)), from Python'
        return
    wanted = "--knn --linear-quick" if scores else "--gap"
    yield f"next       python -m fastrm.evaluate {out} {wanted}" + ("" if named else " --data FOLDER")
    yield f"           python -m fastrm.export {out} --format safetensors --out {out.name}.safetensors"
