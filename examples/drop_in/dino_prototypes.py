"""DINO's loss over prototypes on logits of every view; dino_prototypes.diff lets fastrm compute it without them."""

import copy

import torch
from host import Run
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize, softmax

PROTOTYPES = 16384


class Head(nn.Module):
    def __init__(self, width: int, bottleneck: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, bottleneck))
        self.last_layer = nn.Parameter(torch.randn(PROTOTYPES, bottleneck))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), normalize(self.last_layer, dim=1)


def loss_and_mean(student: Tensor, teacher: Tensor, own: Tensor, its: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    n = len(teacher) // 2
    logits = normalize(teacher, dim=1) @ its.T
    targets = softmax((logits - center) / 0.04, dim=1).split(n)
    logs = log_softmax(normalize(student, dim=1) @ own.T / 0.1, dim=1).split(n)
    terms = [-(q * p).sum(dim=1).mean() for u, q in enumerate(targets) for v, p in enumerate(logs) if u != v]
    return torch.stack(terms).mean(), logits.mean(dim=0)


def train(run: Run) -> nn.Module:
    """Train with the settings of ``run``, and return the teacher."""
    backbone = run.backbone()
    student = nn.Sequential(backbone, Head(backbone.num_features))
    teacher = copy.deepcopy(student).requires_grad_(False)
    center = torch.zeros(PROTOTYPES)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    for views, _ in run.batches([32, 32, 16, 16]):
        with torch.no_grad():
            targets, its = zip(*(teacher(view) for view in views[:2]), strict=True)
        outputs, own = zip(*(student(view) for view in views), strict=True)
        with run.part("loss"):
            loss, mean = loss_and_mean(torch.cat(outputs), torch.cat(targets), own[0], its[0], center)
        optimizer.zero_grad()
        with run.part("backward"):
            loss.backward()
        optimizer.step()
        with torch.no_grad():
            center.lerp_(mean, 0.1)
            for param_q, param_k in zip(student.parameters(), teacher.parameters(), strict=True):
                param_k.lerp_(param_q, 0.004)
        run.end(loss)
    return teacher
