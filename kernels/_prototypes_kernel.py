"""The Triton kernel for the gradient to the prototypes; see ``_prototypes_swept``."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from .dispatch import tl, triton

if triton is not None:
    from ._finish import LOG2E, number
    from ._sweep_kernel import load_rows

    @triton.jit
    def _add_rows(
        tile,
        push,
        prototypes,
        shift,  # [BLOCK_K], subtracted from the logits, or None
        rows_ptr,  # [n, D]; their products with the prototypes are logits in units of log 2
        values_ptr,  # [n, D], the vectors to add, weighted by probability, or None for the rows themselves
        shares_ptr,  # [n], factors of the probabilities, or None for 1
        logsums_ptr,  # [n], in units of log 2
        n,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        EDGE: tl.constexpr,  # the tile may extend beyond the last row
        BOOST: tl.constexpr,
        PRECISION: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """Add exp(logit - logsum) * share * value, for some rows, to each prototype of a tile."""
        index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = load_rows(rows_ptr, index, n, D, BLOCK_D, EDGE, UPCAST)
        logits = tl.dot(prototypes, tl.trans(rows), input_precision=PRECISION)
        if shift is not None:
            logits -= shift[:, None]
        logsums = tl.load(logsums_ptr + index, mask=index < n, other=float("inf"))
        chances = tl.exp2(logits - logsums[None, :] + BOOST)
        if shares_ptr is not None:
            chances *= tl.load(shares_ptr + index, mask=index < n, other=0.0)[None, :]
        values = rows
        if values_ptr is not None:
            values = load_rows(values_ptr, index, n, D, BLOCK_D, EDGE, UPCAST)
        return tl.dot(chances.to(values.dtype), values, acc=push, input_precision=PRECISION)

    @triton.jit
    def _add_side(
        push,
        prototypes,
        shift,
        rows_ptr,
        values_ptr,
        shares_ptr,
        logsums_ptr,
        n,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BOOST: tl.constexpr,
        PRECISION: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """Add all rows of one side: full tiles without masks, and the last tile with masks."""
        for tile in range(0, n // BLOCK_N):
            push = _add_rows(
                tile, push, prototypes, shift, rows_ptr, values_ptr, shares_ptr, logsums_ptr, n,
                D, BLOCK_D, BLOCK_N, False, BOOST, PRECISION, UPCAST,
            )  # fmt: skip
        for tile in tl.range(n // BLOCK_N, tl.cdiv(n, BLOCK_N), num_stages=1):
            push = _add_rows(
                tile, push, prototypes, shift, rows_ptr, values_ptr, shares_ptr, logsums_ptr, n,
                D, BLOCK_D, BLOCK_N, True, BOOST, PRECISION, UPCAST,
            )  # fmt: skip
        return push

    @triton.jit(do_not_specialize=["n", "m"])
    def push_prototypes_kernel(
        student_ptr,  # [n, D] unit rows times LOG2E over the temperature, in the dtype of the products
        shares_ptr,
        student_logsums_ptr,
        teacher_ptr,  # [m, D] likewise
        values_ptr,  # [m, D], for each row of the teacher the sum of the unit student rows that it is paired with
        teacher_logsums_ptr,
        prototypes_ptr,
        its_prototypes_ptr,  # the teacher's prototypes, or None
        shift_ptr,  # [size], subtracted from the teacher's logits, or None
        gradient_ptr,  # [size, D], written
        factor_ptr,  # 0-d, the factor of the whole gradient
        temperature,  # the student's
        n,
        m,
        size,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BOOST: tl.constexpr,  # log2 of a factor of the probabilities, so that float16 represents small ones
        PRECISION: tl.constexpr,
        UPCAST: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 product is wrong
    ):
        """The gradient to one tile of prototypes per program: the sum over the student's rows less the teacher's."""
        at = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        prototypes = load_rows(prototypes_ptr, at, size, D, BLOCK_D, True, UPCAST)
        push = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        push = _add_side(
            push, prototypes, None, student_ptr, None, shares_ptr, student_logsums_ptr, n,
            D, BLOCK_D, BLOCK_N, BOOST, PRECISION, UPCAST,
        )  # fmt: skip
        push *= -number(temperature) / LOG2E
        if its_prototypes_ptr is not None:
            prototypes = load_rows(its_prototypes_ptr, at, size, D, BLOCK_D, True, UPCAST)
        shift = None
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + at, mask=at < size, other=0.0)
        push = _add_side(
            push, prototypes, shift, teacher_ptr, values_ptr, None, teacher_logsums_ptr, m,
            D, BLOCK_D, BLOCK_N, BOOST, PRECISION, UPCAST,
        )  # fmt: skip
        d = tl.arange(0, BLOCK_D)
        gradient_ptrs = gradient_ptr + at[:, None].to(tl.int64) * D + d[None, :]
        push *= -tl.load(factor_ptr)
        tl.store(gradient_ptrs, push.to(gradient_ptr.dtype.element_ty), mask=(at < size)[:, None] & (d < D)[None, :])
