"""fastrm.kernels: the fused operations of momentum (student–teacher) methods, usable in any PyTorch trainer.

Every operation takes ``backend=None`` (choose by device), ``"triton"``, ``"cpu"`` or ``"reference"``. A backend that is
requested but not available raises an error that says why.
"""

import importlib
import sys

if __name__ == "fastrm.kernels":
    from .augment import augment_views
    from .averaged import ema_avg_fn
    from .contrastive import info_nce, residual_info_nce, residual_loss
    from .ema import EMA, fused_ema_
    from .prototypes import prototype_cross_entropy
    from .queue import FeatureQueue, enqueue_
    from .tuning import tune_losses
    from .view_parameters import ViewParameters
else:
    # In a checkout this folder is also found as "kernels", a name that transformers looks for and imports. A second
    # copy of the modules would register the operators again, and torch would free those that the first copy calls.
    sys.modules[__name__] = importlib.import_module("fastrm.kernels")

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
