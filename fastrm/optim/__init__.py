"""Optimizers that update the teacher in the same pass, parameter groups, and schedules."""

from fastrm.optim._base import TeacherOptimizer
from fastrm.optim.adamw import AdamW
from fastrm.optim.groups import build_optimizer
from fastrm.optim.lamb import apex_problem, fused_lamb
from fastrm.optim.lars import LARS
from fastrm.optim.schedules import Schedule
from fastrm.optim.sgd import SGD

__all__ = ["LARS", "SGD", "AdamW", "Schedule", "TeacherOptimizer", "apex_problem", "build_optimizer", "fused_lamb"]
