"""The search for tiles: the stored tile is right and used, and not used for other shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrm.kernels import _sweep, _tiles, info_nce, tune_losses
from fastrm.kernels.dispatch import triton
from tests import oracle
from tests.interpreted import INTERPRETED, TRITON, device_of, run_triton_cases

N, K, D = 5, 70, 20


@pytest.fixture(autouse=True)
def _own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _tiles.measured.cache_clear()
    yield
    _tiles.measured.cache_clear()


def rows(backend: str) -> list[torch.Tensor]:
    """Queries, keys and a queue of unit rows on the device of the backend."""
    made = torch.Generator().manual_seed(3)
    query, key, queue = (torch.randn(count, D, generator=made) for count in (N, N, K))
    return [x.to(device_of(backend)) for x in (query, key, torch.nn.functional.normalize(queue, dim=1))]


class Recorded:
    """A kernel that records the tiles of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launched = kernel, list[tuple[int, ...]]()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.launched.append(tuple(options[name] for name in ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")))
            self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("backend", [TRITON])
def test_the_fastest_tile_that_fits_is_stored_and_used(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, queue = rows(backend)
    sweep = Recorded(_sweep.sweep_kernel)
    monkeypatch.setattr(_sweep, "sweep_kernel", sweep)
    case = _tiles.key(_sweep.gpu(query.device), N, D, _sweep.product_kind(torch.float32))
    every = _tiles.candidates(N, D, _sweep.product_kind(torch.float32), _sweep.capacity(query.device)[1])
    assert len(every) == len(set(every)) >= 2
    found = iter([2.0, None, 1.0, 3.0, 4.0][: len(every)])

    def timed(run: Any, **_: Any) -> float:
        run()
        if (time := next(found)) is None:
            raise triton.runtime.errors.OutOfResources(1, 2, "shared memory")
        return time

    monkeypatch.setattr(triton.testing, "do_bench", timed)
    times = tune_losses(N, K, D, dtype=torch.float32, device=query.device)
    assert sweep.launched == [tuple(tile) for tile in every]  # each candidate ran with its own tile
    assert len(times) == len(every) - 1
    fastest = every[2] if len(every) > 2 else every[0]
    assert json.loads(_tiles.stored().read_text()) == {case: list(fastest)}

    _tiles.measured.cache_clear()  # as in a later process
    del sweep.launched[:]
    losses = info_nce(query, key, queue, reduction="none", temperature=0.2, backend=backend)
    assert sweep.launched == [tuple(fastest)]
    want = oracle.info_nce(query.cpu(), key.cpu(), queue.cpu(), 0.2)
    torch.testing.assert_close(losses.double().cpu(), torch.as_tensor(want), rtol=1e-5, atol=1e-6)
    for other in ((_tiles.MANY, D), (N, 65)):
        assert _sweep.measured_tile(*other, _sweep.product_kind(torch.float32), query.device) is None


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_candidate_tile_gives_the_loss(backend: str, dtype: torch.dtype) -> None:
    query, key, queue = rows(backend)
    queue, kind = queue.to(dtype), _sweep.product_kind(dtype)
    want = torch.as_tensor(oracle.info_nce(query.cpu(), key.cpu(), queue.double().cpu(), 0.2))
    # Half precision rounds queries by up to 2**-11 of a logit, which is at most 1 / 0.2.
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 2**-11 / 0.2}
    for n in (N, _tiles.MANY):
        for tile in _tiles.candidates(n, D, kind, 9):
            _tiles.measured()[_tiles.key(_sweep.gpu(query.device), N, D, kind)] = tile
            losses = info_nce(query, key, queue, reduction="none", temperature=0.2, backend=backend)
            torch.testing.assert_close(losses.double().cpu(), want, **close)


@pytest.mark.skipif(triton is None, reason="the tiles are those of the Triton kernels")
@pytest.mark.parametrize("kind", ["half", "tf32", "tf32x3"])
def test_the_first_candidate_is_the_usual_tile(kind: str) -> None:
    for dim in (20, 64, 100, 128, 256, 512, 513):
        for n, major in ((256, 9), (4096, 9), (4096, 8)):
            every = _tiles.candidates(n, dim, kind, major)
            plan = _sweep.plan(n, 65536, dim, kind, 132, major)
            assert (plan is None) == (not every)
            if plan is not None:
                assert plan[:4] == every[0]
                assert len(every) == len(set(every)) >= 2


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="there Triton runs")
def test_without_a_gpu_nothing_is_measured_or_written() -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(ValueError, match="tune_losses: Triton cannot run: "):
            tune_losses(N, K, D, device=device)
    assert not _tiles.stored().exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 3}', '{"a": [1, 2, 3]}', '{"a": ["x", 1, 1, 1]}'])
def test_a_damaged_file_of_tiles_is_reported_and_not_used(content: str) -> None:
    _tiles.stored().parent.mkdir(parents=True)
    _tiles.stored().write_text(content)
    with pytest.warns(UserWarning, match=r"tiles.json is not used, since it cannot be read: "):
        assert _tiles.measured() == {}
    assert _tiles.measured() == {}  # one warning per process


def test_triton_cases_in_the_interpreter() -> None:
    run_triton_cases(__file__)
