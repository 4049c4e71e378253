"""The two kernels of the sweep over wide rows, each a matrix product; see ``_wide``."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from .dispatch import tl, triton

if triton is not None:
    from ._finish import LOG2E, number

    @triton.jit
    def _columns(matrix_ptr, rows, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """Columns from ``start`` of some rows, 0 after the last column."""
        d = start + tl.arange(0, BLOCK_D)
        ptrs = matrix_ptr + rows[:, None].to(tl.int64) * D + d[None, :]
        return tl.load(ptrs) if D % BLOCK_D == 0 else tl.load(ptrs, mask=(d < D)[None, :], other=0.0)

    @triton.jit(do_not_specialize=["n", "columns", "shift"])
    def score_kernel(
        unit_ptr,  # [n, D], unit queries
        bank_ptr,  # [columns, D], a part of the bank, in the same dtype
        weights_ptr,  # [n, width] in that dtype, exp(logit - top of its tile); None: no gradient
        tops_ptr,  # [tiles, n], in units of log 2
        totals_ptr,  # [tiles, n], sums of the weights
        tickets_ptr,  # see finish_kernel; None if this is not the first launch
        pointer_ptr,  # None if nothing will be pushed
        temperature,
        n,
        columns,
        width,  # columns, rounded up to whole tiles
        shift,  # offset from the row of a query to the column of its positive
        D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        IN_BATCH: tl.constexpr,
        PRECISION: tl.constexpr,
        UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 product is wrong
    ):
        """Compute the logits of one tile, and their exponentials."""
        program = tl.program_id(0)
        if tickets_ptr is not None:  # noqa: SIM102 (decided when compiling, and the next when running)
            if program == 0:
                tl.store(tickets_ptr, 0)
                if pointer_ptr is not None:
                    tl.store(tickets_ptr + 1, tl.load(pointer_ptr))
        blocks = tl.cdiv(n, BLOCK_N)
        block, tile = program % blocks, program // blocks  # neighbouring programs read the same bank rows
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        live = rows < n
        within = tl.where(live, rows, 0)
        column = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = tl.minimum(column, columns - 1)
        logits = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, D, BLOCK_D):
            query = _columns(unit_ptr, within, start, D, BLOCK_D)
            bank = _columns(bank_ptr, inside, start, D, BLOCK_D)
            if UPCAST:
                query = query.to(tl.float32)
                bank = bank.to(tl.float32)
            logits = tl.dot(query, tl.trans(bank), acc=logits, input_precision=PRECISION)
        out = (column >= columns)[None, :]
        if IN_BATCH:
            out = out | (column[None, :] == (rows + shift)[:, None])
        logits = tl.where(out, float("-inf"), logits * (LOG2E / number(temperature)))
        top = tl.maximum(tl.max(logits, axis=1), -1e30)  # finite, because -inf - -inf is NaN
        weights = tl.exp2(logits - top[:, None])
        at = tile * n + rows
        tl.store(tops_ptr + at, top, mask=live)
        tl.store(totals_ptr + at, tl.sum(weights, axis=1), mask=live)
        if weights_ptr is not None:
            weights_ptrs = weights_ptr + rows[:, None].to(tl.int64) * width + column[None, :]
            tl.store(weights_ptrs, weights.to(weights_ptr.dtype.element_ty), mask=live[:, None])

    @triton.jit(do_not_specialize=["n", "columns", "tiles", "tiles_per_split", "every"])
    def average_kernel(
        weights_ptr,  # as in score_kernel
        bank_ptr,
        tops_ptr,
        totals_ptr,
        averages_ptr,  # [splits, every, D] in the bank's dtype; see finish_rows
        logsums_ptr,  # [splits, every]
        n,
        columns,
        width,
        tiles,
        tiles_per_split,
        every,  # number of all queries, of which this launch takes n
        D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,  # of score_kernel's tiles
        BLOCK_D: tl.constexpr,
        STEP: tl.constexpr,  # columns at a time
        PRECISION: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """Compute some columns of the weighted average of a split's rows."""
        program = tl.program_id(0)
        blocks = tl.cdiv(n, BLOCK_N)
        slices = 1 if averages_ptr is None else tl.cdiv(D, BLOCK_D)
        block, part, split = program % blocks, program // blocks % slices, program // blocks // slices
        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        live = rows < n
        first = split * tiles_per_split
        end = tl.minimum(first + tiles_per_split, tiles)
        top = tl.full([BLOCK_N], -1e30, tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        for tile in range(first, end):
            at = tile * n + rows
            its = tl.load(tops_ptr + at, mask=live, other=-1e30)
            above = tl.maximum(top, its)
            total = total * tl.exp2(top - above)
            total += tl.load(totals_ptr + at, mask=live, other=0.0) * tl.exp2(its - above)
            top = above
        empty = total == 0  # as in sweep_kernel
        total = tl.where(empty, 1.0, total)
        to = split.to(tl.int64) * every + rows
        if part == 0:
            tl.store(logsums_ptr + to, tl.where(empty, float("-inf"), top + tl.log2(total)), mask=live)
        if averages_ptr is not None:
            within = tl.where(live, rows, 0)
            average = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for step in range(first * (BLOCK_K // STEP), end * (BLOCK_K // STEP)):
                column = step * STEP + tl.arange(0, STEP)
                weights = tl.load(weights_ptr + within[:, None].to(tl.int64) * width + column[None, :])
                bank = _columns(bank_ptr, tl.minimum(column, columns - 1), part * BLOCK_D, D, BLOCK_D)
                tile = step // (BLOCK_K // STEP)
                its = tl.load(tops_ptr + tile * n + rows, mask=live, other=-1e30)
                weights = (weights.to(tl.float32) * tl.exp2(its - top)[:, None]).to(bank.dtype)
                if UPCAST:
                    weights = weights.to(tl.float32)
                    bank = bank.to(tl.float32)
                average = tl.dot(weights, bank, acc=average, input_precision=PRECISION)
            d = part * BLOCK_D + tl.arange(0, BLOCK_D)
            average = (average / total[:, None]).to(averages_ptr.dtype.element_ty)
            tl.store(
                averages_ptr + to[:, None].to(tl.int64) * D + d[None, :], average, mask=live[:, None] & (d < D)[None, :]
            )
