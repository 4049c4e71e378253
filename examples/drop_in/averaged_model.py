"""A classifier with torch's AveragedModel; averaged_model.diff lets fastrm do the averaging."""

import torch
from host import Run
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def train(run: Run) -> nn.Module:
    """Train with the settings of ``run``, and return the averaged model."""
    model = run.backbone(classes=10)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for (images,), labels in run.batches([32]):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with run.part("teacher"):
            averaged.update_parameters(model)
        run.end(loss)
    return averaged.module
