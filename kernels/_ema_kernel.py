"""The moving average on a GPU: the kernel, and the launches for one list of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import compute_dtype, tl, triton
from .multi_tensor import BLOCK, DTYPES, WARPS, Mirror, addresses, cut, flat, guard, host_value, launchable
from .pairing import taken

if triton is not None:
    from .multi_tensor import average_, fetch, locate, operand

    @triton.jit
    def _ema_chunk(
        row_ptr,
        start,
        stop,  # None for a whole block at 16-byte addresses
        momentum,
        rest,
        TEACHER: tl.constexpr,
        STUDENT: tl.constexpr,
        SHADOW: tl.constexpr,
        COMPUTE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        offsets = tl.arange(0, BLOCK)
        mask = None if stop is None else offsets < stop - start
        student = fetch(operand(row_ptr, 0, start, mask, STUDENT), offsets, mask, COMPUTE)
        average_(row_ptr, 1, start, offsets, mask, student, momentum, rest, TEACHER, SHADOW)

    @triton.jit
    def _ema_kernel(
        table_ptr,  # a row: student, teacher, shadow
        chunks_ptr,
        momentum,  # a number, or the address of one
        rest,  # 1 - momentum, where momentum is a number
        TEACHER: tl.constexpr,
        STUDENT: tl.constexpr,
        SHADOW: tl.constexpr,
        COMPUTE: tl.constexpr,
        MOMENTUM_IN_MEMORY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row_ptr, start, stop, aligned = locate(table_ptr, chunks_ptr, 3, 3)
        if MOMENTUM_IN_MEMORY:
            momentum = tl.load(momentum).to(COMPUTE)
            rest = 1 - momentum
        # Whole chunks at 16-byte addresses move in 128-bit loads and stores; the tail of a tensor and a misaligned
        # tensor go element by element.
        if (stop - start == BLOCK) & aligned:
            _ema_chunk(row_ptr, start, None, momentum, rest, TEACHER, STUDENT, SHADOW, COMPUTE, BLOCK)
        else:
            _ema_chunk(row_ptr, start, stop, momentum, rest, TEACHER, STUDENT, SHADOW, COMPUTE, BLOCK)


class OnTriton:
    """Launches for one list of tensors, one for each combination of dtypes. Holds addresses, not tensors."""

    def __init__(self, teacher: Sequence[Tensor], student: Sequence[Tensor], shadow: Sequence[Tensor] | None) -> None:
        self.copied: list[int] = []  # integer tensors
        self.odd: list[int] = []  # dtypes or layouts that the kernel does not know: left to the reference
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
            operands = (t, s) if shadow is None else (t, s, shadow[i])
            if t.numel() == 0:
                continue
            if not t.is_floating_point():
                self.copied.append(i)
            elif launchable(*operands) and flat(*operands):
                dtypes = t.dtype, s.dtype, None if shadow is None else shadow[i].dtype
                groups.setdefault((t.device, *dtypes, compute_dtype(*operands)), []).append(i)
            else:
                self.odd.append(i)
        self.launches = []
        for key, members in groups.items():
            lists = (x and taken(x, members) for x in (student, teacher, shadow))
            table = Mirror(key[0]).update(addresses(*lists))
            chunks = Mirror(key[0]).update(cut([teacher[i].numel() for i in members], [BLOCK] * len(members)))
            kinds = [DTYPES[dtype] for dtype in key[1:]]
            self.launches.append((key[0], key[-1], kinds, len(chunks), table, chunks))

    def __call__(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        momentum: float | Tensor,
        shadow: Sequence[Tensor] | None,
    ) -> None:
        for device, compute, kinds, count, table, chunks in self.launches:
            m = _on_device(momentum, device, compute)
            with guard(device):
                _ema_kernel[(count,)](
                    table,
                    chunks,
                    m,
                    0.0 if isinstance(m, Tensor) else 1 - m,  # in double, then rounded once
                    *kinds,
                    isinstance(m, Tensor),
                    BLOCK,
                    num_warps=WARPS,
                )
        torch.autograd.graph.increment_version(teacher)  # what autograd saved of a teacher is no longer so
        if self.copied or self.odd:
            self._rest(teacher, student, momentum, shadow)

    @torch.no_grad()
    def _rest(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        momentum: float | Tensor,
        shadow: Sequence[Tensor] | None,
    ) -> None:
        if self.copied:
            torch._foreach_copy_(taken(teacher, self.copied), taken(student, self.copied))
            if shadow is not None:
                torch._foreach_copy_(taken(shadow, self.copied), taken(student, self.copied))
        if self.odd:
            odd_shadow = None if shadow is None else taken(shadow, self.odd)
            reference.ema_(taken(teacher, self.odd), taken(student, self.odd), momentum, odd_shadow)


def _on_device(momentum: float | Tensor, device: torch.device, compute: torch.dtype) -> float | Tensor:
    """``momentum`` as the kernel takes it: a float is an argument, in float32; float64 has to be read from memory."""
    if isinstance(momentum, Tensor):
        on_host = momentum.device.type == "cpu" and device.type == "cuda"
        if on_host:
            return _on_device(host_value("fused_ema_", "momentum", momentum), device, compute)
        return momentum.to(device)
    return torch.full((), momentum, dtype=compute, device=device) if compute == torch.float64 else float(momentum)
