"""Reports what this machine will use, and for missing parts the reason and what to install.

python -m fastrm.doctor
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastrm.data import copies
from fastrm.data.dali import dali_problem, dali_trial
from fastrm.machine.device import available_cores, choose_compile, choose_device, choose_precision, why_no_gpu
from fastrm.machine.memory import size as in_words
from fastrm.optim import apex_problem
from fastrm.settings import command_line
from fastrm.terminal import shell
from fastrm.version import __version__


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"cuda: {', '.join(names)}"
    return f"cpu, {available_cores()} cores: {why_no_gpu()}"


def _precision() -> str:
    return choose_precision("auto", _here())


def _here() -> torch.device:
    return choose_device("auto")


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed, and not needed without an NVIDIA GPU; on Linux it comes with torch"
    version = importlib.metadata.version("triton")
    if not torch.cuda.is_available():
        return f"{version}, not used: {why_no_gpu()}"
    return version


def _kernels() -> str:
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        return "triton: fused, one or two launches per operation"
    if torch.cuda.is_available():
        return "reference (plain PyTorch), since Triton is not installed"
    return "cpu: foreach and cache-blocked PyTorch; triton needs an NVIDIA GPU"


def _loader() -> str:
    dali = torch.cuda.is_available() and dali_problem() is None
    return f"memory for named sets; for files {'dali' if dali else f'torch, {min(available_cores(), 8)} processes'}"


def _dali() -> str:
    problem = dali_problem() or dali_trial(_here())
    return (
        f"not used: {problem}" if problem else f"{_version('nvidia-dali-cuda130') or _version('nvidia-dali-cuda120')}"
    )


def _compile() -> str:
    compiler = next((c for c in ("g++", "clang++", "cl") if shutil.which(c)), None)
    if compiler is None:
        return "not usable on the CPU: there is no C++ compiler; install g++"
    usual = "on unless --no-compile" if choose_compile("auto", _here()) else "off unless --compile"
    return f"usable ({compiler}), {usual} is given"


def _apex() -> str:
    problem = apex_problem()
    return f"not used, needed for --optimizer lamb only: {problem}" if problem else "NVIDIA's, for --optimizer lamb"


def _distributed() -> str:
    if not torch.distributed.is_available():
        return "not in this torch"
    backends = [
        name
        for name, there in (
            ("nccl", torch.distributed.is_nccl_available()),
            ("gloo", torch.distributed.is_gloo_available()),
        )
        if there
    ]
    return f"{', '.join(backends)} available; start several processes with torchrun"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _copies() -> str:
    if not (size := copies.held()):
        return f"none in {copies.root()}"
    return f"{in_words(size)} of tables and remote files in {copies.root()}; delete it to free space"


PARTS: dict[str, Callable[[], str]] = {
    "fastrm": lambda: f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}",
    "device": _device,
    "precision": _precision,
    "kernels": _kernels,
    "triton": _triton,
    "loader": _loader,
    "dali": _dali,
    "compile": _compile,
    "apex": _apex,
    "distributed": _distributed,
    "copies": _copies,
}


@dataclass(frozen=True)
class DoctorConfig:
    """Report what this machine will use, and what is missing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line per part."""
    command_line.parse(DoctorConfig, argv, prog="python -m fastrm.doctor")
    for name, part in PARTS.items():
        print(f"{name:<13}{part()}")


if __name__ == "__main__":
    shell.run(main)
