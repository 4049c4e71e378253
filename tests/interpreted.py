"""Run the Triton cases of a test file on the GPU if there is one, else in Triton's interpreter.

Triton chooses its interpreter for a whole process when it is imported, and the other tests need the real compiler. So
the cases of each file run in a process of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrm.kernels.dispatch import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

TRITON = pytest.param("triton", marks=() if INTERPRETED else pytest.mark.gpu)
BACKENDS = ["reference", "cpu", TRITON]
# For cases that the interpreter takes long to run, if quicker ones cover the same behaviour.
SLOW_TRITON = pytest.param("triton", marks=[*TRITON.marks, *([pytest.mark.slow] if INTERPRETED else [])])


def with_backends(cases: Iterable[str], often: Collection[str]) -> list[Any]:
    """Parameters (case, backend) for the CPU and Triton. In the interpreter, cases not in ``often`` are marked slow."""
    return [
        pytest.param(case, *backend.values, marks=backend.marks, id=f"{case}-{backend.values[0]}")
        for case in cases
        for backend in (pytest.param("cpu"), TRITON if case in often else SLOW_TRITON)
    ]


@contextlib.contextmanager
def other_defaults(kind: str) -> Iterator[None]:
    """Set torch's default dtype to that of ``kind``, or its default device to "meta", where nothing is computed."""
    before = torch.get_default_dtype()
    with torch.device("meta" if kind == "device" else "cpu"):
        torch.set_default_dtype(torch.float32 if kind == "device" else getattr(torch, kind))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


DEFAULTS = ["float64", "float16", "device"]


def device_of(backend: str) -> torch.device:
    """The device of the tensors of a case. Skips a Triton case without a GPU outside the interpreter."""
    if backend != "triton":
        return torch.device("cpu")
    if DEVICE.type == "cpu" and not INTERPRETED:
        pytest.skip("no GPU; test_triton_cases_in_the_interpreter runs this case")
    return DEVICE


class Launches:
    """A kernel that appends its name to ``counts`` at each launch."""

    def __init__(self, kernel: Any, counts: list[str], name: str) -> None:
        self.kernel, self.counts, self.name = kernel, counts, name

    def __getitem__(self, grid: Any) -> Any:
        self.counts.append(self.name)
        return self.kernel[grid]


often_and_slow = pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


def run_triton_cases(file: str, cases: str = "not slow") -> None:
    """Run the Triton cases of a test file in the interpreter. ``cases`` is a pytest marker expression."""
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
    """A process that has imported the test modules once: the imports take longer than the cases of many files."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.interpreted"], env={**os.environ, "TRITON_INTERPRET": "1"}, text=True, bufsize=1,
        cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _serve() -> None:
    """For each line of stdin, fork a process that runs pytest with the given arguments and writes to the given file.

    A line is a JSON list of the name of the output file and the arguments. The exit status goes to stdout.
    """
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
