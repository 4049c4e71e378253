"""A captured training step equals a plain one; captures are recorded and replayed without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrm.data import Batch
from fastrm.errors import TrainingError
from fastrm.kernels import EMA, fused_ema_
from fastrm.kernels.multi_tensor import Mirror, host_value
from fastrm.methods import find
from fastrm.models import Backbone
from fastrm.optim import LARS, SGD, AdamW, build_optimizer
from fastrm.optim.schedules import Rates
from fastrm.run.graph import GraphedStep
from fastrm.run.step import Step
from fastrm.settings.config import Config
from tests.interpreted import SLOW_TRITON, TRITON, device_of, often_and_slow, run_triton_cases
from tests.recorded import Graph, cuda_graphs  # noqa: F401 (a fixture)

Small = Callable[..., Config]
CPU = torch.device("cpu")


class Net(nn.Module):
    """A network with a convolution, BatchNorm and a feature map, and as few tensors as possible."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward_features(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def forward_head(self, features: Tensor, pre_logits: bool) -> Tensor:
        return features.mean(dim=(2, 3))


def made(kind: type[Step], config: Config) -> Step:
    """A step of a small method, the same for each kind."""
    torch.manual_seed(0)
    method = find(config.method.method)(Backbone(Net(), 4, 4), config.method, backend="triton").train()
    optimizer = build_optimizer(method, config.optim, backend="triton")
    return kind(
        method, optimizer, precision="fp32", accumulate=1, clip_norm=1.0, layout=torch.channels_last
    )  # fmt: skip


def trained(step: Step, bad: Callable[[int], bool], count: int) -> list[dict[str, Any]]:
    """For each step, its outputs, errors and the state of the method afterwards."""
    left = []
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        first, second = torch.randn(2, 4, 3, 8, 8, generator=generator)
        if bad(number):
            first = first * math.inf
        (output,) = step(
            [Batch((first, second), [0, 1, 2, 3])],
            Rates(lr=0.1 / (number + 1), residual_weight=number / count, teacher_momentum=0.5 + number / 100),
            measure=number in MEASURED,
        )
        said = {name: str(float(v)) for name in ("loss", "gap") if (v := getattr(output, name)) is not None}
        try:
            said["skipped"] = str(step.check(number + 1))
        except TrainingError as error:
            said["stopped"] = str(error)
        left.append(said | {name: value.clone() for name, value in step.method.state_dict().items()})
    return left


MEASURED = (0, 3, 5, 7, 13)
CASES = [
    pytest.param("mocov3", "lars", *SLOW_TRITON.values, marks=SLOW_TRITON.marks),
    pytest.param("mocov2", "adamw", *TRITON.values, marks=TRITON.marks),
]


@pytest.mark.parametrize(("method", "optimizer", "backend"), CASES)
def test_a_captured_step_equals_a_plain_step_with_skips_and_stop(
    method: str,
    optimizer: str,
    backend: str,
    small: Small,
    cuda_graphs: type[Graph],  # noqa: F811
) -> None:
    """All outputs and states are equal bit for bit.

    Both kinds of step (with and without measurement) are captured at steps 4 and 5. Gradients are not finite at step 2
    and from step 4 to 13.
    """
    if device_of(backend) != CPU:
        pytest.skip("on a GPU test_step captures in earnest")
    config = small(method=method, optimizer=optimizer, hidden_dim=4, output_dim=4, predictor_hidden_dim=4, queue_size=6)

    def bad(number: int) -> bool:
        return number == 2 or number >= 4

    graphed = made(GraphedStep, config)
    plain, captured = trained(made(Step, config), bad, 14), trained(graphed, bad, 14)
    assert isinstance(graphed, GraphedStep)
    assert set(graphed.captured) == {False, True}
    for number, (want, found) in enumerate(zip(plain, captured, strict=True)):
        assert want.keys() == found.keys(), number
        for name, value in want.items():
            same = torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name]
            assert same, (number, name, value, found[name])
    assert ["stopped" in said for said in captured] == 13 * [False] + [True]
    assert "10 steps in a row, up to step 14" in captured[13]["stopped"]


def test_a_device_table_is_right_before_and_after_replays(
    cuda_graphs: type[Graph],  # noqa: F811
) -> None:
    first, second, third = [[1, 2]], [[3, 4]], [[5, 6]]
    mirror = Mirror(CPU)
    read: list[Tensor] = []  # the table that each graph reads

    def captured(columns: list[list[int]]) -> Graph:
        graph = cuda_graphs()
        with torch.cuda.graph(graph):  # type: ignore[arg-type]
            read.append(mirror.update(columns))
        return graph

    assert mirror.update(first).tolist() == [[1], [2]]
    graphs = [captured(second), captured(first), captured(second)]
    for columns in (first, third, first, second, second, third):
        assert mirror.update(columns).flatten().tolist() == columns[0]
        for graph, table, own in zip(graphs, read, (second, first, second), strict=True):
            graph.replay()
            assert table.flatten().tolist() == own[0]
            assert mirror.update(columns).flatten().tolist() == columns[0]


SHAPES = [(3, 5), (7,)]


def parameters(seed: int) -> list[nn.Parameter]:
    """Two parameters with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("kind", [LARS, SGD, AdamW])
def test_an_optimizer_alternates_between_eager_and_replayed_steps(
    kind: Any,
    backend: str,
    cuda_graphs: type[Graph],  # noqa: F811
) -> None:
    """The gradients of eager and captured steps are different tensors. The learning rate is a number or a tensor, and
    may be 0.
    """
    if device_of(backend) != CPU:
        pytest.skip("the recorder is for the CPU")
    params, plain = parameters(0), parameters(0)
    rate = torch.tensor(0.5)
    optimizer, reference = kind(params, lr=rate, backend=backend), kind(plain, lr=0.5, backend="reference")
    places = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    graph = cuda_graphs()

    def step(lr: float | Tensor, place: int, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for p, q, grad in zip(params, plain, places[place], strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad = grad.copy_(q.grad)
        optimizer.param_groups[0]["lr"], reference.param_groups[0]["lr"] = lr, float(lr)
        reference.step()

    step(rate, 0, 0)
    optimizer.step()
    for p, grad in zip(params, places[1], strict=True):
        p.grad = grad
    with torch.cuda.graph(graph):  # type: ignore[arg-type]
        optimizer.step()
    for number, (lr, place) in enumerate([(0.5, 0), (0.25, 1), (0.0, 0), (0.0, 1), (0.5, 0), (0.125, 1)], start=1):
        if place:
            step(rate.fill_(lr), 1, number)
            graph.replay()
        else:
            step(lr, 0, number)
            optimizer.step()
        for p, q in zip(params, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, n=number: f"step {n}: {text}")


@pytest.mark.parametrize("backend", [TRITON])
def test_an_average_prepared_in_a_capture_is_right_outside(
    backend: str,
    cuda_graphs: type[Graph],  # noqa: F811
) -> None:
    if device_of(backend) != CPU:
        pytest.skip("the recorder is for the CPU")
    (teacher, prepared), student = ([torch.full((5,), 4.0)] for _ in range(2)), [torch.zeros(5)]
    momentum = torch.tensor(0.5)
    graph = cuda_graphs()
    with torch.cuda.graph(graph):  # type: ignore[arg-type]
        fused_ema_(teacher, student, momentum, backend=backend)
        average = EMA(prepared, student, backend=backend)
        average.update_(momentum)
    for value in (2.0, 0.5):
        fused_ema_(teacher, student, 0.5, backend=backend)
        average.update_(0.5)
        assert teacher[0].tolist() == prepared[0].tolist() == 5 * [value]
        graph.replay()
        assert teacher[0].tolist() == prepared[0].tolist() == 5 * [value / 2]


@pytest.mark.parametrize("backend", [TRITON])
def test_values_that_a_graph_cannot_read_are_refused(backend: str, cuda_graphs: type[Graph]) -> None:  # noqa: F811
    if device_of(backend) != CPU:
        pytest.skip("the recorder is for the CPU")
    params = parameters(0)
    for p in params:
        p.grad = torch.ones_like(p)
    fresh = LARS(params, lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="step once before the capture"), torch.cuda.graph(cuda_graphs()):  # type: ignore[arg-type]
        fresh.step()
    assert not fresh.state
    with torch.cuda.graph(cuda_graphs()), pytest.raises(ValueError, match="momentum is a tensor on cpu"):  # type: ignore[arg-type]
        host_value("fused_ema_", "momentum", torch.tensor(0.5))
    assert host_value("fused_ema_", "momentum", torch.tensor(0.5)) == 0.5


@often_and_slow
def test_triton_cases_in_the_interpreter(cases: str) -> None:
    run_triton_cases(__file__, cases)
