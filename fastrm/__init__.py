"""fastrm: self-supervised image pre-training with residual momentum, and the fused operations under it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastrm.checkout import find_kernels
from fastrm.machine.threads import let_threads_sleep
from fastrm.version import __version__ as __version__

find_kernels()
let_threads_sleep()

if TYPE_CHECKING:
    from fastrm.pretrained import load as load
    from fastrm.pretraining import pretrain as pretrain
    from fastrm.run.trainer import Trainer as Trainer

_HOME = {"load": "fastrm.pretrained", "pretrain": "fastrm.pretraining", "Trainer": "fastrm.run.trainer"}


def __getattr__(name: str) -> Any:
    """Import the Python API on first use, so that programs that only use operations do not import the trainer."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
