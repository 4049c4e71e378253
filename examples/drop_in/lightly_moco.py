"""MoCo from lightly's parts, with residual momentum by its cosine loss; lightly_moco.diff replaces them by fastrm."""

import copy

import torch
from host import Run
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import update_momentum
from torch import nn


def train(run: Run) -> nn.Module:
    """Train with the settings of ``run``, and return the teacher."""
    backbone = run.backbone()
    student = nn.Sequential(backbone, MoCoProjectionHead(backbone.num_features, 512, 128))
    teacher = copy.deepcopy(student).requires_grad_(False)
    contrast = NTXentLoss(temperature=0.2, memory_bank_size=(16384, 128)).to(run.dtype)
    cosine = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    for (first, second), _ in run.batches():
        with run.part("teacher"):
            update_momentum(student, teacher, m=0.99)
        query = student(first)
        with torch.no_grad():
            key, same_view_key = teacher(second), teacher(first)
        with run.part("loss"):
            loss = contrast(query, key) + 2 + 2 * cosine(query, same_view_key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.end(loss)
    return teacher
