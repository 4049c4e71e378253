"""LAMB from NVIDIA's apex, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

_HOW = (
    "build NVIDIA's with its extensions: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation "
    "git+https://github.com/NVIDIA/apex"
)


def apex_problem() -> str | None:
    """Why NVIDIA apex's fused optimizers are not available, and what to do about it; ``None`` if they are.

    It does not import apex: another package of that name may do anything when it is imported.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return f"NVIDIA apex is not installed; {_HOW}"
    if not any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return f"the apex that is installed is another package of that name, from PyPI; pip uninstall apex, and {_HOW}"
    if importlib.util.find_spec("amp_C") is None:
        return f"NVIDIA apex is installed without its CUDA extensions; {_HOW}"
    return None


def fused_lamb() -> type[Any]:
    """``apex.optimizers.FusedLAMB``.

    Raises:
        ImportError: it is not installed, or another package called apex is; the message says how to get the right one.
    """
    if problem := apex_problem():
        raise ImportError(f"optimizer lamb: {problem}")
    return importlib.import_module("apex.optimizers").FusedLAMB
