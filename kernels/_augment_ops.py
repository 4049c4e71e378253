"""The operations of the ``augment_views`` kernels on a square region of one image: one tensor [R, R] per band."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from .batched import LUMA
from .dispatch import tl, triton

COLUMN = {
    "image": 0, "view": 1, "box": 2, "flip": 6, "steps": 7, "before": 8, "order": 9, "gray": 13, "solarize": 14,
    "sigma": 15, "factors": 16,
}  # fmt: skip
"""First column of each field in the table, which has one int32 row per view; ``sigma`` and ``factors`` hold float32
bits.
``steps`` is the number of colour changes, and ``before`` the number of those before the contrast."""
COLUMNS = 20

if triton is not None:
    _RED, _GREEN, _BLUE = map(tl.constexpr, LUMA)
    IMAGE, VIEW, BOX, FLIP, STEPS, BEFORE, ORDER, GRAY, SOLARIZE, SIGMA, FACTORS = map(tl.constexpr, COLUMN.values())
    ROW = tl.constexpr(COLUMNS)

    @triton.jit
    def real(ptr):
        return tl.load(ptr).to(tl.float32, bitcast=True)

    @triton.jit
    def _bounded(x, high):
        return tl.minimum(tl.maximum(x, 0.0), high)

    @triton.jit
    def luma(red, green, blue):
        return _RED * red + _GREEN * green + _BLUE * blue

    @triton.jit
    def _weight(distance, BICUBIC: tl.constexpr):
        """Weight of a source pixel at this distance, in units of the filter's width."""
        x = tl.abs(distance)
        if BICUBIC:  # Keys' filter with a = -1/2
            near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
            weight = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
        else:
            weight = tl.maximum(1 - x, 0.0)
        return weight

    @triton.jit
    def _tap(first, i, centre, width, length, BICUBIC: tl.constexpr):
        """Source pixel ``first + i`` of a crop of ``length`` pixels, and its weight for each output pixel."""
        at = first + i
        weight = _weight((at + 0.5 - centre) / width, BICUBIC)
        weight = tl.where((at >= 0) & (at < length), weight, 0.0)
        return tl.minimum(tl.maximum(at, 0), length - 1), weight

    @triton.jit
    def pixels(
        image_ptr,  # first pixel of the band
        row_ptr,
        y,
        x,
        row_stride,
        column_stride,
        OUT_H: tl.constexpr,
        OUT_W: tl.constexpr,
        BOXES: tl.constexpr,
        BICUBIC: tl.constexpr,
        R: tl.constexpr,
    ):
        """Pixels of the view before its colours are changed, at rows ``y`` and columns ``x``: [R, R] from 0 to 255."""
        y, x = tl.minimum(tl.maximum(y, 0), OUT_H - 1), tl.minimum(tl.maximum(x, 0), OUT_W - 1)
        x = tl.where(tl.load(row_ptr + FLIP) != 0, OUT_W - 1 - x, x)
        if BOXES:
            # Loop over the source pixels within the filter, which widens as the image shrinks.
            height, width = tl.load(row_ptr + BOX + 2), tl.load(row_ptr + BOX + 3)
            scale_y, scale_x = height.to(tl.float32) / OUT_H, width.to(tl.float32) / OUT_W
            wide_y, wide_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
            reach_y, reach_x = wide_y * (1 + BICUBIC), wide_x * (1 + BICUBIC)
            centre_y, centre_x = (y + 0.5) * scale_y, (x + 0.5) * scale_x
            first_y = tl.floor(centre_y - reach_y + 0.5).to(tl.int32)
            first_x = tl.floor(centre_x - reach_x + 0.5).to(tl.int32)
            taps_y, taps_x = (2 * reach_y + 0.999).to(tl.int32), (2 * reach_x + 0.999).to(tl.int32)
            image_ptr += tl.load(row_ptr + BOX) * row_stride + tl.load(row_ptr + BOX + 1) * column_stride
            plane = tl.zeros([R, R], tl.float32)
            total_y, total_x = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
            for i in range(taps_x):
                _, weight_x = _tap(first_x, i, centre_x, wide_x, width, BICUBIC)
                total_x += weight_x
            for j in range(taps_y):
                at_y, weight_y = _tap(first_y, j, centre_y, wide_y, height, BICUBIC)
                total_y += weight_y
                line = tl.zeros([R, R], tl.float32)
                for i in range(taps_x):
                    at_x, weight_x = _tap(first_x, i, centre_x, wide_x, width, BICUBIC)
                    ptrs = image_ptr + at_y[:, None] * row_stride + at_x[None, :] * column_stride
                    line += weight_x[None, :] * tl.load(ptrs).to(tl.float32)
                plane += weight_y[:, None] * line
            plane = _bounded(plane / (total_y[:, None] * total_x[None, :]), 255.0)  # the bicubic filter overshoots
        else:
            ptrs = image_ptr + y[:, None] * row_stride + x[None, :] * column_stride
            plane = tl.load(ptrs).to(tl.float32)
        return plane

    @triton.jit
    def rgb(
        image_ptr,
        row_ptr,
        y,
        x,
        row_stride,
        column_stride,
        band_stride,
        OUT_H: tl.constexpr,
        OUT_W: tl.constexpr,
        BOXES: tl.constexpr,
        BICUBIC: tl.constexpr,
        R: tl.constexpr,
    ):
        """The same as :func:`pixels`, for three bands."""
        red = pixels(image_ptr, row_ptr, y, x, row_stride, column_stride, OUT_H, OUT_W, BOXES, BICUBIC, R)
        green = pixels(
            image_ptr + band_stride, row_ptr, y, x, row_stride, column_stride, OUT_H, OUT_W, BOXES, BICUBIC, R
        )
        blue = pixels(
            image_ptr + 2 * band_stride, row_ptr, y, x, row_stride, column_stride, OUT_H, OUT_W, BOXES, BICUBIC, R
        )
        return red, green, blue

    @triton.jit
    def _turned(low, chroma, hue, place):
        """The value of a channel whose position on the colour circle is ``place``; see ``batched.hue_``."""
        return low + chroma * _bounded(tl.abs(tl.abs(hue - place) - 3) - 1, 1.0)

    @triton.jit
    def colours(red, green, blue, row_ptr, steps, mean, inside, area, WHOLE: tl.constexpr):
        """Apply the first ``steps`` of the four colour changes to an RGB image, in the image's order.

        ``mean`` is the mean gray, which contrast keeps. For a WHOLE image it is computed here, over the pixels
        ``inside``.
        """
        for step in range(steps):
            kind = tl.load(row_ptr + ORDER + step)
            factor = real(row_ptr + FACTORS + kind)
            if kind == 0:
                red, green, blue = (
                    _bounded(red * factor, 255.0),
                    _bounded(green * factor, 255.0),
                    _bounded(blue * factor, 255.0),
                )
            elif kind == 1:
                if WHOLE:
                    shift = tl.sum(tl.sum(tl.where(inside, luma(red, green, blue), 0.0), axis=1), axis=0) / area
                else:
                    shift = mean
                shift *= 1 - factor
                red = _bounded(red * factor + shift, 255.0)
                green = _bounded(green * factor + shift, 255.0)
                blue = _bounded(blue * factor + shift, 255.0)
            elif kind == 2:
                gray = (1 - factor) * luma(red, green, blue)
                red = _bounded(red * factor + gray, 255.0)
                green = _bounded(green * factor + gray, 255.0)
                blue = _bounded(blue * factor + gray, 255.0)
            else:
                low = tl.minimum(tl.minimum(red, green), blue)
                chroma = tl.maximum(tl.maximum(red, green), blue) - low
                hue = (green + blue - red - low) / tl.maximum(chroma, 1e-5) + 1
                hue = tl.where(green < blue, -hue, hue) + 6 * factor
                red, green, blue = (
                    _turned(low, chroma, hue, 0.0), _turned(low, chroma, hue, 2.0), _turned(low, chroma, hue, -2.0),
                )  # fmt: skip
        return red, green, blue

    @triton.jit
    def shades(plane, row_ptr, steps, mean, inside, area, WHOLE: tl.constexpr):
        """The same for one band of an image that is not RGB: brightness and contrast only."""
        for step in range(steps):
            kind = tl.load(row_ptr + ORDER + step)
            factor = real(row_ptr + FACTORS + kind)
            shift = tl.full((), 0.0, tl.float32)
            if kind == 1:
                if WHOLE:
                    shift = tl.sum(tl.sum(tl.where(inside, plane, 0.0), axis=1), axis=0) / area
                else:
                    shift = mean
                shift *= 1 - factor
            plane = _bounded(plane * factor + shift, 255.0)
        return plane

    @triton.jit
    def _tapped(distance, scale, radius):
        """A Gaussian, not normalised, which is 0 beyond ``radius``."""
        share = distance * scale
        return tl.where(tl.abs(distance) <= radius, tl.exp2(-share * share), 0.0)

    @triton.jit
    def gaussian_band(to, of, start, size, sigma, radius, R: tl.constexpr):
        """Band matrix [R, R]: the weight of each input pixel ``of`` in each blurred pixel ``to``.

        ``start`` is the first input pixel. The view has ``size`` pixels and is reflected at its edges.
        """
        scale = 0.8493218 / sigma  # exp(-(distance / sigma)^2 / 2) as a power of 2
        to, of = to[:, None], of[None, :]
        weights = _tapped(to - of, scale, radius)
        if (start <= 0) | (start + R >= size):
            weights += tl.where(of > 0, _tapped(to + of, scale, radius), 0.0)
            weights += tl.where(of < size - 1, _tapped(2 * (size - 1) - to - of, scale, radius), 0.0)
            weights = tl.where((of >= 0) & (of < size), weights, 0.0)
        total = 2 * tl.sum(_tapped(tl.arange(0, R), scale, radius), axis=0) - 1
        return (weights * (1 / total)).to(tl.float16)

    @triton.jit
    def finished(plane, rows, columns, row_ptr, scale, shift, BLUR: tl.constexpr):
        """Blur, solarize, and normalise: ``plane * scale + shift``."""
        if BLUR:
            plane = tl.dot(tl.dot(rows, plane.to(tl.float16)).to(tl.float16), columns)
        plane = tl.where(tl.load(row_ptr + SOLARIZE) != 0, tl.minimum(plane, 255 - plane), plane)
        return plane * scale + shift
