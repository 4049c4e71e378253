"""How the threads of fastrm's own commands wait for each other."""

from __future__ import annotations

import os
import sys


def let_threads_sleep() -> None:
    """Let OpenMP's threads sleep while they wait, in a command of fastrm's, unless the user has said how they wait.

    They spin otherwise, and beside other work a step then takes many times as long. OpenMP reads this once, as PyTorch
    is imported. A program that only imports fastrm is left as it is.
    """
    module = next((after for flag, after in zip(sys.orig_argv, sys.orig_argv[1:], strict=False) if flag == "-m"), "")
    if module.split(".")[0] == "fastrm":
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
