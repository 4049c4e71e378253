"""Optimizers that update the teacher in the same pass, and what sets their options."""

from .adamw import AdamW
from .lars import LARS
from .sgd import SGD

__all__ = ["LARS", "SGD", "AdamW"]
