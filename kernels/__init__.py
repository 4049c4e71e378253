"""fastrm.kernels: the fused operations of momentum (student–teacher) methods, usable in any PyTorch trainer.

Every operation takes ``backend=None`` (choose by device), ``"triton"``, ``"cpu"`` or ``"reference"``. A backend that is
requested but not available raises an error that says why.
"""

from .augment import augment_views
from .averaged import ema_avg_fn
from .contrastive import info_nce, residual_info_nce, residual_loss
from .ema import EMA, fused_ema_
from .prototypes import prototype_cross_entropy
from .queue import FeatureQueue, enqueue_
from .tuning import tune_losses
from .view_parameters import ViewParameters

__all__ = [
    "EMA",
    "FeatureQueue",
    "ViewParameters",
    "augment_views",
    "ema_avg_fn",
    "enqueue_",
    "fused_ema_",
    "info_nce",
    "prototype_cross_entropy",
    "residual_info_nce",
    "residual_loss",
    "tune_losses",
]
