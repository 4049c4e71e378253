"""Sets how OpenMP threads wait in fastrm's commands."""

from __future__ import annotations

import os
import sys


def let_threads_sleep() -> None:
    """Let OpenMP threads sleep while they wait, in a command of fastrm, unless the user has set how they wait.

    Otherwise they spin, and beside other processes a step takes many times as long. OpenMP reads this once, when
    PyTorch is imported. A program that only imports fastrm is not affected.
    """
    module = next((after for flag, after in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if flag == "-m"), "")
    if module.split(".")[0] == "fastrm":
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
