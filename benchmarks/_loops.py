"""Training loops of other projects around the same networks: lightly, stable-pretraining, the official MoCo-v3."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks._timing import DEVICE
from fastrm.data import Source
from fastrm.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, View
from fastrm.methods import Method

Move = Callable[[], object]
"""Steps the optimizer, and clears the gradients."""
Loop = Callable[[Tensor, Tensor], None]
"""Trains on two views of a batch."""


class Transformed(Dataset[Any]):
    """Two views per image, made by worker processes for one image at a time, as these loops do."""

    def __init__(self, source: Source, first: Any, second: Any = None) -> None:
        self.images, self.first, self.second = source.train, first, second

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image = self.images.picture(index)
        return self.first(image) if self.second is None else (self.first(image), self.second(image))


def in_workers(data: Transformed, batch: int, workers: int) -> DataLoader[Any]:
    return DataLoader(data, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers)


def transform(view: View, size: int) -> v2.Compose:
    """The transforms of a view in torchvision."""
    blur = v2.GaussianBlur(5, tuple(s * size / 224 for s in view.blur_sigma))
    colour = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=view.crop_scale, antialias=True),
            v2.RandomApply([colour], p=view.jitter_probability),
            v2.RandomGrayscale(view.grayscale_probability),
            v2.RandomApply([blur], p=view.blur_probability),
            v2.RandomSolarize(128, p=view.solarize_probability),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def lightly_transform(view: View, size: int) -> Any:
    """lightly's transform of two views with the distribution of ``view``."""
    return importlib.import_module("lightly.transforms").MoCoV2Transform(
        input_size=size,
        cj_prob=view.jitter_probability,
        cj_strength=1.0,
        cj_bright=view.brightness,
        cj_contrast=view.contrast,
        cj_sat=view.saturation,
        cj_hue=view.hue,
        min_scale=view.crop_scale[0],
        random_gray_scale=view.grayscale_probability,
        gaussian_blur=view.blur_probability,
        sigmas=tuple(sigma * size / 224 for sigma in view.blur_sigma),
    )


class Pooled(nn.Module):
    """An encoder that returns its projection."""

    def __init__(self, inner: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.predictor = inner, predictor or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        projection: Tensor = self.predictor(self.inner(images).output)
        return projection


def lightly_loop(
    method: Method[Any], move: Move, *, queue: int, dim: int, temperature: float, momentum: Callable[[], float]
) -> Loop:
    """The loop of lightly's MoCo example, with its loss, memory bank and teacher update."""
    loss = importlib.import_module("lightly.loss").NTXentLoss(temperature=temperature, memory_bank_size=(queue, dim))
    update = importlib.import_module("lightly.models.utils").update_momentum
    student = Pooled(method.student)
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss = loss.to(DEVICE)

    def step(first: Tensor, second: Tensor) -> None:
        update(student, teacher, momentum())
        query = student(first)
        with torch.no_grad():
            key = teacher(second)
        loss(query, key).backward()
        move()

    return step


def mocov3_loop(method: Method[Any], move: Move, *, temperature: float, momentum: Callable[[], float]) -> Loop:
    """A loop in the style of MoCo-v3's official code: einsum, cross-entropy, and a Python loop for the teacher."""
    student = Pooled(method.student, method.predictor)
    teacher = Pooled(copy.deepcopy(student.inner)).requires_grad_(False)
    criterion = nn.CrossEntropyLoss()

    def contrast(query: Tensor, key: Tensor) -> Tensor:
        query, key = nn.functional.normalize(query, dim=1), nn.functional.normalize(key, dim=1)
        logits = torch.einsum("nc,mc->nm", query, key) / temperature
        loss: Tensor = criterion(logits, torch.arange(len(logits), device=DEVICE)) * 2 * temperature
        return loss

    def step(first: Tensor, second: Tensor) -> None:
        query = student(first), student(second)
        with torch.no_grad():
            kept = momentum()
            for ours, theirs in zip(student.inner.parameters(), teacher.inner.parameters(), strict=True):
                theirs.data = theirs.data * kept + ours.data * (1 - kept)
            key = teacher(first), teacher(second)
        (contrast(query[0], key[1]) + contrast(query[1], key[0])).backward()
        move()

    return step


def stable_pretraining_loop(
    method: Method[Any],
    move: Move,
    *,
    temperature: float,
    momentum: Callable[[], float],
    queue: int | None = None,
    dim: int = 1,
) -> Loop:
    """stable-pretraining's MoCo-v3, or with a queue MoCo-v2, around the same networks, without Lightning's trainer."""
    methods = importlib.import_module("stable_pretraining.methods")
    averaged = importlib.import_module("stable_pretraining.backbone").TeacherStudentWrapper
    backbone = method.student.backbone
    if queue is None:
        model = methods.MoCov3(backbone, projector_dims=(1, 1), temperature=temperature)
        model.predictor = method.predictor
    else:
        model = methods.MoCov2(backbone, projector_dims=(1, dim), temperature=temperature, queue_length=queue)
    model.projector = averaged(method.student.projector)
    model.to(DEVICE).train()

    def step(first: Tensor, second: Tensor) -> None:
        model(first, second).loss.backward()
        move()
        for part in (model.backbone, model.projector):
            part.ema_coefficient.fill_(momentum())
            part.update_teacher()

    return step


def stepped(optimizer: torch.optim.Optimizer) -> Move:
    """A step of a torch optimizer."""

    def move() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return move


def lars(parameters: list[nn.Parameter]) -> Move:
    """LARS, parameter by parameter, as in MoCo-v3's official code."""
    velocity = {p: torch.zeros_like(p) for p in parameters}

    @torch.no_grad()
    def move() -> None:
        for p, mu in velocity.items():
            assert p.grad is not None
            update = p.grad
            if p.ndim > 1:
                update = update.add(p, alpha=1e-6)
                norm, other = torch.norm(p), torch.norm(update)
                one = torch.ones_like(norm)
                update = update * torch.where(norm > 0, torch.where(other > 0, 0.001 * norm / other, one), one)
            mu.mul_(0.9).add_(update)
            p.add_(mu, alpha=-0.3)
            p.grad = None

    return move
