"""Optimizer steps over all parameters in one launch, with the teacher update in the same pass.

fastrm.optim, which keeps the state and defines the rules, uses these launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ._seen import Forms
from .dispatch import compute_dtype, triton
from .multi_tensor import BLOCK, DTYPES, WARPS, Mirror, addresses, cut, guard, host_value, layout

if triton is not None:
    from ._optim_kernels import _adamw_kernel, _momentum_kernel, _norms_kernel

ON_DEVICE = math.nan
"""Marks an option that is on the device. In list comparisons, this object equals itself, and no number."""
MAX_SPANS = 128  # partial sums per tensor, which every program of the update adds up

Options = Sequence[Sequence["float | Tensor"]]


class Launch:
    """The launches of one rule over parameters of one device and the same dtypes: one launch, or two for LARS.

    Args:
        params: the parameters.
        state: lists aligned with the parameters, of their dtype; AdamW's step counts are float32 scalars.
        teacher, shadow: lists aligned with the parameters, or ``None``.
        batches: row of options per parameter.
    """

    def __init__(
        self,
        params: list[Tensor],
        state: Sequence[list[Tensor]],
        teacher: list[Tensor] | None,
        shadow: list[Tensor] | None,
        batches: list[int],
    ) -> None:
        self.columns: list[Any] = [params, None, *state, teacher, shadow]
        self.tensors = [tensor for column in self.columns for tensor in column or ()]
        self.forms = Forms(self.tensors)
        self.device, self.param = params[0].device, params[0].dtype
        partners = [x[0] if x else None for x in (teacher, shadow)]
        wide = compute_dtype(params[0], *partners)
        self.dtypes = [DTYPES[d] for d in (self.param, *(x.dtype if x is not None else None for x in partners), wide)]
        # Tensors that are not dense are staged in a dense copy, with the layout of empty_like.
        dense = [torch.empty_like(p, device="meta") for p in params]
        self.strides, self.layouts = [d.stride() for d in dense], [layout(d) for d in dense]
        self.odd = [
            (c, i)
            for c, column in enumerate(self.columns)
            for i, tensor in enumerate(column or ())
            if tensor.shape == params[i].shape and tensor.numel() and layout(tensor) != self.layouts[i]
        ]
        sizes = [p.numel() for p in params]
        self.fixed = [batches, *self._spans(params, sizes, wide)]
        self.table, self.options = Mirror(self.device), Mirror(self.device, torch.float64)
        self.chunks = Mirror(self.device).update(cut(sizes, [BLOCK] * len(sizes)))

    def lasts(self) -> bool:
        """Whether the launch still fits its tensors, none of which was converted to another dtype or layout."""
        return self.forms.fit(self.tensors)

    def _spans(self, params: list[Tensor], sizes: list[int], wide: torch.dtype) -> list[list[int]]:
        return [[0] * len(params), [0] * len(params)]

    def __call__(
        self, grads: list[Tensor], options: Options, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Make a step. If ``found_inf`` is not 0, nothing changes; the host does not wait for its value."""
        if not len(self.chunks):
            return
        columns = [*self.columns]
        columns[1] = grads
        staged = self._stage(columns)
        table = self.table.update(addresses(*columns) + self.fixed)
        with guard(self.device):
            self._launch(table, self._on_device(options), _here(grad_scale, self.device), _here(found_inf, self.device))
        for c, i, original in staged:
            if c != 1:
                original.copy_(columns[c][i])
        torch.autograd.graph.increment_version(self.tensors)

    def _stage(self, columns: list[Any]) -> list[tuple[int, int, Tensor]]:
        grads, odd = columns[1], self.odd
        if [*map(Tensor.stride, grads)] != self.strides or any(g.dtype != self.param for g in grads):
            odd = odd + [(1, i) for i, g in enumerate(grads) if g.dtype != self.param or layout(g) != self.layouts[i]]
        staged = []
        for c, i in odd:
            original = columns[c][i]
            columns[c] = [*columns[c]]
            columns[c][i] = torch.empty_like(self.columns[0][i], dtype=self.param if c == 1 else original.dtype)
            columns[c][i].copy_(original)
            staged.append((c, i, original))
        return staged

    def _on_device(self, options: Options) -> Tensor:
        rows = [[self._number(x) for x in row] for row in options]
        table = self.options.update([list(column) for column in zip(*rows, strict=True)])
        for i, row in enumerate(options):
            for j, x in enumerate(row):
                if isinstance(x, Tensor) and x.device == self.device:
                    table[i, j].copy_(x)  # so that a CUDA graph sees a value that changes
        return table

    def _number(self, option: float | Tensor) -> float:
        on_device = isinstance(option, Tensor) and option.device == self.device
        return ON_DEVICE if on_device else host_value("step", "an option of the optimizer", option)

    def _launch(self, table: Tensor, options: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        raise NotImplementedError


def _here(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else scalar.to(device, non_blocking=True)


class MomentumLaunch(Launch):
    """SGD; with no ``state`` for a rule without momentum. Options: as in the kernel."""

    partials: Tensor | None = None

    def _launch(self, table: Tensor, options: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        buffer = len(self.columns) == 5
        _momentum_kernel[(len(self.chunks),)](
            table,
            self.chunks,
            options,
            grad_scale,
            found_inf,
            self.partials,
            *self.dtypes,
            buffer,
            MAX_SPANS,
            BLOCK,
            num_warps=WARPS,
        )


class LARSLaunch(MomentumLaunch):
    """Two launches: all norms, then all updates. Tensors of one dimension or none are neither decayed nor scaled."""

    def _spans(self, params: list[Tensor], sizes: list[int], wide: torch.dtype) -> list[list[int]]:
        scaled = [size if p.ndim > 1 else 0 for p, size in zip(params, sizes, strict=True)]
        lengths = [BLOCK * max(4, -(-size // (BLOCK * MAX_SPANS))) for size in scaled]
        spans = cut(scaled, lengths)
        self.spans = Mirror(self.device).update(spans)
        self.partials = torch.empty(max(1, len(self.spans)), 2, dtype=wide, device=self.device)
        counts = [-(-size // length) for size, length in zip(scaled, lengths, strict=True)]
        return [[end - count for end, count in zip(accumulate(counts), counts, strict=True)], counts]

    def _launch(self, table: Tensor, options: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if len(self.spans):
            param, *_, compute = self.dtypes
            _norms_kernel[(len(self.spans),)](
                table, self.spans, options, grad_scale, self.partials, param, compute, 5, BLOCK, num_warps=WARPS
            )
        super()._launch(table, options, grad_scale, found_inf)


class AdamWLaunch(Launch):
    """AdamW; ``state`` is the first and second moments and the step counts, which the launch counts up itself."""

    def _launch(self, table: Tensor, options: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if not hasattr(self, "finished"):
            self.finished = torch.zeros((), dtype=torch.int32, device=self.device)
        _adamw_kernel[(len(self.chunks),)](
            table,
            self.chunks,
            options,
            grad_scale,
            found_inf,
            self.finished,
            len(table),
            *self.dtypes,
            BLOCK,
            num_warps=WARPS,
        )
