"""Triton functions for the launch after the sweep: the loss and gradient of each row, and the sums over the rows."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from .dispatch import tl, triton

if triton is not None:
    from ._push import load_unit, push_rows

    LOG2E = tl.constexpr(1.4426950408889634)
    _LN2 = tl.constexpr(0.6931471805599453)

    @triton.jit
    def number(x):
        """The value of a float or of a 0-d tensor, in float32."""
        x = tl.core.to_tensor(x)  # the interpreter passes a float as it is
        return (tl.load(x) if x.dtype.is_ptr() else x).to(tl.float32)

    @triton.jit
    def _total(x_ptr, count):
        total = tl.zeros([256], tl.float32)
        for first in range(0, count, 256):
            at = first + tl.arange(0, 256)
            total += tl.load(x_ptr + at, mask=at < count, other=0.0)
        return tl.sum(total)

    @triton.jit
    def _all_logsums(rows, live, logsums_ptr, n, splits, BLOCK_S: tl.constexpr):
        """The logsums of all splits for these rows, [BLOCK_S, rows]."""
        every = tl.arange(0, BLOCK_S)[:, None]
        logsums_ptrs = logsums_ptr + every.to(tl.int64) * n + rows[None, :]
        return tl.load(logsums_ptrs, mask=(every < splits) & live[None, :], other=float("-inf"))

    @triton.jit
    def _add_averages(
        pull, rows, live, top, total, averages_ptr, logsums_ptr, n, splits,
        D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """Add the averages of the splits to ``pull``, weighted by exp2(logsum - top) / total."""
        d = tl.arange(0, BLOCK_D)
        for first in range(0, splits, CHUNK):
            some = first + tl.arange(0, CHUNK)[:, None]
            mask = (some < splits) & live[None, :]
            at = some.to(tl.int64) * n + rows[None, :]
            logsums = tl.load(logsums_ptr + at, mask=mask, other=float("-inf"))
            chances = tl.exp2(logsums - top[None, :]) / total[None, :]
            averages_ptrs = averages_ptr + at[:, :, None] * D + d[None, None, :]
            averages = tl.load(averages_ptrs, mask=mask[:, :, None] & (d < D)[None, None, :], other=0.0)
            pull += tl.sum(chances[:, :, None] * averages.to(tl.float32), axis=0)
        return pull

    @triton.jit(do_not_specialize=["n", "splits"])
    def gather_kernel(
        averages_ptr,  # see finish_rows; None to combine the logsums only
        logsums_ptr,
        average_ptr,  # [n, D]
        logsum_ptr,  # [n]
        n,
        splits,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_S: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        """Combine the averages and logsums of all splits."""
        rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        live = rows < n
        logsums = _all_logsums(rows, live, logsums_ptr, n, splits, BLOCK_S)
        top = tl.where(live, tl.max(logsums, axis=0), 0.0)
        total = tl.where(live, tl.sum(tl.exp2(logsums - top[None, :]), axis=0), 1.0)
        tl.store(logsum_ptr + rows, top + tl.log2(total), mask=live)
        if averages_ptr is not None:
            average = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
            average = _add_averages(
                average, rows, live, top, total, averages_ptr, logsums_ptr, n, splits, D, BLOCK_D, CHUNK
            )
            d = tl.arange(0, BLOCK_D)
            average_ptrs = average_ptr + rows[:, None].to(tl.int64) * D + d[None, :]
            tl.store(average_ptrs, average, mask=live[:, None] & (d < D)[None, :])

    @triton.jit
    def finish_rows(
        rows,
        query_ptr,
        key_ptr,  # None: no contrast
        same_ptr,  # None: no residual term
        averages_ptr,  # [splits, n, D], each the average of a split's candidates weighted by exp(logit)
        logsums_ptr,  # [splits, n], log2 of the sum of those weights
        gradient_ptr,
        temperature,
        residual_weight,
        contrastive_weight,
        scale,  # of each row in the reduced loss
        n,
        key_offset,
        splits,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_S: tl.constexpr,
        CHUNK: tl.constexpr,
        GRADIENT: tl.constexpr,
    ):
        """Combine the splits, the positive and the residual term: store the gradient, return both losses per row."""
        live = rows < n
        d = tl.arange(0, BLOCK_D)
        query, inverse = load_unit(query_ptr, rows, live, D, BLOCK_D)
        contrastive = tl.zeros_like(inverse)
        residual = tl.zeros_like(inverse)
        pull = tl.zeros_like(query)  # gradient to the unit query
        if key_ptr is not None:
            key, _ = load_unit(key_ptr, rows + key_offset, live, D, BLOCK_D)
            positive = tl.sum(query * key, axis=1) * (LOG2E / temperature)
            logsums = _all_logsums(rows, live, logsums_ptr, n, splits, BLOCK_S)
            top = tl.maximum(positive, tl.max(logsums, axis=0))
            total = tl.exp2(positive - top) + tl.sum(tl.exp2(logsums - top[None, :]), axis=0)
            contrastive = tl.where(live, ((top - positive) + tl.log2(total)) * _LN2, 0.0)
            if GRADIENT:
                pull += (tl.exp2(positive - top) / total - 1)[:, None] * key
                pull = _add_averages(
                    pull, rows, live, top, total, averages_ptr, logsums_ptr, n, splits, D, BLOCK_D, CHUNK
                )
                pull *= contrastive_weight * scale / temperature
        if same_ptr is not None:
            toward, _ = load_unit(same_ptr, rows, live, D, BLOCK_D)
            residual = tl.where(live, 2 - 2 * tl.sum(query * toward, axis=1), 0.0)
            pull -= (2 * residual_weight * scale) * toward
        if GRADIENT:
            pull = (pull - tl.sum(pull * query, axis=1)[:, None] * query) * inverse[:, None]  # through the norm
            gradient_ptrs = gradient_ptr + rows[:, None].to(tl.int64) * D + d[None, :]
            tl.store(gradient_ptrs, pull, mask=live[:, None] & (d < D)[None, :])
        return contrastive, residual

    @triton.jit(do_not_specialize=["n", "key_offset", "splits", "count"])
    def finish_kernel(
        query_ptr,
        key_ptr,
        same_ptr,
        averages_ptr,
        logsums_ptr,
        gradient_ptr,
        losses_ptr,  # [n], or [3]: weighted sum, contrastive, residual
        sums_ptr,  # [2, programs], or None for a loss per row
        tickets_ptr,  # [0] counts finished programs, [1] is the pointer before the push
        queue_ptr,  # None: no push
        pointer_ptr,
        push_ptr,
        temperature,
        residual_weight,
        contrastive_weight,
        scale,
        n,
        key_offset,
        splits,
        count,  # of keys to push
        size,  # of the queue
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_S: tl.constexpr,
        CHUNK: tl.constexpr,
        PUSH_R: tl.constexpr,
        GRADIENT: tl.constexpr,
    ):
        """The last launch: the first programs finish BLOCK_R rows each, the others push PUSH_R keys each."""
        program = tl.program_id(0)
        groups = tl.cdiv(n, BLOCK_R)
        if program < groups:
            # New names, because a variable may not change its type inside a branch.
            of_residual, of_contrastive = number(residual_weight), number(contrastive_weight)
            rows = program * BLOCK_R + tl.arange(0, BLOCK_R)
            contrastive, residual = finish_rows(
                rows, query_ptr, key_ptr, same_ptr, averages_ptr, logsums_ptr, gradient_ptr,
                number(temperature), of_residual, of_contrastive, scale, n, key_offset, splits,
                D, BLOCK_D, BLOCK_S, CHUNK, GRADIENT,
            )  # fmt: skip
            if sums_ptr is None:
                loss = of_contrastive * contrastive + of_residual * residual
                tl.store(losses_ptr + rows, loss, mask=rows < n)
            else:
                tl.store(sums_ptr + program, tl.sum(contrastive))
                tl.store(sums_ptr + groups + program, tl.sum(residual))
                tl.debug_barrier()
                # The last program to arrive sees all partial sums, and adds them in a fixed order.
                if tl.atomic_add(tickets_ptr, 1, sem="acq_rel") == groups - 1:
                    c_sum = _total(sums_ptr, groups) * scale
                    r_sum = _total(sums_ptr + groups, groups) * scale
                    tl.store(losses_ptr, of_contrastive * c_sum + of_residual * r_sum)
                    tl.store(losses_ptr + 1, c_sum)
                    tl.store(losses_ptr + 2, r_sum)
        elif queue_ptr is not None:
            start = tl.load(tickets_ptr + 1)
            index = (program - groups) * PUSH_R + tl.arange(0, PUSH_R)
            push_rows(index, queue_ptr, push_ptr, start, count, size, D, BLOCK_D)
            if program == groups:
                tl.store(pointer_ptr, (start + count) % size)
