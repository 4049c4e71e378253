"""The queue update, compared with the slice assignment of the official code and lightly's memory bank.

pytest benchmarks/bench_queue.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks._timing import DEVICE, compare
from fastrm.kernels import FeatureQueue

SIZE, DIM = 65_536, 128


@pytest.mark.parametrize("count", [256, 4_096])
def test_enqueue(count: int, enter_rows: Any) -> None:
    torch.manual_seed(0)
    queue = FeatureQueue(SIZE, DIM).to(DEVICE)
    features, pointer = queue.features.clone(), [0]
    keys = torch.randn(count, DIM, device=DEVICE)

    def slices() -> None:
        """MoCo's slice assignment, for which the queue size must be a multiple of the batch size."""
        features[pointer[0] : pointer[0] + count] = F.normalize(keys, dim=1)
        pointer[0] = (pointer[0] + count) % SIZE

    ours = lambda: queue.enqueue_(keys)  # noqa: E731
    for _ in range(3):
        ours()
        slices()
        torch.testing.assert_close(queue.features, features, rtol=1e-6, atol=1e-6)
        assert queue.pointer.item() == pointer[0]
    contenders = {"enqueue_": ours, "slice assignment": slices}
    enter_rows(compare(f"queue, {count} keys", contenders, 2 * keys.nbytes, repeats=20))
