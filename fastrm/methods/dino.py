"""DINO (Caron et al., arXiv 2104.14294): the student assigns a view to prototypes as the teacher does another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastrm.data.augmentation import Augmentation, View
from fastrm.kernels import prototype_cross_entropy, residual_loss
from fastrm.machine.distributed import mean
from fastrm.methods.base import Encoder, Encoding, Method, StepOutput
from fastrm.methods.protocol import LinearProtocol
from fastrm.methods.published import Recipe, asymmetric
from fastrm.methods.registry import register
from fastrm.models import Backbone, mlp
from fastrm.optim.schedules import Rates
from fastrm.settings.config import MethodConfig

CENTER_MOMENTUM = 0.9
SMALLEST = 0.05
"""Of a local view's share of the picture's area; the largest is the smallest one of the others."""

_ALL: Recipe = {
    "batch_size": 512,
    "epochs": 100,
    "warmup_epochs": 10.0,
    "min_lr": 1e-6,
    "clip_norm": 3.0,
    "clip_each": True,
    "teacher_momentum": 0.996,
    "teacher_momentum_end": 1.0,
    "temperature": 0.1,
    "hidden_dim": 2048,
    "output_dim": 256,
}
_VIT: Recipe = {
    **_ALL,
    "arch": "vit_small_patch16_224",
    "optimizer": "adamw",
    "lr": 5e-4,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "drop_path": 0.1,
    "crop_min": 0.4,
}
_WARMED: Recipe = {
    **_VIT,
    "batch_size": 1024,
    "teacher_temperature": 0.07,
    "teacher_temperature_warmup_epochs": 30.0,
    "norm_prototypes": False,
}
_R50: Recipe = {**_ALL, "arch": "resnet50", "optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4, "crop_min": 0.14}


class Prototypes(nn.Module):
    """The last layer: K directions, each of norm 1 or of a norm that is trained."""

    def __init__(self, count: int, dim: int, *, norm: bool) -> None:
        super().__init__()
        self.directions = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())
        self.norms = None if norm else nn.Parameter(torch.ones(count, 1))

    def forward(self) -> Tensor:
        """The prototypes [K, D]."""
        unit = normalize(self.directions, dim=1)
        return unit if self.norms is None else unit * self.norms


class DINOEncoder(Encoder):
    """Backbone, head up to its bottleneck, and the prototypes, which the loss takes by themselves."""

    def __init__(self, backbone: Backbone, projector: nn.Module, prototypes: Prototypes) -> None:
        super().__init__(backbone, projector)
        self.prototypes = prototypes


@register("dino")
class DINO(Method[Encoding]):
    """A head of three layers with GELU, a bottleneck that is normalised, and prototypes; the teacher has all of it.

    Its logits are centred by a running mean, which is no state of the teacher but of the method, and sharpened by a low
    temperature: against the two ways of collapse. The residual term is between the bottlenecks.
    """

    recipes: ClassVar = {
        "dino-vits16-100ep": _VIT,
        "dino-vits16-300ep": {**_WARMED, "epochs": 300},
        "dino-r50-100ep": _R50,
    }
    uses = frozenset(
        {"temperature", "teacher_temperature", "teacher_temperature_start", "teacher_temperature_warmup_epochs",
         "prototypes", "norm_prototypes", "freeze_prototypes_epochs"}
    )  # fmt: skip
    linear_protocol = LinearProtocol(lr=0.001, epochs=100)

    @classmethod
    def defaults(cls, arch: str) -> dict[str, Any]:
        """ResNets and RegNets have settings of their own; of the others, only ViTs get stochastic depth."""
        if "resne" in arch or arch.startswith("regnet"):
            return {**_R50, "batch_size": None}
        found = super().defaults(arch)
        return found if not arch or arch.startswith("vit_") else {**found, "drop_path": 0.0}

    @classmethod
    def augmentation(cls, crop_min: float) -> Augmentation:
        """BYOL's views."""
        return asymmetric(crop_min, "bicubic")

    @classmethod
    def local_views(cls, crop_min: float) -> tuple[View, ...]:
        """Eight, of parts of the picture that are smaller than those of the others."""
        largest = max(crop_min, SMALLEST)
        return 8 * (View(crop_scale=(SMALLEST, largest), saturation=0.2, interpolation="bicubic"),)

    def __init__(self, backbone: Backbone, config: MethodConfig, *, backend: str | None = None) -> None:
        hidden, out = config.hidden_dim, config.output_dim
        head = mlp((backbone.dim, hidden, hidden, out), gelu=True)
        for layer in head:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        prototypes = Prototypes(config.prototypes, out, norm=config.norm_prototypes)
        super().__init__(DINOEncoder(backbone, head, prototypes), config, backend=backend)
        self.temperature = config.temperature
        self.center: Tensor
        self.teacher_temperature: Tensor
        self.register_buffer("center", torch.zeros(config.prototypes))
        self.register_buffer("teacher_temperature", torch.tensor(config.teacher_temperature), persistent=False)

    def losses(
        self,
        students: Sequence[Encoding | None],
        teachers: Sequence[Encoding | None],
        residual_weight: Tensor,
        measure: bool,
    ) -> StepOutput:
        """All pairs of views in one operation, and the residual term on the views that both networks see."""
        ours = [student for student in students if student is not None]
        theirs = [teacher for teacher in teachers if teacher is not None]
        rows, keys = (torch.cat([encoding.output for encoding in side]) for side in (ours, theirs))
        own, logits = prototype_cross_entropy(
            rows,
            keys,
            self.student.prototypes(),
            self.center,
            student_temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            pairs=pairs_of(len(ours), len(theirs), len(keys) // len(theirs), keys.device),
            teacher_prototypes=self.teacher.prototypes().detach(),
            backend=self.backend,
        )
        same = list(zip(ours, theirs, strict=False))
        loss, residual, gap = own, None, None
        if self.trains_residual:
            residual = torch.stack([self.residual(*pair) for pair in same]).mean()
            loss = own + residual_weight * residual
        if measure:
            with torch.no_grad():
                if residual is None:
                    residual = torch.stack([self.residual(*pair) for pair in same]).mean()
                gap = torch.stack([residual_loss(s.output, t.output, backend=self.backend) for s, t in same]).mean() / 2
        return StepOutput(
            loss=loss,
            contrastive=own.detach(),
            residual=None if residual is None else residual.detach(),
            gap=gap,
            keys=(logits,),
            features=ours[0].backbone.detach(),
        )

    def set_rates(self, rates: Rates) -> None:
        """The teacher's temperature."""
        self.teacher_temperature.fill_(rates.teacher_temperature)

    def held(self) -> Iterable[nn.Parameter]:
        """The student's prototypes."""
        return [p for p in self.student.prototypes.parameters() if p.requires_grad]

    def push(self, keys: tuple[Tensor, ...], *, skip: Tensor | None = None) -> None:
        """Move the centre towards the mean of the teacher's logits in a micro-batch of all processes."""
        moved = self.center.lerp(mean(keys[0]).to(self.center.dtype), 1 - CENTER_MOMENTUM)
        self.center.copy_(moved if skip is None else torch.where(skip != 0, self.center, moved))


@lru_cache(maxsize=8)
def pairs_of(students: int, teachers: int, images: int, device: torch.device) -> Tensor:
    """Which row of the student's views is compared with which of the teacher's: int64 [P, 2].

    Rows are by view, and by image in each view; the teacher's views are the first of the student's.
    """
    views = [(s, t) for s in range(students) for t in range(teachers) if s != t]
    firsts = images * torch.tensor(views, device=device)
    return (firsts[:, None] + torch.arange(images, device=device)[:, None]).reshape(-1, 2)
