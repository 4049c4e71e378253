"""The losses and their gradient in plain PyTorch, block by block over the bank; the CPU backend.

This is the sweep of the Triton kernel (see ``_sweep``), for any device, dtype and width. A block of logits stays in a
core's cache, so the N×K logits are never stored, and memory does not grow with the bank. On a CPU, a loss against a
queue is one call of PyTorch's attention, with the rows of the queue as keys and values; its threads start and
synchronise only once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._scoring import Scoring, numbers_of
from .dispatch import compute_dtype, no_autocast
from .reference import enqueue_, reduce, unit

ROWS = 256  # queries in a block of logits
ELEMENTS = 1 << 18  # elements of a block of logits, and of its bank rows: 1 MiB each in float32
QUERIES = 64  # queries per task of attention, at most, unless there are at least 768
SHORTEST = 512  # rows of the bank that attention takes at a time
CONVERTED = 1 << 20  # elements of the bank that are converted at a time: 4 MiB in float32
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# For other devices, for inputs that their kernels do not take: few launches, with products that fill the device.
DEVICE_ROWS, DEVICE_ELEMENTS = 4096, 1 << 24


@torch.no_grad()
def blocked_losses(scoring: Scoring, gradient: bool) -> tuple[Tensor, Tensor]:
    """The losses, and their gradient if requested.

    Returns:
        Losses: the weighted sum per row [N] for ``reduction="none"``, else [3]: weighted sum, contrastive, residual.
        Gradient of the (reduced) weighted sum to the queries [N, D], empty unless ``gradient``.
    """
    query, key, same, queue, pointer, push = scoring[:6]
    key_offset, reduction = scoring.key_offset, scoring.reduction
    with no_autocast(query.device):
        dtype = compute_dtype(query, key, same, queue)
        temperature, residual_weight, contrastive_weight = (
            number.to(dtype) if isinstance(number, Tensor) else number for number in numbers_of(scoring)
        )
        rows = query.to(dtype)
        squared = rows.square().sum(dim=1, keepdim=True)
        inverse = torch.where(squared > 0, squared.rsqrt(), 0)  # so a zero row has a zero unit row and gradient
        u = rows * inverse
        pull = torch.zeros_like(u) if gradient else None  # gradient to the unit queries
        contrastive = residual = u.new_zeros(len(u))
        if key is not None:
            in_batch = queue is None
            positive = unit(key[key_offset : key_offset + len(u)].to(dtype))
            bank = key if queue is None else queue
            average: Tensor | None
            if gradient and not in_batch and u.device.type == "cpu" and u.numel() and len(bank):
                contrastive, average = _attend(u, positive, bank, temperature)
            else:
                offset = key_offset if in_batch else None
                contrastive, average = _sweep(u, positive, bank, offset, temperature, gradient)
            if average is not None and pull is not None:
                pull += (average - positive) * (contrastive_weight / temperature)
        if same is not None:
            toward = unit(same.to(dtype))
            residual = 2 - 2 * (u * toward).sum(dim=1)
            if pull is not None:
                pull -= toward * (2 * residual_weight)

        if reduction == "none":
            values = contrastive_weight * contrastive + residual_weight * residual
        else:
            contrastive, residual = reduce(contrastive, reduction), reduce(residual, reduction)
            values = torch.stack([contrastive_weight * contrastive + residual_weight * residual, contrastive, residual])
        if queue is not None and pointer is not None and push is not None:
            enqueue_(queue, pointer, push)
        if pull is None:
            return values, u.new_empty(0)
        pull -= u * (pull * u).sum(dim=1, keepdim=True)  # through the normalisation
        pull *= inverse / max(len(u), 1) if reduction == "mean" else inverse
        return values, pull


def _attend(u: Tensor, positive: Tensor, bank: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """The result of :func:`_sweep` for a queue [K, D], by attention with the rows of the queue as keys and values.

    If the queries are too few tasks for all threads, the bank is split, and each split is a head of attention.
    """
    scaled = (u / temperature).contiguous()  # attention assumes contiguous rows
    logsum, average = u.new_full((len(u), 1), -math.inf), torch.zeros_like(u)
    cuts = -(-torch.get_num_threads() // -(-len(u) // QUERIES))
    # Rows of another dtype are converted in parts.
    columns = len(bank) if bank.dtype == u.dtype and bank.stride(1) == 1 else max(CONVERTED // bank.shape[1], 1)
    for c in range(0, len(bank), columns):
        rows = bank[c : c + columns].to(u.dtype)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        length = max(len(rows) // cuts, min(len(rows), SHORTEST))
        whole = len(rows) // length * length
        for part, heads in ((rows[:whole], whole // length), (rows[whole:], 1)):
            if len(part):
                candidates = part.unflatten(0, (1, heads, -1))
                found = _ATTENTION(scaled.expand(1, heads, -1, -1), candidates, candidates, scale=1.0)
                for one, its in zip(found[0][0], found[1][0].unsqueeze(-1), strict=True):
                    both = torch.logaddexp(logsum, its)
                    average = average * (logsum - both).exp_() + one * (its - both).exp_()
                    logsum = both
    first = (scaled * positive).sum(dim=1, keepdim=True)
    loss = -F.logsigmoid(first - logsum).squeeze(1)
    return loss, torch.lerp(positive, average, torch.sigmoid(logsum - first))


def _sweep(
    u: Tensor, positive: Tensor, bank: Tensor, key_offset: int | None, temperature: float | Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each unit query [N, D], and the candidates' average weighted by their probability [N, D].

    The positive is the first candidate; row ``key_offset + i`` of an in-batch bank, which is the same, is left out.
    """
    n, dim = u.shape
    rows, elements = (ROWS, ELEMENTS) if u.device.type == "cpu" else (DEVICE_ROWS, DEVICE_ELEMENTS)
    scaled = u / temperature
    first = (scaled * positive).sum(dim=1, keepdim=True)
    top, total = first.clone(), torch.ones_like(first)  # running maximum, and sum of exp(logit - top)
    average = positive.clone() if gradient else None  # sum of exp(logit - top) * candidate
    columns = max(elements // max(min(n, rows), dim, 1), 16)
    scratch = u.new_empty(min(n, rows) * min(columns, len(bank)))
    for c in range(0, len(bank), columns):
        block = bank[c : c + columns].to(u.dtype)
        if key_offset is not None:
            block = unit(block)
        for r in range(0, n, rows):
            part = slice(r, r + rows)
            queries = scaled[part]
            logits = scratch[: len(queries) * len(block)].view(len(queries), len(block))
            torch.mm(queries, block.T, out=logits)
            if key_offset is not None:
                logits.diagonal(r + key_offset - c).fill_(-math.inf)
            above = torch.maximum(top[part], logits.amax(dim=1, keepdim=True))
            shrink = (top[part] - above).exp_()
            logits.sub_(above).exp_()
            top[part] = above
            total[part].mul_(shrink).add_(logits.sum(dim=1, keepdim=True))
            if average is not None:
                average[part].mul_(shrink).addmm_(logits, block)
    loss = ((top - first) + total.log()).squeeze(1)
    return loss, None if average is None else average.div_(total)
