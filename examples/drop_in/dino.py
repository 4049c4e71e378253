"""DINO in the style of its official loop, with lightly's head and loss and two crops of each size."""

import torch
from host import Run
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch import nn


def train(run: Run) -> nn.Module:
    """Train with the settings of ``run``, and return the teacher."""
    backbones = run.backbone(), run.backbone()
    student, teacher = (nn.Sequential(net, DINOProjectionHead(net.num_features, 256, 64, 1024)) for net in backbones)
    teacher.requires_grad_(False).load_state_dict(student.state_dict())
    criterion = DINOLoss(output_dim=1024, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    for views, _ in run.batches([64, 64, 32, 32]):
        with torch.no_grad():
            targets = [teacher(view) for view in views[:2]]
        loss = criterion(targets, [student(view) for view in views], epoch=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad(), run.part("teacher"):
            for param_q, param_k in zip(student.parameters(), teacher.parameters(), strict=True):
                param_k.data.mul_(0.996).add_((1 - 0.996) * param_q.detach().data)
        run.end(loss)
    return teacher
