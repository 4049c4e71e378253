"""Resolves ``auto`` on this machine: device, precision, compilation, kernels."""

from __future__ import annotations

import os

import torch

from fastrm.errors import UsageError
from fastrm.kernels.dispatch import triton_problem
from fastrm.settings.config import check_value


def choose_device(wanted: str) -> torch.device:
    """``auto`` is the NVIDIA GPU if there is one, else the CPU; ``mps`` is an Apple GPU.

    Raises:
        UsageError: a GPU is requested and there is none, or the name is unknown.
    """
    check_value("device", wanted)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda cannot be used: {why_no_gpu()}; use --device cpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps cannot be used: torch finds no Apple GPU (Metal); use --device cpu")
    return torch.device(wanted)


def in_double(values: torch.Tensor) -> torch.Tensor:
    """The values in float64; on the CPU if they are on an Apple GPU, which has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def why_no_gpu() -> str:
    """Say why torch has no CUDA device."""
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "torch finds no CUDA device"


def choose_precision(wanted: str, device: torch.device) -> str:
    """``auto`` is bf16 on an NVIDIA GPU that supports it, fp16 on older ones, and fp32 on other devices.

    Raises:
        UsageError: the device does not support the requested precision, or the name is unknown.
    """
    check_value("precision", wanted)
    if device.type == "mps" and wanted not in ("auto", "fp32"):
        raise UsageError(f"--precision {wanted} needs an NVIDIA GPU or the CPU; with --device mps use fp32")
    if device.type in ("cpu", "mps"):
        if wanted == "fp16":
            raise UsageError("--precision fp16 needs a GPU; on the CPU use fp32 or bf16")
        return "fp32" if wanted == "auto" else wanted
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and not has_bf16:
        raise UsageError(f"--precision bf16: {torch.cuda.get_device_name(device)} does not have it; use fp16 or fp32")
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp16"
    return wanted


def choose_queue_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        UsageError: the name is unknown.
    """
    check_value("queue_dtype", wanted)
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]


def choose_compile(wanted: str, device: torch.device) -> bool:
    """``auto`` is on for a GPU with Triton, which torch.compile needs there, and off for the CPU.

    Raises:
        UsageError: it is neither auto, on nor off.
    """
    check_value("compile", wanted)
    return device.type == "cuda" and triton_problem(device) is None if wanted == "auto" else wanted == "on"


def check_cuda_graph(kernels: str, optimizer: str, device: torch.device, precision: str, processes: int) -> None:
    """Raise a UsageError unless the whole step of a run can be captured."""
    problems = {
        f"it needs a GPU: {why_no_gpu()}": device.type != "cuda",
        "it is for one process": processes > 1,
        f"--precision {precision} needs loss scaling by the host; use bf16 or fp32": precision == "fp16",
        "the host controls apex's LAMB; use another --optimizer": optimizer == "lamb",
        f"--kernels {kernels} reads values on the host": (
            device.type == "cuda" and (kernels in ("cpu", "reference") or triton_problem(device))
        ),
    }
    for problem, found in problems.items():
        if found:
            raise UsageError(f"--cuda-graph cannot be used: {problem}")


def choose_kernels(wanted: str, device: torch.device) -> str | None:
    """``auto`` lets fastrm.kernels choose the backend by device.

    Raises:
        UsageError: the backend cannot run here, or the name is unknown.
    """
    check_value("kernels", wanted)
    if wanted == "auto":
        return None
    from fastrm.kernels import enqueue_

    try:
        # Ask the operation itself, with one row.
        enqueue_(
            torch.zeros(1, 1, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.ones(1, 1, device=device),
            backend=wanted,
        )
    except ValueError as error:
        raise UsageError(f"--kernels {wanted} cannot be used: {error}") from None
    return wanted


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
