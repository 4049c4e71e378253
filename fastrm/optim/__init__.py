"""Optimizers, parameter groups and schedules."""

from torch.optim import SGD, AdamW

from fastrm.optim.groups import build_optimizer
from fastrm.optim.lars import LARS
from fastrm.optim.schedules import Schedule

__all__ = ["LARS", "SGD", "AdamW", "Schedule", "build_optimizer"]
