"""Finds the setting that an unknown name stands for: a synonym from other programs, or a typing error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SYNONYMS = {
    "adam": "optimizer",
    "amp": "precision",
    "backbone": "arch",
    "base_lr": "lr",
    "batch": "batch_size",
    "bs": "batch_size",
    "checkpoint": "resume",
    "ckpt": "resume",
    "data_dir": "data",
    "data_path": "data",
    "dataset": "data",
    "dtype": "precision",
    "ema": "teacher_momentum",
    "ema_decay": "teacher_momentum",
    "fp16": "precision",
    "gpu": "device",
    "gpus": "device",
    "grad_accum": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "grad_clip": "clip_norm",
    "img_size": "image_size",
    "input_size": "image_size",
    "iterations": "max_steps",
    "k": "queue_size",
    "learning_rate": "lr",
    "logger": "log_to",
    "m": "teacher_momentum",
    "max_epochs": "epochs",
    "model": "arch",
    "moco_k": "queue_size",
    "moco_m": "teacher_momentum",
    "moco_t": "temperature",
    "momentum": "teacher_momentum",
    "network": "arch",
    "num_epochs": "epochs",
    "num_workers": "workers",
    "output": "out",
    "output_dir": "out",
    "pretrained": "init_from",
    "queue": "queue_size",
    "resolution": "image_size",
    "size": "image_size",
    "steps": "max_steps",
    "t": "temperature",
    "tau": "temperature",
    "warmup": "warmup_epochs",
    "wd": "weight_decay",
    "weights": "init_from",
}


def near(name: str, known: Iterable[str]) -> str | None:
    """The setting among ``known`` that was probably meant; None if none is similar."""
    names = list(known)
    plain = name.strip("-").replace("-", "_").lower()
    if (meant := SYNONYMS.get(plain)) in names:
        return meant
    return next(iter(difflib.get_close_matches(plain, names, n=1)), None)
