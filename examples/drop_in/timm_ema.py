"""A classifier with timm's averaged copy of the weights; timm_ema.diff lets fastrm do the averaging."""

import torch
from host import Run
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy


def train(run: Run) -> nn.Module:
    """Train with the settings of ``run``, and return the averaged model."""
    model = run.backbone(classes=10)
    averaged = ModelEmaV3(model, decay=0.999, use_warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step, ((images,), labels) in enumerate(run.batches([32])):
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with run.part("teacher"):
            averaged.update(model, step=step)
        run.end(loss)
    return averaged.module
