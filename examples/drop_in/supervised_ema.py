"""A classifier with a hand-written average of its weights; supervised_ema.diff moves it into the optimizer's step."""

import copy

import torch
from host import Run
from torch import nn
from torch.nn.functional import cross_entropy


def train(run: Run) -> nn.Module:
    """Train with the settings of ``run``, and return the averaged model."""
    model = run.backbone(classes=10)
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    for (images,), labels in run.batches([32]):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        with run.part("optimizer and teacher"):
            optimizer.step()
            with torch.no_grad():
                for average, param in zip(averaged.parameters(), model.parameters(), strict=True):
                    average.mul_(0.99).add_(param, alpha=0.01)
        for average, buffer in zip(averaged.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        run.end(loss)
    return averaged
