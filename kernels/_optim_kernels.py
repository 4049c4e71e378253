"""The device code of kernels/optim.py.

A table row holds the addresses of the parameter, gradient, state …, teacher and shadow, then the row of its options,
its first span, and its number of spans. Options are float64, so that a coefficient such as 1 - momentum is rounded
once.
"""

from __future__ import annotations

from .dispatch import tl, triton

if triton is not None:
    from .multi_tensor import average_, fetch, locate, operand

    @triton.jit
    def _option(row_ptr, options_ptr, index, OPERANDS: tl.constexpr, OPTIONS: tl.constexpr):
        return tl.load(options_ptr + tl.load(row_ptr + OPERANDS) * OPTIONS + index)

    @triton.jit
    def _gradient(row_ptr, start, offsets, mask, grad_scale_ptr, PARAM: tl.constexpr, COMPUTE: tl.constexpr):
        grad = fetch(operand(row_ptr, 1, start, mask, PARAM), offsets, mask, COMPUTE)
        return grad if grad_scale_ptr is None else grad * (1 / tl.load(grad_scale_ptr).to(COMPUTE))

    @triton.jit
    def _squares(
        row_ptr,
        start,
        stop,  # None for a whole block at 16-byte addresses
        decay,
        grad_scale_ptr,
        PARAM: tl.constexpr,
        COMPUTE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        offsets = tl.arange(0, BLOCK)
        mask = None if stop is None else offsets < stop - start
        param = fetch(operand(row_ptr, 0, start, mask, PARAM), offsets, mask, COMPUTE)
        update = _gradient(row_ptr, start, offsets, mask, grad_scale_ptr, PARAM, COMPUTE) + decay * param
        return param * param, update * update

    @triton.jit
    def _norms_kernel(
        table_ptr,
        spans_ptr,  # like chunks, but long enough that a tensor has at most MAX_SPANS
        options_ptr,
        grad_scale_ptr,
        partials_ptr,  # [programs, 2]: sums of squares of the parameter and of its update
        PARAM: tl.constexpr,
        COMPUTE: tl.constexpr,
        OPERANDS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row_ptr, start, stop, aligned = locate(table_ptr, spans_ptr, 2, OPERANDS + 3)
        decay = _option(row_ptr, options_ptr, 2, OPERANDS, 6).to(COMPUTE)
        params = tl.zeros([BLOCK], COMPUTE)
        updates = tl.zeros([BLOCK], COMPUTE)
        whole = tl.where(aligned, stop - (stop - start) % BLOCK, start)
        for at in range(start, whole, BLOCK):
            p, u = _squares(row_ptr, at, None, decay, grad_scale_ptr, PARAM, COMPUTE, BLOCK)
            params += p
            updates += u
        for at in range(whole, stop, BLOCK):
            p, u = _squares(row_ptr, at, stop, decay, grad_scale_ptr, PARAM, COMPUTE, BLOCK)
            params += p
            updates += u
        partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * 2
        tl.store(partial_ptr, tl.sum(params))
        tl.store(partial_ptr + 1, tl.sum(updates))

    @triton.jit
    def _momentum_chunk(
        row_ptr,
        start,
        stop,  # None for a whole block at 16-byte addresses
        options_ptr,
        grad_scale_ptr,
        partials_ptr,
        PARAM: tl.constexpr,
        TEACHER: tl.constexpr,
        SHADOW: tl.constexpr,
        COMPUTE: tl.constexpr,
        BUFFER: tl.constexpr,
        MAX_SPANS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        OPERANDS: tl.constexpr = 5 if BUFFER else 4
        lr = _option(row_ptr, options_ptr, 0, OPERANDS, 6).to(COMPUTE)
        momentum = _option(row_ptr, options_ptr, 1, OPERANDS, 6).to(COMPUTE)
        decay = _option(row_ptr, options_ptr, 2, OPERANDS, 6).to(COMPUTE)
        share = _option(row_ptr, options_ptr, 3, OPERANDS, 6).to(COMPUTE)
        if partials_ptr is not None:
            span, spans = tl.arange(0, MAX_SPANS), tl.load(row_ptr + OPERANDS + 2)
            partial_ptr = partials_ptr + (tl.load(row_ptr + OPERANDS + 1) + span) * 2
            param_norm = tl.sqrt(tl.sum(tl.load(partial_ptr, mask=span < spans, other=0)))
            update_norm = tl.sqrt(tl.sum(tl.load(partial_ptr + 1, mask=span < spans, other=0)))
            share = tl.where(
                (param_norm > 0) & (update_norm > 0), share * param_norm / tl.where(update_norm > 0, update_norm, 1), 1
            )
            decay = tl.where(spans > 0, decay, 0)  # a tensor of one dimension has no spans

        offsets = tl.arange(0, BLOCK)
        mask = None if stop is None else offsets < stop - start
        param_ptr = operand(row_ptr, 0, start, mask, PARAM)
        param = fetch(param_ptr, offsets, mask, COMPUTE)
        update = _gradient(row_ptr, start, offsets, mask, grad_scale_ptr, PARAM, COMPUTE) + decay * param
        if BUFFER:
            buffer_ptr = operand(row_ptr, 2, start, mask, PARAM)
            buffer = momentum * fetch(buffer_ptr, offsets, mask, COMPUTE) + share * update
            tl.store(buffer_ptr + offsets, buffer.to(PARAM), mask=mask)
            nesterov = _option(row_ptr, options_ptr, 4, OPERANDS, 6) != 0
            update = tl.where(nesterov, update + momentum * buffer, buffer)
        new = (param - lr * update).to(PARAM)
        tl.store(param_ptr + offsets, new, mask=mask)
        if TEACHER is not None:
            m = _option(row_ptr, options_ptr, 5, OPERANDS, 6)
            rest = (1 - m).to(COMPUTE)
            average_(row_ptr, OPERANDS - 2, start, offsets, mask, new.to(COMPUTE), m.to(COMPUTE), rest, TEACHER, SHADOW)

    @triton.jit
    def _momentum_kernel(
        table_ptr,
        chunks_ptr,
        options_ptr,  # per row: lr, momentum, decay, 1 - dampening or LARS's trust coefficient, nesterov, ema momentum
        grad_scale_ptr,
        found_inf_ptr,
        partials_ptr,  # from _norms_kernel for LARS, otherwise None
        PARAM: tl.constexpr,
        TEACHER: tl.constexpr,
        SHADOW: tl.constexpr,
        COMPUTE: tl.constexpr,
        BUFFER: tl.constexpr,
        MAX_SPANS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        if found_inf_ptr is not None:  # noqa: SIM102 (decided when compiling, and the next when running)
            if tl.load(found_inf_ptr) != 0:
                return
        OPERANDS: tl.constexpr = 5 if BUFFER else 4
        row_ptr, start, stop, aligned = locate(table_ptr, chunks_ptr, OPERANDS, OPERANDS + 3)
        if (stop - start == BLOCK) & aligned:
            _momentum_chunk(
                row_ptr, start, None, options_ptr, grad_scale_ptr, partials_ptr,
                PARAM, TEACHER, SHADOW, COMPUTE, BUFFER, MAX_SPANS, BLOCK,
            )  # fmt: skip
        else:
            _momentum_chunk(
                row_ptr, start, stop, options_ptr, grad_scale_ptr, partials_ptr,
                PARAM, TEACHER, SHADOW, COMPUTE, BUFFER, MAX_SPANS, BLOCK,
            )  # fmt: skip

    @triton.jit
    def _bias_correction(beta, step, COMPUTE: tl.constexpr):
        """1 - beta ** step.

        Evaluated directly in float32, it would lose a third of its digits at the first steps; in float64, every
        thread would spend more time on it than on memory on most GPUs. So this evaluates the series of
        -expm1(step * log1p(beta - 1)).
        """
        if tl.float64 == COMPUTE:
            correction = 1 - tl.exp2(step.to(tl.float64) * tl.log2(beta))
        else:
            rest = (1 - beta).to(tl.float32)
            z = rest / (2 - rest)  # -log(beta) = 2 artanh(z), whose series ends below 2^-24 for z up to 1/3
            s = z * z
            artanh = z * (1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s * (1 / 13)))))))
            x = step * tl.where(rest <= 0.5, 2 * artanh, -tl.log(beta.to(tl.float32)))
            series = 1 - x / 5 * (1 - x / 6 * (1 - x / 7 * (1 - x / 8)))
            series = x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * series)))
            correction = tl.where(x < 0.5, series, 1 - tl.exp(-x))
        return correction

    @triton.jit
    def _adamw_chunk(
        row_ptr,
        start,
        stop,  # None for a whole block at 16-byte addresses
        options_ptr,
        grad_scale_ptr,
        PARAM: tl.constexpr,
        TEACHER: tl.constexpr,
        SHADOW: tl.constexpr,
        COMPUTE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        lr, eps = _option(row_ptr, options_ptr, 0, 7, 6), _option(row_ptr, options_ptr, 3, 7, 6).to(COMPUTE)
        beta1, beta2 = _option(row_ptr, options_ptr, 1, 7, 6), _option(row_ptr, options_ptr, 2, 7, 6)
        keep = (1 - lr * _option(row_ptr, options_ptr, 4, 7, 6)).to(COMPUTE)
        step = tl.load(tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32))) + 1
        step_size = lr.to(COMPUTE) / _bias_correction(beta1, step, COMPUTE)
        inverse_root = 1 / tl.sqrt(_bias_correction(beta2, step, COMPUTE))

        offsets = tl.arange(0, BLOCK)
        mask = None if stop is None else offsets < stop - start
        grad = _gradient(row_ptr, start, offsets, mask, grad_scale_ptr, PARAM, COMPUTE)
        first_ptr, second_ptr = operand(row_ptr, 2, start, mask, PARAM), operand(row_ptr, 3, start, mask, PARAM)
        first = fetch(first_ptr, offsets, mask, COMPUTE)
        second = fetch(second_ptr, offsets, mask, COMPUTE)
        first = beta1.to(COMPUTE) * first + (1 - beta1).to(COMPUTE) * grad
        second = beta2.to(COMPUTE) * second + (1 - beta2).to(COMPUTE) * grad * grad
        tl.store(first_ptr + offsets, first.to(PARAM), mask=mask)
        tl.store(second_ptr + offsets, second.to(PARAM), mask=mask)
        param_ptr = operand(row_ptr, 0, start, mask, PARAM)
        param = fetch(param_ptr, offsets, mask, COMPUTE)
        new = (keep * param - step_size * first / (tl.sqrt(second) * inverse_root + eps)).to(PARAM)
        tl.store(param_ptr + offsets, new, mask=mask)
        if TEACHER is not None:
            m = _option(row_ptr, options_ptr, 5, 7, 6)
            rest = (1 - m).to(COMPUTE)
            average_(row_ptr, 5, start, offsets, mask, new.to(COMPUTE), m.to(COMPUTE), rest, TEACHER, SHADOW)

    @triton.jit
    def _adamw_kernel(
        table_ptr,
        chunks_ptr,
        options_ptr,  # per row: lr, beta 1, beta 2, eps, decay, ema momentum
        grad_scale_ptr,
        found_inf_ptr,
        finished_ptr,  # int32: finished programs of this launch
        tensors,
        PARAM: tl.constexpr,
        TEACHER: tl.constexpr,
        SHADOW: tl.constexpr,
        COMPUTE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        if found_inf_ptr is not None:  # noqa: SIM102 (decided when compiling, and the next when running)
            if tl.load(found_inf_ptr) != 0:
                return
        row_ptr, start, stop, aligned = locate(table_ptr, chunks_ptr, 7, 10)
        if (stop - start == BLOCK) & aligned:
            _adamw_chunk(row_ptr, start, None, options_ptr, grad_scale_ptr, PARAM, TEACHER, SHADOW, COMPUTE, BLOCK)
        else:
            _adamw_chunk(row_ptr, start, stop, options_ptr, grad_scale_ptr, PARAM, TEACHER, SHADOW, COMPUTE, BLOCK)
        # When the last program finishes, all have read the step counts; it then increments them.
        tl.debug_barrier()
        if tl.atomic_add(finished_ptr, 1) == tl.num_programs(0) - 1:
            tl.store(finished_ptr, 0)
            for at in range(0, tensors, 256):
                row = at + tl.arange(0, 256)
                step_ptr = tl.load(table_ptr + row.to(tl.int64) * 10 + 4, mask=row < tensors, other=0)
                step_ptr = step_ptr.to(tl.pointer_type(tl.float32))
                tl.store(step_ptr, tl.load(step_ptr, mask=row < tensors) + 1, mask=row < tensors)
