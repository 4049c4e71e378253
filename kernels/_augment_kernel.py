"""The Triton kernels of ``augment_views``; see ``_augment`` for how they are launched."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from .dispatch import tl, triton

if triton is not None:
    from ._augment_ops import (
        BEFORE,
        GRAY,
        IMAGE,
        ROW,
        SIGMA,
        STEPS,
        VIEW,
        colours,
        finished,
        gaussian_band,
        luma,
        pixels,
        real,
        rgb,
        shades,
    )  # fmt: skip

    @triton.jit(do_not_specialize=["first"])
    def gray_kernel(
        images_ptr,
        table_ptr,
        sums_ptr,  # [rows of the table, TILES]: sum of the gray of each tile, before the contrast is changed
        first,  # first row of the table
        image_stride,
        row_stride,
        column_stride,
        band_stride,
        BANDS: tl.constexpr,
        OUT_H: tl.constexpr,
        OUT_W: tl.constexpr,
        BOXES: tl.constexpr,
        BICUBIC: tl.constexpr,
        TILES_X: tl.constexpr,
        TILES: tl.constexpr,
        R: tl.constexpr,
    ):
        program = tl.program_id(0)
        row, tile = first + program // TILES, program % TILES
        row_ptr = table_ptr + row * ROW
        image_ptr = images_ptr + tl.load(row_ptr + IMAGE).to(tl.int64) * image_stride
        steps = tl.load(row_ptr + BEFORE)
        y, x = tile // TILES_X * R + tl.arange(0, R), tile % TILES_X * R + tl.arange(0, R)
        inside = (y < OUT_H)[:, None] & (x < OUT_W)[None, :]
        if BANDS == 3:
            red, green, blue = rgb(
                image_ptr, row_ptr, y, x, row_stride, column_stride, band_stride, OUT_H, OUT_W, BOXES, BICUBIC, R
            )
            red, green, blue = colours(red, green, blue, row_ptr, steps, 0.0, inside, 1.0, False)
            gray = luma(red, green, blue)
        else:
            gray = tl.zeros([R, R], tl.float32)
            for band in range(BANDS):
                plane = pixels(
                    image_ptr + band * band_stride, row_ptr, y, x, row_stride, column_stride, OUT_H, OUT_W, BOXES,
                    BICUBIC, R,
                )  # fmt: skip
                gray += shades(plane, row_ptr, steps, 0.0, inside, 1.0, False)
            gray /= BANDS
        total = tl.sum(tl.sum(tl.where(inside, gray, 0.0), axis=1), axis=0)
        tl.store(sums_ptr + row * TILES + tile, total)

    @triton.jit
    def _split(x, R: tl.constexpr):
        """Split [R, R] into eight [R, R / 8]; part i has columns i, i + 8, i + 16, …"""
        even, odd = tl.split(tl.reshape(x, [R, R // 8, 2, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        x0, x4 = tl.split(x0)
        x1, x5 = tl.split(x1)
        x2, x6 = tl.split(x2)
        x3, x7 = tl.split(x3)
        return x0, x1, x2, x3, x4, x5, x6, x7

    @triton.jit
    def _store(ptr, x0, x1, x2, x3, x4, x5, x6, x7, mask, R: tl.constexpr):
        """Store eight [R, R / 8] as eight adjacent values per pointer."""
        even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
        odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
        tl.store(ptr + tl.arange(0, 8)[None, None, :], tl.reshape(tl.join(even, odd), [R, R // 8, 8]), mask=mask)

    @triton.jit(do_not_specialize=["first", "radius"])
    def view_kernel(
        images_ptr,
        table_ptr,
        sums_ptr,  # as in gray_kernel; None if a region is a whole image
        out_ptr,  # [B, OUT_H, OUT_W, CHANNELS]
        numbers_ptr,  # [2, CHANNELS]: a and b of the normalisation x * a + b
        first,
        radius,  # of the blur
        image_stride,
        row_stride,
        column_stride,
        band_stride,
        BANDS: tl.constexpr,
        CHANNELS: tl.constexpr,
        OUT_H: tl.constexpr,
        OUT_W: tl.constexpr,
        BOXES: tl.constexpr,
        BICUBIC: tl.constexpr,
        GRAY_TILES: tl.constexpr,  # sums per image
        SUMS: tl.constexpr,  # GRAY_TILES, rounded up to a power of two
        BLUR: tl.constexpr,
        TILES_X: tl.constexpr,
        TILES: tl.constexpr,
        R: tl.constexpr,  # side of the region that is read
        T: tl.constexpr,  # side of the tile that is written
    ):
        program = tl.program_id(0)
        row, tile = first + program // TILES, program % TILES
        row_ptr = table_ptr + row * ROW
        image_ptr = images_ptr + tl.load(row_ptr + IMAGE).to(tl.int64) * image_stride
        out_ptr += tl.load(row_ptr + VIEW).to(tl.int64) * (OUT_H * OUT_W * CHANNELS)
        steps = tl.load(row_ptr + STEPS)
        grid = tl.arange(0, R)
        tile_y, tile_x = tile // TILES_X * T, tile % TILES_X * T
        halo = radius if T < R else 0
        to_y, to_x = tile_y + grid, tile_x + grid
        y, x = to_y - halo, to_x - halo
        inside = (y < OUT_H)[:, None] & (x < OUT_W)[None, :]
        area = OUT_H * OUT_W
        mean = tl.full((), 0.0, tl.float32)
        if sums_ptr is not None:  # noqa: SIM102 (decided when compiling, and the next when running)
            if steps > 0:
                at = tl.arange(0, SUMS)
                mean = tl.sum(tl.load(sums_ptr + row * GRAY_TILES + at, mask=at < GRAY_TILES, other=0.0), axis=0) / area
        rows, columns = None, None
        if BLUR:
            sigma = real(row_ptr + SIGMA)
            rows = gaussian_band(to_y, y, tile_y - halo, OUT_H, sigma, radius, R)
            columns = tl.trans(gaussian_band(to_x, x, tile_x - halo, OUT_W, sigma, radius, R))
        if BANDS == 3:
            red, green, blue = rgb(
                image_ptr, row_ptr, y, x, row_stride, column_stride, band_stride, OUT_H, OUT_W, BOXES, BICUBIC, R
            )
            red, green, blue = colours(red, green, blue, row_ptr, steps, mean, inside, area, sums_ptr is None)
            if tl.load(row_ptr + GRAY) != 0:
                red = luma(red, green, blue)
                green, blue = red, red
            dtype = out_ptr.dtype.element_ty
            scale, shift = tl.load(numbers_ptr), tl.load(numbers_ptr + 3)
            red = finished(red, rows, columns, row_ptr, scale, shift, BLUR).to(dtype)
            scale, shift = tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 4)
            green = finished(green, rows, columns, row_ptr, scale, shift, BLUR).to(dtype)
            scale, shift = tl.load(numbers_ptr + 2), tl.load(numbers_ptr + 5)
            blue = finished(blue, rows, columns, row_ptr, scale, shift, BLUR).to(dtype)
            # The eight pixels of a thread are 24 adjacent values, written in three stores of eight.
            r0, r1, r2, r3, r4, r5, r6, r7 = _split(red, R)
            g0, g1, g2, g3, g4, g5, g6, g7 = _split(green, R)
            b0, b1, b2, b3, b4, b5, b6, b7 = _split(blue, R)
            eights = tl.arange(0, R // 8) * 8
            start = tile_x + eights
            ptrs = out_ptr + (to_y[:, None] * OUT_W + start[None, :])[:, :, None] * 3
            mask = (((grid < T) & (to_y < OUT_H))[:, None] & ((eights < T) & (start < OUT_W))[None, :])[:, :, None]
            mask0, mask1, mask2 = mask, mask, mask
            if OUT_W % 8 != 0:
                left, value = (OUT_W - start)[None, :, None], tl.arange(0, 8)[None, None, :]
                mask0, mask1, mask2 = (
                    mask & (value // 3 < left), mask & ((value + 8) // 3 < left), mask & ((value + 16) // 3 < left),
                )  # fmt: skip
            _store(ptrs, r0, g0, b0, r1, g1, b1, r2, g2, mask0, R)
            _store(ptrs + 8, b2, r3, g3, b3, r4, g4, b4, r5, mask1, R)
            _store(ptrs + 16, g5, b5, r6, g6, b6, r7, g7, b7, mask2, R)
        else:
            ptrs = out_ptr + (to_y[:, None] * OUT_W + to_x[None, :]) * CHANNELS
            mask = ((grid < T) & (to_y < OUT_H))[:, None] & ((grid < T) & (to_x < OUT_W))[None, :]
            for channel in range(CHANNELS):
                band = channel if BANDS > 1 else 0
                plane = pixels(
                    image_ptr + band * band_stride, row_ptr, y, x, row_stride, column_stride, OUT_H, OUT_W, BOXES,
                    BICUBIC, R,
                )  # fmt: skip
                plane = shades(plane, row_ptr, steps, mean, inside, area, sums_ptr is None)
                scale, shift = tl.load(numbers_ptr + channel), tl.load(numbers_ptr + CHANNELS + channel)
                plane = finished(plane, rows, columns, row_ptr, scale, shift, BLUR)
                tl.store(ptrs + channel, plane.to(out_ptr.dtype.element_ty), mask=mask)
