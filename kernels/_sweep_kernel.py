"""The Triton kernel of the sweep over the bank; ``_sweep`` describes what it computes."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from .dispatch import tl, triton

if triton is not None:
    from ._finish import LOG2E, number
    from ._push import load_unit

    @triton.jit
    def load_rows(x_ptr, rows, size, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, UPCAST: tl.constexpr):
        """Rows of a matrix; 0 beyond its last row, if the tile may extend beyond the EDGE."""
        d = tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + rows[:, None].to(tl.int64) * D + d[None, :]
        if EDGE:
            x = tl.load(x_ptrs, mask=(rows < size)[:, None] & (d < D)[None, :], other=0.0)
        elif D == BLOCK_D:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(d < D)[None, :], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        return x

    @triton.jit
    def _add_tile(
        tile,
        query,
        top,
        total,
        average,
        bank_ptr,
        values_ptr,  # rows to average instead of the bank's rows, of the same dtype, or None
        shift_ptr,  # [size], subtracted from the logits, in units of log 2, or None
        size,
        positives,  # column of each row's positive, which is left out
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_K: tl.constexpr,
        EDGE: tl.constexpr,  # the tile may extend beyond the bank, or hold positives
        GRADIENT: tl.constexpr,
        PRECISION: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        bank = load_rows(bank_ptr, columns, size, D, BLOCK_D, EDGE, UPCAST)
        logits = tl.dot(query, tl.trans(bank), input_precision=PRECISION)
        if shift_ptr is not None:
            logits -= tl.load(shift_ptr + columns, mask=columns < size, other=0.0)[None, :]
        if EDGE:
            out = (columns >= size)[None, :] | (columns[None, :] == positives[:, None])
            logits = tl.where(out, float("-inf"), logits)
        above = tl.maximum(top, tl.max(logits, axis=1))
        shrink = tl.exp2(top - above)
        weights = tl.exp2(logits - above[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if GRADIENT:
            if values_ptr is not None:
                bank = load_rows(values_ptr, columns, size, D, BLOCK_D, EDGE, UPCAST)
            average = tl.dot(weights.to(bank.dtype), bank, acc=average * shrink[:, None], input_precision=PRECISION)
        return above, total, average

    @triton.jit(do_not_specialize=["n", "key_offset", "tiles_per_split"])
    def sweep_kernel(
        query_ptr,
        bank_ptr,
        values_ptr,  # see _add_tile
        shift_ptr,
        averages_ptr,  # [splits, n, D]; see finish_rows
        logsums_ptr,  # [splits, n]
        tickets_ptr,  # see finish_kernel; None if the next launch needs none
        pointer_ptr,  # None if nothing will be pushed
        temperature,
        n,
        size,  # of the bank
        key_offset,
        tiles_per_split,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        IN_BATCH: tl.constexpr,
        GRADIENT: tl.constexpr,
        PRECISION: tl.constexpr,
        UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 product is wrong
    ):
        program = tl.program_id(0)
        query_blocks = tl.cdiv(n, BLOCK_N)
        # Neighbouring programs read the same split of the bank.
        block, split = program % query_blocks, program // query_blocks
        if tickets_ptr is not None:  # noqa: SIM102 (decided when compiling, and the next when running)
            if program == 0:
                tl.store(tickets_ptr, 0)
                if pointer_ptr is not None:
                    tl.store(tickets_ptr + 1, tl.load(pointer_ptr))

        rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
        live = rows < n
        unit, _ = load_unit(query_ptr, rows, live, D, BLOCK_D)
        query = (unit * (LOG2E / number(temperature))).to(bank_ptr.dtype.element_ty)
        if UPCAST:
            query = query.to(tl.float32)
        top = tl.full([BLOCK_N], -1e30, tl.float32)  # finite, because -inf - -inf is NaN
        total = tl.zeros([BLOCK_N], tl.float32)
        average = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

        # Tiles from `first` to `full_end` are full; those from `positives_start` to `positives_end` hold positives.
        first = split * tiles_per_split
        end = tl.minimum(first + tiles_per_split, tl.cdiv(size, BLOCK_K))
        full_end = tl.maximum(tl.minimum(end, size // BLOCK_K), first)
        positives_start, positives_end = full_end, full_end
        positives = rows
        if IN_BATCH:
            positives += key_offset
            at = block * BLOCK_N + key_offset
            positives_start = tl.minimum(tl.maximum(at // BLOCK_K, first), full_end)
            positives_end = tl.minimum(tl.maximum((at + BLOCK_N - 1) // BLOCK_K + 1, positives_start), full_end)
        else:
            positives = tl.full([BLOCK_N], -1, tl.int32)
        positive_tiles = positives_end - positives_start
        for i in range(first, full_end - positive_tiles):
            top, total, average = _add_tile(
                tl.where(i < positives_start, i, i + positive_tiles), query, top, total, average, bank_ptr, values_ptr,
                shift_ptr, size, positives, D, BLOCK_D, BLOCK_K, False, GRADIENT, PRECISION, UPCAST,
            )  # fmt: skip
        for i in tl.range(0, positive_tiles + end - full_end, num_stages=1):
            top, total, average = _add_tile(
                tl.where(i < positive_tiles, positives_start + i, full_end + i - positive_tiles),
                query, top, total, average, bank_ptr, values_ptr, shift_ptr, size, positives,
                D, BLOCK_D, BLOCK_K, True, GRADIENT, PRECISION, UPCAST,
            )  # fmt: skip

        at = split.to(tl.int64) * n + rows
        empty = total == 0  # not `total > 0`, which is false for NaN: a loss with a row that is not finite must show it
        tl.store(logsums_ptr + at, tl.where(empty, float("-inf"), top + tl.log2(total)), mask=live)
        if GRADIENT:
            d = tl.arange(0, BLOCK_D)
            average = (average / tl.where(empty, 1.0, total)[:, None]).to(averages_ptr.dtype.element_ty)
            tl.store(averages_ptr + at[:, None] * D + d[None, :], average, mask=live[:, None] & (d < D)[None, :])
