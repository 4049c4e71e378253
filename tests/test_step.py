"""The training step: no graph breaks, no waiting for the device, verification, and the profile."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrm import train
from fastrm.data import Batch
from fastrm.errors import UsageError
from fastrm.hooks.profile import PARTS
from fastrm.methods import build_method
from fastrm.methods.pair import TeacherPair
from fastrm.methods.verify import warning as verification_warning
from fastrm.optim import build_optimizer
from fastrm.optim.schedules import Rates
from fastrm.run import checkpoint
from fastrm.run.graph import GraphedStep
from fastrm.run.step import Step
from fastrm.settings.config import Config
from tests.test_train import PAIRS

Small = Callable[..., Config]
METHODS = ["mocov3", "mocov2", "byol", "densecl"]


@pytest.mark.parametrize(
    ("method", "arch"),
    [
        ("densecl", "test_resnet"),
        ("mocov3", "test_vit"),
        pytest.param("byol", "test_convnext", marks=pytest.mark.slow),
        *(pytest.param(method, "test_resnet", marks=pytest.mark.slow) for method in METHODS[:3]),
    ],
)
def test_student_teacher_and_predictor_compile_without_graph_breaks(method: str, arch: str, small: Small) -> None:
    built = build_method(small(method=method, arch=arch, image_size=160 if arch == "test_vit" else 32))
    images = torch.randn(4, 3, *(2 * [160 if arch == "test_vit" else 32]))
    output = built.student(images).output.detach()
    for part, inputs in ((built.student, images), (built.teacher, images), (built.predictor, output)):
        if isinstance(part, nn.Identity):
            continue  # nothing to compile
        torch._dynamo.reset()
        explained: Any = torch._dynamo.explain(part)(inputs)
        assert explained.graph_break_count == 0, explained.break_reasons
        assert explained.graph_count == 1


class Reads(TorchDispatchMode):
    """Counts how often a value is copied to the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def ready(config: Config, device: torch.device) -> tuple[Step, list[Batch]]:
    """A step of a small method, and two equal micro-batches."""
    torch.manual_seed(0)
    method = build_method(config, device=device).train()
    optimizer = build_optimizer(method, config.optim)
    step = Step(
        method, optimizer, precision="fp32", accumulate=2, clip_norm=1.0, layout=torch.channels_last
    )  # fmt: skip
    first, second = torch.randn(2, 16, 3, 32, 32, device=device)
    return step, [Batch((first, second), [])] * 2


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_one_value_per_step_is_read_on_the_cpu(method: str, optimizer: str, small: Small) -> None:
    """The value tells whether the gradient is finite; on a GPU it stays on the device."""
    step, batches = ready(small(method=method, optimizer=optimizer), torch.device("cpu"))
    for number in range(3):
        with Reads() as reads:
            step(batches, Rates(0.1, 1.0, 0.9), measure=False)
        assert reads.count <= 1 or number == 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_for_the_gpu(method: str, small: Small) -> None:
    step, batches = ready(small(method=method), torch.device("cuda"))
    step(batches, Rates(0.1, 1.0, 0.9), measure=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(batches, Rates(0.1, 1.0, 0.9), measure=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


VIEWS = torch.randn(6, 2, 2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(2))  # steps, micro-batches, views


def states(kind: type[Step], config: Config, device: torch.device) -> dict[str, Tensor]:
    """The state after six steps with changing learning rates and momenta; the gradient of one is not finite."""
    torch.manual_seed(0)
    method = build_method(config, device=device).train()
    step = kind(
        method, build_optimizer(method, config.optim), precision="fp32", accumulate=2, clip_norm=1.0,
        layout=torch.channels_last,
    )  # fmt: skip
    for number, views in enumerate(VIEWS.to(device)):
        pairs = [Batch((first * math.inf if number == 3 else first, second), []) for first, second in views]
        # steps 0 and 3 are measured, so steps 4 and 5 are replayed with a CUDA graph
        outputs = step(pairs, Rates(0.1 / (number + 1), number / 6, 0.9 + number / 100), measure=number in (0, 3))
        assert len(outputs) == 2
    assert step.check(6) == 1
    return {name: value.cpu() for name, value in method.state_dict().items()}


@pytest.mark.parametrize(("method", "optimizer"), PAIRS)
def test_step_values_may_be_tensors(method: str, optimizer: str, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graphed step without its graph: on the CPU its steps stay eager, and give the same bits."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(GraphedStep, "_beside", lambda self, measure: Step._run(self, self.images, measure))
    monkeypatch.setattr("fastrm.run.graph.EAGER", 100)
    decay = {"arch": "test_vit", "image_size": 32, "layer_decay": 0.5} if method == "mocov3" else {}
    config, cpu = small(method=method, optimizer=optimizer, **decay), torch.device("cpu")
    plain, graphed = states(Step, config, cpu), states(GraphedStep, config, cpu)
    assert all(torch.equal(value, graphed[name]) for name, value in plain.items())


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_step_gives_the_same_state(
    method: str, optimizer: str, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise two plain steps differ too: AdamW moves a weight by its learning rate, however small the gradient is.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    config, gpu = small(method=method, optimizer=optimizer), torch.device("cuda")
    plain, graphed = states(Step, config, gpu), states(GraphedStep, config, gpu)
    for name, value in plain.items():
        torch.testing.assert_close(graphed[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


class Casts(TorchDispatchMode):
    """Records the tensors that are converted to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.converted: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.converted.append(args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_no_weight_of_the_teacher_is_converted_in_its_forward(method: str, small: Small) -> None:
    built = build_method(small(method=method, precision="bf16"))
    images = torch.randn(4, 3, 32, 32)
    weights = {p.data_ptr() for p in built.teacher.parameters()}
    found = []
    for low in (False, True):
        if low:
            built.pair.keep_low_precision(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
            found.append((built.encode_teacher(images).output, casts.converted))
    (plain, before), (shadowed, after) = found
    assert torch.equal(plain, shadowed)
    assert any(tensor.data_ptr() in weights for tensor in before)
    assert not any(tensor.data_ptr() in weights for tensor in after)


@pytest.mark.parametrize("optimizer", ["lars", *(pytest.param(o, marks=pytest.mark.slow) for o in ("sgd", "adamw"))])
def test_a_low_precision_copy_of_the_teacher_does_not_change_the_run(
    optimizer: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are equal bit for bit, also over a resume."""
    states = {}
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(TeacherPair, "keep_low_precision", lambda self, dtype: None)
        for steps in (2, 4):
            leaves = {"precision": "bf16", "optimizer": optimizer, "batch_size": 8, "max_steps": steps}
            train.train(small(**leaves, out=tmp_path / name))
        states[name] = checkpoint.load(tmp_path / name)["method"]
    assert states["with"].keys() == states["without"].keys()
    assert all(torch.equal(value, states["without"][name]) for name, value in states["with"].items())


def test_the_profile_is_a_trace_and_a_table_that_adds_up(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.train(small(method="mocov2", max_steps=6, profile=3))
    shown = capsys.readouterr().out
    rows = dict(re.findall(r"^([a-z ]+?)\s{2,}([\d.]+)\s+[\d.]+%$", shown, re.M))
    assert [*rows] == [*PARTS, "the rest"]
    (whole,) = re.findall(r"^step\s{2,}([\d.]+)$", shown, re.M)
    assert sum(map(float, rows.values())) == pytest.approx(float(whole), abs=0.1)
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert all(names.count(part) == 3 for part in PARTS)


def test_accumulated_micro_batches_give_the_mean_gradient(small: Small) -> None:
    """BYOL has no negatives, so with BatchNorm in evaluation mode two halves give the gradient of the whole batch."""
    moved = []
    for accumulate in (1, 2):
        config = small(method="byol", optimizer="sgd", weight_decay=0.0)
        torch.manual_seed(0)
        method = build_method(config).eval()
        start = [p.detach().clone() for p in method.parameters()]
        step = Step(
            method, build_optimizer(method, config.optim), precision="fp32", accumulate=accumulate, clip_norm=None,
            layout=torch.channels_last,
        )  # fmt: skip
        views = torch.randn(2, 16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        halves = [Batch((part[0], part[1]), []) for part in views.chunk(accumulate, dim=1)]
        step(halves, Rates(1.0, 1.0, 0.9), measure=False)
        moved.append([p.detach() - q for p, q in zip(method.parameters(), start, strict=True)])
    for whole, parts in zip(*moved, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


class Given(TorchDispatchMode):
    """Records the arguments of each fused loss on one backend (dtypes, shapes, strides) and the state of autocast."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend, self.calls = backend, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastrm" and "losses" in func._schema.name and args[-1] == self.backend:
            autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            seen = [(v.dtype, v.shape, v.stride()) if isinstance(v, Tensor) else v for v in args if v is not args[5]]
            self.calls.append((func._schema.name, *seen, [t is not None and t.dtype for t in args[5]], autocast))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "residual_at"),
    [
        ("bf16", "output"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("bf16", "backbone"), ("fp32", "output"))),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_verification_uses_the_same_arguments_as_training(
    method: str, precision: str, residual_at: str, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(method=method, optimizer="sgd", residual_at=residual_at, precision=precision)
    torch.manual_seed(0)
    built = build_method(config, backend="cpu").train()
    step = Step(
        built, build_optimizer(built, config.optim, backend="cpu"), precision=precision, accumulate=2, clip_norm=None,
        layout=torch.channels_last,
    )  # fmt: skip
    if precision == "bf16":
        built.pair.keep_low_precision(torch.bfloat16)
    first, second = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with Given("cpu") as trained:
        step([Batch((first, second), [])] * 2, Rates(0.0, 0.5, 1.0), measure=False)
    with Given("cpu") as verified:
        found = step.verify((first, second))
    assert verified.calls == trained.calls[: len(verified.calls)]
    assert 2 * len(verified.calls) == len(trained.calls) > 0
    assert found["verify_loss"] < 1e-3
    assert found["verify_gradient"] < 1e-2


def test_verification_does_not_warn_of_a_batch_without_a_finite_loss(small: Small) -> None:
    step, _ = ready(small(), torch.device("cpu"))
    step.residual_weight.fill_(1.0)
    views = torch.randn(2, 8, 3, 32, 32) * math.nan
    assert verification_warning(step.verify((views[0], views[1]))) is None
    assert verification_warning({"verify_loss": math.inf, "verify_gradient": 0.0}) is not None


@pytest.mark.parametrize(("arch", "stem"), [("test_resnet", "imagenet"), ("test_vit", "auto")])
def test_recomputed_activations_take_less_memory_and_give_the_same_bits(arch: str, stem: str, small: Small) -> None:
    found = []
    for again in (False, True):
        config = small(method="mocov3", arch=arch, image_size=64, stem=stem, checkpoint_activations=again)
        torch.manual_seed(0)
        method = build_method(config, trained=True).train()
        kept: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in method.parameters()}

        def pack(value: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            if (place := value.untyped_storage().data_ptr()) not in own:
                kept[place] = value.untyped_storage().nbytes()
            return value

        images = torch.randn(2, 16, 3, 64, 64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            features = method.student.backbone(images[0])
        del features
        step = Step(
            method, build_optimizer(method, config.optim), precision="fp32", accumulate=1, clip_norm=1.0,
            layout=torch.channels_last,
        )  # fmt: skip
        for _ in range(2):
            step([Batch((images[0], images[1]), [])], Rates(0.1, 1.0, 0.9), measure=True)
        found.append((method.state_dict(), sum(kept.values())))
    (plain, whole), (recomputed, blocks) = found
    assert all(torch.equal(value, recomputed[name]) for name, value in plain.items())
    # The stem of a ResNet, which is most of so small a network, is not in a block.
    assert blocks < (0.8 if arch == "test_resnet" else 0.2) * whole


def test_recomputing_activations_is_refused_for_a_network_without_blocks(small: Small) -> None:
    with pytest.raises(UsageError, match="--checkpoint-activations: Sequential cannot recompute activations"):
        build_method(small(checkpoint_activations=True), trained=True, arch=nn.Sequential(nn.Conv2d(3, 8, 3, 2)))
