"""Score a pre-trained backbone, student and teacher side by side.

python -m fastrm.evaluate --checkpoint runs/digits-mocov3-test_resnet --data digits --knn --gap
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastrm import _cli, checkpoint
from fastrm.config import Config, check_path, check_range, from_flat
from fastrm.data import Source, eval_loader, open_source
from fastrm.data.sources import Images
from fastrm.device import choose_device
from fastrm.errors import UsageError
from fastrm.kernels import residual_loss
from fastrm.methods import Method, build_method

KNN_TEMPERATURE = 0.07
KNN_NEIGHBOURS = (20, 200)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    neighbours: Sequence[int] = KNN_NEIGHBOURS,
    temperature: float = KNN_TEMPERATURE,
) -> dict[int, float]:
    """Weighted kNN accuracy: the nearest by cosine vote with exp(cosine / temperature) (Wu et al., arXiv 1805.01978).

    Args:
        bank: [N, D] features that neighbours are looked up in; normalised here.
        bank_labels: int64 [N].
        test: [M, D] features to be classified.
        test_labels: int64 [M].
        neighbours: the k to score; a bank of fewer rows votes with all of them.
        temperature: of the votes.

    Returns:
        Accuracy from 0 to 1 by k. Memory beside the features is constant in M.
    """
    bank, test = nn.functional.normalize(bank, dim=1), nn.functional.normalize(test, dim=1)
    classes = int(max(bank_labels.max(), test_labels.max())) + 1
    correct = dict.fromkeys(neighbours, 0)
    rows = max(1, 2**26 // len(bank))  # 256 MiB of similarities
    for part, labels in zip(test.split(rows), test_labels.split(rows), strict=True):
        similarity, index = (part @ bank.T).topk(min(max(neighbours), len(bank)), dim=1)
        votes, voted = (similarity / temperature).exp(), bank_labels[index]
        for k in neighbours:
            tally = votes.new_zeros(len(part), classes).scatter_add_(1, voted[:, :k], votes[:, :k])
            correct[k] += int((tally.argmax(dim=1) == labels).sum())
    return {k: n / len(test) for k, n in correct.items()}


@torch.no_grad()
def features(backbone: nn.Module, images: Images, config: Config, device: torch.device, workers: int) -> Tensor:
    """Pooled features [N, C] of all images, float32, in evaluation mode."""
    was_training = backbone.training
    backbone.eval()
    loader = eval_loader(images, image_size=config.input.image_size, batch_size=256, workers=workers)
    parts = [backbone(batch.to(device, non_blocking=True))[0].float() for batch in loader]
    backbone.train(was_training)
    return torch.cat(parts)


def knn(method: Method[Any], source: Source, config: Config, device: torch.device, workers: int) -> dict[str, float]:
    """kNN accuracy of both backbones: ``knn_student``, ``knn_teacher`` (k = 20), ``knn200_…`` (k = 200)."""
    if source.bank is None or source.test is None:
        raise UsageError(f"{source.name} has no labels, which kNN needs")
    labels = [torch.as_tensor(images.labels, device=device) for images in (source.bank, source.test)]
    scores = {}
    for name in ("student", "teacher"):
        backbone = getattr(method, name).backbone
        bank, test = (features(backbone, images, config, device, workers) for images in (source.bank, source.test))
        accuracy = knn_accuracy(bank, labels[0], test, labels[1])
        scores[f"knn_{name}"], scores[f"knn200_{name}"] = accuracy[20], accuracy[200]
    return scores


@torch.no_grad()
def gap(method: Method[Any], images: Images, config: Config, device: torch.device, workers: int) -> dict[str, float]:
    """1 - mean cosine between student and teacher on the same picture, at each place of ``--residual-at``.

    Networks in evaluation mode, pictures without augmentation; the gap that training logs is on augmented views in
    training mode.
    """
    method.eval()
    total = dict.fromkeys(("output", "projector", "backbone"), 0.0)
    for batch in eval_loader(images, image_size=config.input.image_size, batch_size=256, workers=workers):
        views = batch.to(device, non_blocking=True)
        student, teacher = method.encode_student(views), method.teacher(views)
        for place in total:
            ours, theirs = getattr(student, place), getattr(teacher, place)
            total[place] += float(residual_loss(ours, theirs, reduction="sum")) / 2
    method.train()
    return {f"gap_{place}": value / len(images) for place, value in total.items()}


def load_run(path: Path, device: torch.device) -> tuple[Config, Method[Any], dict[str, Any]]:
    """Rebuild the networks of a run from its checkpoint.

    Returns:
        The run's settings, its method with student and teacher, and the whole checkpoint.

    Raises:
        UsageError: the checkpoint is missing, damaged or of another layout.
    """
    state = checkpoint.load(path)
    config = from_flat(state["config"])
    method = build_method(config, device=device)
    try:
        method.load_state_dict(state["method"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} does not fit its own settings: {str(error).splitlines()[0]}") from None
    return config, method, state


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score the student and the teacher of a run side by side."""

    checkpoint: Path
    """A run folder or a checkpoint file."""
    data: str | None = None
    """Images to score on, as for fastrm.train; unset: the run's."""
    data_root: Path | None = None
    """Where a named set lies; unset: the run's."""
    knn: bool = False
    """Weighted kNN accuracy (cosine, temperature .07) for k 20 and 200."""
    gap: bool = False
    """1 - mean cosine between student and teacher on the same picture."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one."""
    workers: int = 2
    """Processes that read the images."""


def evaluate(options: EvaluateConfig) -> dict[str, float]:
    """Return the scores that are asked for.

    Raises:
        UsageError: the checkpoint or the data cannot be used.
    """
    if not (options.knn or options.gap):
        raise UsageError("say what to score: --knn, --gap, or both")
    check_range("workers", options.workers)
    check_path("checkpoint", options.checkpoint)
    device = choose_device(options.device)
    config, method, _ = load_run(options.checkpoint, device)
    root = options.data_root or config.input.data_root
    source = open_source(options.data or config.input.data, root)
    scores: dict[str, float] = {}
    if options.knn:
        scores |= knn(method, source, config, device, options.workers)
    if options.gap:
        scores |= gap(method, source.test or source.train, config, device, options.workers)
    return scores


def _table(scores: dict[str, float]) -> str:
    rows = []
    if "knn_student" in scores:
        rows += [f"{'':14}{'student':>10}{'teacher':>10}"]
        rows += [
            f"kNN, k = {k:<5}{scores[f'{prefix}_student']:>10.4f}{scores[f'{prefix}_teacher']:>10.4f}"
            for k, prefix in ((20, "knn"), (200, "knn200"))
        ]
    rows += [f"{name.replace('_', ' at '):<24}{value:>10.4f}" for name, value in scores.items() if "gap" in name]
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    print(_table(evaluate(_cli.parse(EvaluateConfig, argv, prog="python -m fastrm.evaluate"))))


if __name__ == "__main__":
    _cli.run(main)
