"""The choice of backend for an operation, and checks that all operations share."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

BACKENDS = ("triton", "cpu", "reference")

# The one place that imports Triton: without it (macOS, Windows) everything else still works.
_installed = importlib.util.find_spec("triton") is not None
triton: Any = importlib.import_module("triton") if _installed else None
tl: Any = importlib.import_module("triton.language") if _installed else None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # fixed by the first import of Triton

Implementations = Mapping[str, Callable[..., Any]]


def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``, or None if it can."""
    if triton is None:
        return "Triton is not installed; it comes with torch on Linux"
    if device.type == "cuda" or INTERPRETED:
        return None
    return f"the tensors are on {device}; Triton needs a CUDA device, or TRITON_INTERPRET=1 before Python starts"


def check_backend(op: str, backend: str | None) -> None:
    """Raise unless ``backend`` is ``None`` or a backend's name."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{op}: backend={backend!r} is unknown; choose None or one of {', '.join(BACKENDS)}")


def choose(op: str, backend: str | None, implementations: Implementations, device: torch.device) -> Callable[..., Any]:
    """Return the implementation of ``op`` for a backend name on ``device``.

    Raises:
        ValueError: the name is unknown, ``op`` has no such backend, or it cannot run here.
    """
    if backend is None:
        wanted = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")
        missing = wanted not in implementations or (wanted == "triton" and triton is None)
        return implementations["reference" if missing else wanted]
    check_backend(op, backend)
    if backend not in implementations:
        raise ValueError(f"{op}: backend={backend!r} does not exist yet; available: None, {', '.join(implementations)}")
    if backend == "triton" and (problem := triton_problem(device)):
        raise ValueError(f"{op}: backend='triton' cannot run: {problem}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"{op}: backend='cpu' cannot run: the tensors are on {device}")
    return implementations[backend]


def has_tangent(tensor: Tensor) -> bool:
    """Whether ``tensor`` carries a tangent of forward-mode AD at the current level."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def choose_derivable(
    op: str, backend: str | None, implementations: Implementations, query: Tensor
) -> Callable[..., Any]:
    """Like :func:`choose`, for an ``op`` whose fused backends provide only the first derivative, by backward().

    Under torch.func or forward-mode AD, the default backend is the reference.
    """
    if not (torch._C._are_functorch_transforms_active() or has_tangent(query)):
        return choose(op, backend, implementations, query.device)
    check_backend(op, backend)
    if backend not in (None, "reference"):
        raise ValueError(
            f"{op}: backend={backend!r} has no rule for torch.func transforms and forward-mode AD; "
            "pass backend='reference', or leave it out"
        )
    return implementations["reference"]


def check_once(op: str) -> None:
    """Raise if the caller's code may run more or less often than once, which would break in-place updates."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{op}: tensors are changed in place, which torch.func does not support; call it outside")
    if not torch.compiler.is_compiling():  # otherwise the operator checks, when compiled and when run
        check_not_recomputed(op)


def check_not_recomputed(op: str) -> None:
    """The part of :func:`check_once` for operators and their fake versions, which the compiler calls.

    A function under torch.utils.checkpoint, or a similar function of another library, runs again in a node of the
    backward pass; this is detected. Hooks on a parameter's gradient, which may step an optimizer, run in the node that
    accumulates it.
    """
    node = torch._C._current_autograd_node()
    again = node is not None and node.name() != "torch::autograd::AccumulateGrad"
    frame = None if again else sys._getframe()
    while frame is not None:
        again = again or frame.f_code.co_filename == checkpoint.__file__
        frame = frame.f_back
    if again:
        raise RuntimeError(
            f"{op}: called under activation checkpointing or in a backward pass; the forward pass is computed again "
            "there, and tensors would be changed twice; call it outside of the checkpointed function"
        )


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of the computation: float32, or float64 where an input is float64."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Keep an enclosing autocast from lowering the precision that an operation promises."""
    if device.type == "meta":  # nothing is computed there, and torch has no autocast for it
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def check_strided(op: str, name: str, tensor: Tensor, *, waiting: bool = False) -> None:
    """Raise unless ``tensor`` is a dense tensor, whose elements are in memory.

    ``waiting`` also allows the result of a functional collective, for operators that wait for it.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} has layout {tensor.layout}; it must be a dense tensor")
    if torch.compiler.is_compiling():  # it cannot trace the following checks
        return
    if is_lazy(tensor):
        raise ValueError(f"{op}: {name} belongs to a lazy layer and has no shape yet; call forward of its model first")
    if tensor.is_nested or tensor.is_quantized:
        raise TypeError(f"{op}: {name} is {'nested' if tensor.is_nested else 'quantized'}; it must be a dense tensor")
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        known = {"FakeTensor", "FunctionalTensor", *(("AsyncCollectiveTensor",) if waiting else ())}
        if kind.__name__ not in known:
            hint = "; pass its to_local() or full_tensor()" if kind.__name__ == "DTensor" else ""
            raise TypeError(f"{op}: {name} is a {kind.__name__}; it must be a plain tensor{hint}")
    if tensor.is_neg():
        raise ValueError(f"{op}: {name} is a view of a complex conjugate, negated when read; pass {name}.resolve_neg()")


def check_writable(op: str, name: str, tensor: Tensor) -> None:
    """Raise if ``tensor`` cannot be written here, or its elements overlap in memory, so that not all can be written."""
    if not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{op}: {name} was made in torch.inference_mode, and can be written only there; pass a clone() of it"
        )
    if tensor.numel() == 0:
        return
    reach = 1  # elements from the first to the last of the inner dimensions
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride == 0:
            raise ValueError(f"{op}: {name} is expanded (a stride is 0), so its elements cannot be written")
        if stride < reach:
            raise ValueError(
                f"{op}: {name}, of shape {tuple(tensor.shape)} and strides {tensor.stride()}, has elements that "
                "overlap in memory, so they cannot be written"
            )
        reach += stride * (size - 1)


def check_rows(
    op: str, name: str, tensor: Tensor, *, dim: int | None = None, device: torch.device | None = None
) -> None:
    """Raise unless ``tensor`` is a floating [rows, dim] matrix, on ``device`` if one is given."""
    check_strided(op, name, tensor, waiting=True)
    shape = tuple(tensor.shape)
    if tensor.ndim != 2 or (dim is not None and shape[1] != dim):
        raise ValueError(f"{op}: {name} has shape {shape}; it must be [rows, {'D' if dim is None else dim}]")
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} is {tensor.dtype}; it must be a floating dtype")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; it must be on {device} like the first argument")


def check_no_grad(op: str, name: str, tensor: Tensor) -> None:
    """Raise if ``tensor`` expects a gradient that ``op`` does not give."""
    if tensor.requires_grad:
        raise ValueError(f"{op}: {name} requires grad, but {op} gives it none; pass {name}.detach()")
    if has_tangent(tensor):
        raise ValueError(f"{op}: {name} has a tangent, but {op} is differentiable in its first argument only")


def check_scalar(
    op: str,
    name: str,
    value: float | Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> None:
    """Raise unless ``value`` is a finite number in [low, high], or a 0-d tensor, whose value is not read.

    ``open_low`` leaves ``low`` itself out. Reading a device tensor would make the host wait for the device.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; it must be a number or a 0-d tensor")
        if value.is_complex():
            raise TypeError(f"{op}: {name} is {value.dtype}; it must be real")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; it must be a number or a 0-d tensor")
    above = value > low if open_low else value >= low
    # Not math.isfinite, which torch.compile cannot trace for a float that changes between calls.
    if not (abs(value) <= sys.float_info.max and above and value <= high):
        wanted = [f"{'above' if open_low else 'at least'} {low:g}"] if low > -math.inf else []
        wanted += [f"at most {high:g}"] if high < math.inf else []
        raise ValueError(f"{op}: {name}={value} must be finite{''.join(', ' + w for w in wanted)}")


def check_number(op: str, name: str, value: float | Tensor, device: torch.device, **limits: Any) -> None:
    """Like :func:`check_scalar`, for a loss: a tensor must be on ``device`` or the CPU, and not require grad."""
    check_scalar(op, name, value, **limits)
    if isinstance(value, Tensor):
        check_no_grad(op, name, value)
        if value.device not in (device, torch.device("cpu")):
            raise ValueError(f"{op}: {name} is on {value.device}; it must be on {device} or on the CPU")
