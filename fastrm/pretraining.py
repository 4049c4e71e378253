"""Pre-training from Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastrm.data import Augmentation
from fastrm.methods import Method
from fastrm.run.trainer import Result, Trainer


def pretrain(
    data: Any,
    *,
    arch: str | nn.Module | None = None,
    method: str | type[Method[Any]] | None = None,
    augmentation: Augmentation | str | Path | Callable[[Any], Sequence[Any]] | None = None,
    hooks: Iterable[Any] = (),
    out: str | Path | None = None,
    **settings: Any,
) -> Result:
    """Pre-train an image backbone, as ``python -m fastrm.train`` does.

    Args:
        data: images. A value of ``--data``, a map-style Dataset of images or (image, label) pairs, a list of paths, or
            an array [N, H, W, C].
        arch: backbone. A timm name, or a module that maps images [B, C, H, W] to features [B, D] or a map [B, D, h, w];
            the module is copied. None means that of the recipe, or ResNet-50.
        method: a name, or a subclass of :class:`fastrm.methods.Method`. None means that of the recipe, or MoCo-v3.
        augmentation: an :class:`fastrm.data.Augmentation`; a value of ``--augmentation``, which is a TOML file, a run's
            ``config.json``, or for example ``2x224,8x96``; or a callable that maps one image to a tuple of views
            [C, H, W], as many as the method takes. None means that of the method.
        hooks: called in addition to the built-in hooks (:class:`fastrm.hooks.Hook`).
        out: the run folder; None means ``runs/DATA-METHOD-ARCH``. A run in this folder continues.
        settings: any flag of the command line by its name, with underscores.

    Returns:
        The trained backbones, the scores and the folder.

    Raises:
        UsageError: an argument, the data, the machine or the folder does not allow the run; nothing was written.
        TrainingError: the run cannot continue; what was saved before is kept.
    """
    trainer = Trainer(data, arch=arch, method=method, augmentation=augmentation, hooks=hooks, out=out, **settings)
    return trainer.fit()
