"""Time of a training step, a method each: both networks, loss, backward, optimizer, teacher and queue.

pytest benchmarks/bench_step.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrm.config import build
from fastrm.kernels import EMA
from fastrm.methods import build_method
from fastrm.optim import build_optimizer

BATCH, SIZE = 32, 32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("residual_weight", [0.0, 1.0])
@pytest.mark.parametrize("method", ["mocov3", "mocov2", "byol", "densecl"])
def test_step(method: str, residual_weight: float, benchmark: Any) -> None:
    config = build(
        data="synthetic", method=method, arch="resnet18", image_size=SIZE, queue_size=4096,
        residual_weight=residual_weight,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_method(config).to(DEVICE, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optim)
    average = EMA(model.teacher, model.student)
    views = [
        torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last) for _ in "12"
    ]
    weight = torch.tensor(residual_weight, device=DEVICE)

    def step() -> None:
        output = model(*views, weight)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_(0.99)
        model.push(output.keys)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    step()
    assert torch.isfinite(model(*views, weight).loss)
    benchmark.extra_info["images_per_step"] = BATCH
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    if benchmark.stats is not None:
        print(f"\n{method} weight {residual_weight:g}: {BATCH / benchmark.stats.stats.median:.1f} images a second")
