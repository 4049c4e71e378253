"""Pre-train a backbone.

    python -m fastrm.train --arch resnet50 --data /imagenet

The loop is :meth:`fastrm.Trainer.fit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastrm.run.trainer import Trainer
from fastrm.settings.config import Config
from fastrm.settings.flags import read_flags
from fastrm.terminal import shell


def train(config: Config) -> dict[str, Any]:
    """Train as configured, and return the content of ``summary.json``.

    Raises:
        UsageError: a setting, the data, the machine or the output folder does not allow the run; nothing was written.
        TrainingError: the run cannot continue; what was saved before is kept.
    """
    return Trainer(**config.flat()).fit().scores


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    train(read_flags(argv))


if __name__ == "__main__":
    shell.run(main)
