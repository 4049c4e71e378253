"""Triton cases: on the GPU where there is one, else in Triton's interpreter, in a process of its own for each file.

The interpreter is chosen when Triton is imported, for a whole process; the other tests need the real compiler.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from functools import cache
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


class Launches:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel: Any, counts: list[str], name: str) -> None:
        self.kernel, self.counts, self.name = kernel, counts, name

    def __getitem__(self, grid: Any) -> Any:
        self.counts.append(self.name)
        return self.kernel[grid]


often_and_slow = pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


def run_triton_cases(file: str, cases: str = "not slow") -> None:
    """Run the Triton cases of a test file in the interpreter: those that are not marked slow, or those that are."""
    if INTERPRETED:
        pytest.skip("this is that run")
    server = _interpreter()
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as output:
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", "triton", "-m", cases, file]
        server.stdin.write(json.dumps([output.name, *arguments]) + "\n")
        status, said = server.stdout.readline(), output.read()
    assert status == "0\n", said
    assert " passed" in said, said


@cache
def _interpreter() -> Any:
    """A process that has imported what the tests need, which takes longer than the cases of many a file."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.interpreted"], env={**os.environ, "TRITON_INTERPRET": "1"}, text=True, bufsize=1,
        cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _serve() -> None:
    """For each line, the name of a file and arguments, fork a process in which pytest writes to the file."""
    importlib.import_module("tests.conftest")
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if (child := os.fork()) == 0:
            output = os.open(name, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(output, stream)
            status = pytest.main(arguments)
            sys.stdout.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
