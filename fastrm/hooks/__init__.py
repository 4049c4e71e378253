"""Hooks of a run: metrics, evaluations, checkpoints, verification and profile."""

from collections.abc import Callable, Mapping
from typing import Any

from fastrm.hooks.base import Hook, Hooks
from fastrm.hooks.checkpoints import Checkpoints
from fastrm.hooks.collapse import CollapseWatch
from fastrm.hooks.evaluation import KNN
from fastrm.hooks.exports import Exports
from fastrm.hooks.left_out import LeftOut
from fastrm.hooks.metrics import JsonLines
from fastrm.hooks.mlflow import MLflow
from fastrm.hooks.online import Online
from fastrm.hooks.profile import Profile
from fastrm.hooks.progress import Progress
from fastrm.hooks.tensorboard import TensorBoard
from fastrm.hooks.verification import Verification
from fastrm.hooks.wandb import WandB

__all__ = [
    "KNN",
    "Checkpoints",
    "CollapseWatch",
    "Exports",
    "Hook",
    "Hooks",
    "JsonLines",
    "LeftOut",
    "MLflow",
    "Online",
    "Profile",
    "Progress",
    "TensorBoard",
    "Verification",
    "WandB",
]

LOGGERS: Mapping[str, Callable[[], Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
"""Loggers by the names that ``--log-to`` takes."""
