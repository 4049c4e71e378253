"""The search for the fastest tiles of the contrastive losses on a GPU."""

from __future__ import annotations

import torch

from . import _sweep, _tiles
from ._scoring import Scoring
from .dispatch import triton, triton_problem

MILLISECONDS = 200
"""For which each tile is run."""


def tune_losses(
    queries: int,
    rows: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> dict[str, float]:
    """Measure three to five tile sizes of the contrastive losses on this GPU, and keep the fastest for later calls.

    The losses never search by themselves: without this call they use tiles that suit every GPU. The choice is stored in
    ``~/.cache/fastrm/tiles.json`` (or below ``$XDG_CACHE_HOME``) for this model of GPU, kind of product, width (rounded
    up to a power of two), and fewer than 1,024 queries or more. All later processes use it; delete the file to return
    to the usual tiles. The tiles change the order of the sums, so the last digits of a loss may differ.

    Args:
        queries: rows of the queries, N.
        rows: rows of the queue, or of all processes' keys, K.
        dim: width of the rows, D, up to 512; up to 256 for float32 at matmul precision ``"highest"``. Wider rows have
            one tile.
        dtype: of the queue; float32 follows ``torch.set_float32_matmul_precision``.
        device: the GPU.

    Returns:
        Milliseconds of the loss and its gradient, by tile: median of the runs in 0.2 s. The first is the usual tile.

    Raises:
        ValueError: there is no GPU or no Triton, or the shape has one tile only.
        OSError: the file cannot be written; this process uses the choice nevertheless.
    """
    device = torch.device(device)
    problem = triton_problem(device)
    if problem is None and device.type == "cuda" and not torch.cuda.is_available():
        problem = "torch finds no GPU"
    if problem:
        raise ValueError(f"tune_losses: Triton cannot run: {problem}")
    if min(queries, rows, dim) < 1:
        raise ValueError(f"tune_losses: queries={queries}, rows={rows} and dim={dim} must be 1 or more")
    kind = _sweep.product_kind(dtype)
    major = _sweep.capacity(device)[1]
    tiles = _tiles.candidates(queries, dim, kind, major)
    if not tiles:
        raise ValueError(f"tune_losses: dim={dim} is too wide: such rows are processed in parts, whose tiles are fixed")
    case = _tiles.key(_sweep.gpu(device), queries, dim, kind)
    _tiles.measured.cache_clear()  # another process may have stored more
    chosen = _tiles.measured()
    before, times = dict(chosen), {}
    try:
        for tile in tiles:
            chosen[case] = tile
            if (time := _time(queries, rows, dim, dtype, device)) is not None:
                times[tile] = time
    finally:
        chosen.clear()
        chosen.update(before)
    chosen[case] = min(times, key=lambda tile: times[tile])
    _tiles.store(chosen)
    return {f"{t.block_n} x {t.block_k}, {t.warps} warps, {t.stages} stages": time for t, time in times.items()}


def _time(queries: int, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """Milliseconds of one loss with its gradient; None if the tile does not fit the GPU."""
    generator = torch.Generator(device).manual_seed(0)
    query, key = torch.randn(2, queries, dim, device=device, generator=generator)
    queue = torch.nn.functional.normalize(torch.randn(rows, dim, device=device, generator=generator), dim=1).to(dtype)
    scoring = Scoring(query, key, queue=queue, temperature=0.1)
    try:
        milliseconds: float = triton.testing.do_bench(
            lambda: _sweep.swept_losses(scoring, gradient=True), rep=MILLISECONDS, return_mode="median"
        )
    except triton.runtime.errors.OutOfResources:
        return None
    return milliseconds
