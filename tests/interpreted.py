"""Triton cases: on the GPU where there is one, else in Triton's interpreter, in a process of its own.

The interpreter is chosen when Triton is imported, for a whole process; the other tests need the real compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrm.kernels.dispatch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

TRITON = pytest.param("triton", marks=() if INTERPRETED else pytest.mark.gpu)
BACKENDS = ["reference", "cpu", TRITON]
# What takes the interpreter long, beside cases of the same behaviour that do not.
SLOW_TRITON = pytest.param("triton", marks=[*TRITON.marks, *([pytest.mark.slow] if INTERPRETED else [])])


def with_backends(cases: Iterable[str], often: Collection[str]) -> list[Any]:
    """(case, backend) on the CPU and with Triton; the interpreter runs the cases that are not ``often`` by night."""
    return [
        pytest.param(case, *backend.values, marks=backend.marks, id=f"{case}-{backend.values[0]}")
        for case in cases
        for backend in (pytest.param("cpu"), TRITON if case in often else SLOW_TRITON)
    ]


def device_of(backend: str) -> torch.device:
    """Where the tensors of a case lie."""
    if backend != "triton":
        return torch.device("cpu")
    if DEVICE.type == "cpu" and not INTERPRETED:
        pytest.skip("no GPU; test_triton_cases_in_the_interpreter runs this case")
    return DEVICE


often_and_slow = pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


def run_triton_cases(file: str, cases: str = "not slow") -> None:
    """Run the Triton cases of a test file in the interpreter: those that are not marked slow, or those that are."""
    if INTERPRETED:
        pytest.skip("this is that run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton", "-m", cases, file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
