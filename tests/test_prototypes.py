"""The loss over prototypes of each backend, against float64 definitions, autograd, other libraries and training."""

from __future__ import annotations

import copy
import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrm.kernels import _prototypes, prototype_cross_entropy
from fastrm.kernels import _prototypes_blocked as blocked
from fastrm.kernels import _prototypes_swept as swept
from fastrm.kernels.dispatch import triton
from tests import oracle
from tests.interpreted import (
    BACKENDS,
    INTERPRETED,
    SLOW_TRITON,
    TRITON,
    Launches,
    device_of,
    often_and_slow,
    run_triton_cases,
    with_backends,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SELDOM = ["reference", "cpu", SLOW_TRITON]


class Case(NamedTuple):
    n: int
    m: int
    size: int
    dim: int
    pairs: int | None = None
    dtype: torch.dtype = F32
    temperatures: tuple[float, float] = (0.1, 0.04)
    center: float | None = 0.1
    apart: bool = True
    """Whether the teacher has its own prototypes."""

    @property
    def name(self) -> str:
        pairs = "" if self.pairs is None else f"-{self.pairs}pairs"
        return f"{self.n}x{self.m}x{self.size}x{self.dim}{pairs}-{str(self.dtype)[6:]}-center{self.center}"

    def arguments(self, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def rows(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).to(device, self.dtype)

        its = rows(self.size, self.dim)
        pairs = None
        if self.pairs is not None:
            both = [torch.randint(max(high, 1), (self.pairs,), generator=generator) for high in (self.n, self.m)]
            pairs = torch.stack(both, dim=1).to(device)
        return {
            "student": rows(self.n, self.dim).requires_grad_(),
            "teacher": 3 * rows(self.m, self.dim),
            "prototypes": F.normalize(rows(self.size, self.dim), dim=1).requires_grad_(),
            "center": None if self.center is None else self.center * rows(self.size),
            "student_temperature": self.temperatures[0],
            "teacher_temperature": self.temperatures[1],
            "pairs": pairs,
            "teacher_prototypes": F.normalize(its, dim=1) if self.apart else None,
        }


CASES = [
    Case(1, 1, 1, 1),
    Case(5, 5, 7, 16, center=None, apart=False),
    Case(20, 7, 33, 20, pairs=50),
    Case(3, 5, 130, 3, pairs=4, temperatures=(1.0, 0.5), center=3.0),  # some rows are in no pair
    Case(40, 40, 150, 40, center=50.0),
    Case(33, 9, 130, 72, pairs=70, dtype=BF16),
    Case(17, 17, 65, 24, dtype=F16, apart=False),
    Case(20, 4, 129, 33, pairs=40, dtype=F64, temperatures=(0.02, 0.01)),
    Case(2, 3, 40, 512, pairs=3, dtype=BF16),
    Case(2, 2, 30, 515),
]


def numpy(x: Tensor) -> oracle.Array:
    """A float64 NumPy copy of a tensor."""
    return x.detach().cpu().double().numpy().copy()


def defined(arguments: dict[str, Any]) -> oracle.Distilled:
    """The loss, gradients and mean logits of the oracle."""
    given = {name: numpy(x) for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    pairs = arguments["pairs"]
    return oracle.prototype_cross_entropy(
        given["student"],
        given["teacher"],
        given["prototypes"],
        given.get("teacher_prototypes", given["prototypes"]),
        given.get("center", np.zeros(len(given["prototypes"]))),
        [(i, i) for i in range(len(given["student"]))] if pairs is None else pairs.tolist(),
        tuple(float(arguments[f"{side}_temperature"]) for side in ("student", "teacher")),
    )


class Got(NamedTuple):
    loss: Tensor
    to_student: Tensor
    to_prototypes: Tensor
    teacher_mean: Tensor


def computed(arguments: dict[str, Any], backend: str | None, scale: float = 1) -> Got:
    """The loss, the gradients of ``scale * loss`` and the mean logits of a backend."""
    loss, mean = prototype_cross_entropy(**arguments, backend=backend)
    return Got(loss, *torch.autograd.grad(scale * loss, [arguments["student"], arguments["prototypes"]]), mean)


def tolerance(case: Case, backend: str) -> float:
    """Tolerance relative to the largest element: the rounding of cosine and centre, divided by the temperature."""
    if case.dtype == F64:
        return 1e-12
    if backend == "triton" and case.dtype in (BF16, F16):
        rounding = torch.finfo(case.dtype).eps * (2 if INTERPRETED else 1)  # the interpreter truncates bfloat16
        return rounding * (1 + 0.5 / min(case.temperatures))
    return 2e-6 + 1e-6 * (1 + (case.center or 0)) / min(case.temperatures)


def assert_close(got: Got, want: oracle.Distilled, relative: float) -> None:
    """Assert that all results equal those of the oracle within the tolerance."""
    for name, mine, right in zip(Got._fields, got, want, strict=True):
        rounding = torch.finfo(mine.dtype).eps if mine.dtype in (F16, BF16) else 0
        bound = relative * np.abs(right).max(initial=0) + rounding * np.abs(right) + 1e-7 * (mine.dtype != F64)
        assert (np.abs(numpy(mine) - right) <= bound).all(), (name, np.abs(numpy(mine) - right).max(), np.max(bound))


NAMED = {case.name: case for case in CASES}
OFTEN = {case.name for case in CASES if case.pairs == 50 or case.dtype in (BF16, F16)}


@pytest.mark.parametrize(("name", "backend"), [*with_backends(NAMED, OFTEN), *((name, "reference") for name in NAMED)])
def test_loss_and_gradients_equal_the_definition(name: str, backend: str) -> None:
    case = NAMED[name]
    arguments = case.arguments(device_of(backend))
    got, want = computed(arguments, backend, -3), defined(arguments)
    assert got.loss.dtype == got.teacher_mean.dtype == (F64 if case.dtype == F64 else F32)
    assert got.to_student.dtype == got.to_prototypes.dtype == case.dtype
    assert not got.teacher_mean.requires_grad
    slopes = {name: -3 * getattr(want, name) for name in ("to_student", "to_prototypes")}
    assert_close(got, want._replace(**slopes), tolerance(case, backend))
    with torch.no_grad():
        again = prototype_cross_entropy(**arguments, backend=backend)[0]
    assert not again.requires_grad
    torch.testing.assert_close(again, got.loss.detach(), rtol=1e-6, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 40), m=st.integers(0, 20), size=st.integers(0, 200), dim=st.integers(0, 40),
    pairs=st.none() | st.integers(0, 40), dtype=st.sampled_from([F32, F64, BF16, F16]),
    temperature=st.floats(0.02, 1), center=st.none() | st.floats(0, 3), apart=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_random_sizes_equal_the_definition(
    n: int, m: int, size: int, dim: int, pairs: int | None, dtype: torch.dtype, temperature: float,
    center: float | None, apart: bool, seed: int,
) -> None:  # fmt: skip
    count = None if pairs is None else pairs if n and m else 0
    case = Case(n, n if pairs is None else m, size, dim, count, dtype, (temperature, 0.05), center, apart)
    arguments = case.arguments(seed=seed)
    if n > 2 and dim:
        with torch.no_grad():
            arguments["student"][1] = 0
    columns, blocked.NARROWEST, blocked.ELEMENTS = (blocked.NARROWEST, blocked.ELEMENTS), 16, 1024
    try:
        got = computed(arguments, "cpu")
    finally:
        blocked.NARROWEST, blocked.ELEMENTS = columns
    if size and dim:
        assert_close(got, defined(arguments), tolerance(case, "cpu"))
    else:
        assert got.loss.item() == pytest.approx(np.log(size) if size and (n if count is None else count) else 0)
    assert all(torch.isfinite(x).all() for x in got)


def views_of(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """DINO's pairs int64 [P, 2]: each large view of the teacher with each other view of the student."""
    batch = torch.arange(len(student[0]))
    both = [(v, u) for u in range(len(teacher)) for v in range(len(student)) if u != v]
    rows = [torch.stack([v * len(batch) + batch, u * len(batch) + batch], dim=1) for v, u in both]
    return torch.cat(rows)


def plain_dino(
    student: list[Tensor], teacher: list[Tensor], center: Tensor, temperatures: tuple[float, float]
) -> Tensor:
    """The usual form of the loss, from the logits of each view."""
    targets = [F.softmax((x - center) / temperatures[1], dim=-1).detach() for x in teacher]
    logs = [F.log_softmax(x / temperatures[0], dim=-1) for x in student]
    terms = [-(q * p).sum(dim=-1).mean() for u, q in enumerate(targets) for v, p in enumerate(logs) if u != v]
    return sum(terms, torch.zeros(())) / len(terms)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_equals_the_usual_form_with_autograd(backend: str) -> None:
    arguments = Case(5 * 6, 2 * 6, 90, 24, dtype=F64).arguments(device_of(backend))
    student, teacher = arguments["student"].chunk(5), arguments["teacher"].chunk(2)
    logits = [F.normalize(x, dim=1) @ arguments["prototypes"].T for x in student]
    its = [F.normalize(x, dim=1) @ arguments["teacher_prototypes"].T for x in teacher]
    want = plain_dino(logits, its, arguments["center"], (0.1, 0.04))
    slopes = torch.autograd.grad(want, [arguments["student"], arguments["prototypes"]])
    arguments["pairs"] = views_of(list(student), list(teacher)).to(device_of(backend))
    got = computed(arguments, backend)
    for mine, right in zip(got, (want.detach(), *slopes, torch.cat(its).mean(dim=0)), strict=True):
        torch.testing.assert_close(mine.detach(), right, rtol=1e-10, atol=1e-12)


def test_loss_and_centre_equal_those_of_lightly() -> None:
    theirs = pytest.importorskip("lightly.loss").DINOLoss(output_dim=50, teacher_temp=0.07, center_momentum=0.8)
    arguments = Case(4 * 3, 2 * 3, 50, 8, center=None, dtype=F64).arguments()
    center = torch.zeros(50, dtype=F64)
    theirs.center = theirs.center.double()
    arguments["pairs"] = views_of(list(arguments["student"].chunk(4)), list(arguments["teacher"].chunk(2)))
    arguments["teacher_temperature"] = 0.07
    for _ in range(3):
        logits = F.normalize(arguments["student"], dim=1) @ arguments["prototypes"].T
        its = F.normalize(arguments["teacher"], dim=1) @ arguments["teacher_prototypes"].T
        want = theirs(list(its.chunk(2)), list(logits.chunk(4)))
        slopes = torch.autograd.grad(want, [arguments["student"], arguments["prototypes"]])
        got = computed({**arguments, "center": center}, "cpu")
        center = center.lerp(got.teacher_mean, 1 - 0.8)
        for mine, right in zip((*got[:3], center), (want.detach(), *slopes, theirs.center[0, 0]), strict=True):
            # lightly has temperatures in float32
            torch.testing.assert_close(mine.detach(), right, rtol=1e-5, atol=1e-8)


class Head(nn.Module):
    """A bottleneck and a weight-normed last layer with 64 prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16))
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(16, 64, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1).requires_grad_(False)


@pytest.mark.parametrize("backend", ["cpu"])
def test_fifty_steps_have_the_losses_of_the_usual_form(backend: str) -> None:
    def train(fused: bool) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        student = Head().double()
        teacher = copy.deepcopy(student).requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=3e-3)
        center, losses = torch.zeros(64, dtype=F64), []
        for step in range(50):
            images = torch.randn(8, 12, generator=generator, dtype=F64)
            views = [images + 0.3 * torch.randn(8, 12, generator=generator, dtype=F64) for _ in range(4)]
            temperature = 0.04 + 0.03 * step / 50
            rows, its = [student.layers(view) for view in views], [teacher.layers(view) for view in views[:2]]
            if fused:
                loss, mean = prototype_cross_entropy(
                    torch.cat(rows), torch.cat(its), student.last.weight, center, student_temperature=0.1,
                    teacher_temperature=torch.tensor(temperature, dtype=F64), pairs=views_of(rows, its),
                    teacher_prototypes=teacher.last.weight, backend=backend,
                )  # fmt: skip
                center.lerp_(mean, 0.1)  # before the backward pass, which must use the old centre
            else:
                logits, targets = ([head.last(F.normalize(x, dim=1)) for x in part] for head, part in
                                   ((student, rows), (teacher, its)))  # fmt: skip
                loss = plain_dino(logits, targets, center, (0.1, temperature))
                center = center.lerp(torch.cat(targets).mean(dim=0), 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                    mine.lerp_(other, 0.05)
            losses.append(loss.item())
        return losses

    fused, plain = train(True), train(False)
    np.testing.assert_allclose(fused, plain, rtol=1e-9)
    assert max(plain) > 1.2 * min(plain)  # a less sharp teacher raises the loss


@pytest.mark.parametrize("backend", SELDOM)
def test_a_sharp_teacher_and_a_large_centre(backend: str) -> None:
    """Logits are several thousands, and the teacher's probabilities are almost 0 and 1."""
    arguments = Case(6, 6, 40, 16, center=200.0).arguments(device_of(backend))
    with torch.no_grad():
        arguments["center"] -= 1000
    assert_close(computed(arguments, backend), defined(arguments), 1e-2)
    arguments |= {"center": None, "teacher_temperature": 1e-4, "student_temperature": 1e-3}
    assert_close(computed(arguments, backend), defined(arguments), 1e-2)


@pytest.mark.parametrize("backend", SELDOM)
def test_inputs_are_not_changed_and_backward_can_run_twice(backend: str) -> None:
    arguments = Case(9, 4, 50, 8, pairs=20).arguments(device_of(backend))
    before = {name: x.detach().clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    loss, mean = prototype_cross_entropy(**arguments, backend=backend)
    both = [arguments["student"], arguments["prototypes"]]
    first = [x.clone() for x in torch.autograd.grad(loss, both, retain_graph=True)]
    arguments["center"].lerp_(mean, 0.5)
    before["center"] = arguments["center"].clone()
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, both), strict=True))
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


@pytest.mark.parametrize("backend", SELDOM)
def test_a_teacher_under_inference_mode_gives_the_same_gradients(backend: str) -> None:
    arguments = Case(9, 4, 50, 8, pairs=20).arguments(device_of(backend))
    want = computed(arguments, backend)
    with torch.inference_mode():
        made = {name: arguments[name].clone() for name in ("teacher", "center", "pairs", "teacher_prototypes")}
    assert all(torch.equal(a, b) for a, b in zip(computed(arguments | made, backend), want, strict=True))


@pytest.mark.parametrize("backend", ["cpu", SLOW_TRITON])
def test_two_runs_give_the_same_bits(backend: str) -> None:
    arguments = Case(70, 20, 500, 32, pairs=200).arguments(device_of(backend))
    found = [computed(arguments, backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", SELDOM)
def test_pairs_in_any_order_and_more_than_once(backend: str) -> None:
    arguments = Case(9, 4, 50, 8, pairs=20).arguments(device_of(backend))
    want = computed(arguments, backend)
    pairs = arguments["pairs"].flip(0)
    arguments["pairs"] = torch.cat([pairs, pairs])
    for mine, right in zip(computed(arguments, backend), want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", SELDOM)
def test_gradients_are_computed_only_for_inputs_that_need_them(backend: str) -> None:
    arguments = Case(9, 9, 50, 8).arguments(device_of(backend))
    want = computed(arguments, backend)
    for name, gradient in (("student", want.to_student), ("prototypes", want.to_prototypes)):
        other = {"student": "prototypes", "prototypes": "student"}[name]
        loss, _ = prototype_cross_entropy(**{**arguments, other: arguments[other].detach()}, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(loss, arguments[name])[0], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", SELDOM)
def test_autocast_and_strides_do_not_change_the_loss(backend: str) -> None:
    arguments = Case(6, 6, 60, 64).arguments(device_of(backend))
    want = computed(arguments, backend)
    strided = {
        name: torch.stack([x.detach(), x.detach()], dim=-1)[..., 0].requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }  # fmt: skip
    with torch.autocast(device_of(backend).type, BF16):
        loss, mean = prototype_cross_entropy(**strided, backend=backend)
    slopes = torch.autograd.grad(loss, [strided["student"], strided["prototypes"]])
    for mine, right in zip((loss, *slopes, mean), want, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [TRITON])
def test_two_launches_per_side_forward_and_one_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[str] = []
    for name in ("sweep_kernel", "gather_kernel", "push_prototypes_kernel"):
        monkeypatch.setattr(swept, name, Launches(getattr(swept, name), counts, name))
    arguments = Case(9, 5, 30, 16, pairs=20).arguments(device_of(backend))
    frozen = {**arguments, "prototypes": arguments["prototypes"].detach()}
    for these, back in ((frozen, []), (arguments, ["push_prototypes_kernel"])):
        counts.clear()
        loss, _ = prototype_cross_entropy(**these, backend=backend)
        assert counts == ["sweep_kernel", "gather_kernel"] * 2
        loss.backward()
        assert counts[4:] == back


def compiled_as_eager(compiler: Any, backend: str) -> None:
    arguments = Case(12, 5, 70, 16, pairs=20).arguments(device_of(backend))
    torch._dynamo.reset()

    def step(temperature: float | Tensor) -> tuple[Tensor, Tensor]:
        return prototype_cross_entropy(**{**arguments, "teacher_temperature": temperature}, backend=backend)

    fast = torch.compile(step, backend=compiler, fullgraph=True)
    for temperature in (torch.tensor(0.04), 0.06):
        found = []
        for call in (step, fast):
            loss, mean = call(temperature)
            found.append((loss, mean, *torch.autograd.grad(2 * loss, [arguments["student"], arguments["prototypes"]])))
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", SLOW_TRITON, pytest.param("reference", marks=pytest.mark.slow)])
def test_it_compiles_without_graph_breaks(backend: str) -> None:
    compiled_as_eager("aot_eager", backend)


@pytest.mark.slow
def test_it_compiles_with_inductor() -> None:
    compiled_as_eager("inductor", "cpu")


def test_a_temperature_that_warms_up_does_not_recompile() -> None:
    arguments = Case(6, 6, 20, 16).arguments()
    count = importlib.import_module("torch._dynamo.testing").CompileCounter()

    def call(temperature: Tensor) -> Tensor:
        return prototype_cross_entropy(**{**arguments, "teacher_temperature": temperature}, backend="cpu")[0]

    fast = torch.compile(call, backend=count, fullgraph=True)
    for t in (0.04, 0.05, 0.06):
        assert fast(torch.tensor(t)).item() == pytest.approx(call(torch.tensor(t)).item(), rel=1e-6)
    assert count.frame_count == 1


@pytest.mark.parametrize("backend", ["cpu", SLOW_TRITON])
def test_the_operators_pass_opcheck(backend: str) -> None:
    arguments = Case(4, 3, 20, 16, pairs=7).arguments(device_of(backend))
    rows = [arguments[name] for name in
            ("student", "teacher", "prototypes", "teacher_prototypes", "center", "pairs")]  # fmt: skip
    flat = (*[x.detach() for x in rows], [0.1, 0.0], [None, torch.tensor(0.04)])
    torch.library.opcheck(_prototypes._loss_operator, (*flat, True, backend))
    found = _prototypes._loss_operator(*flat, True, backend)[2:]
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(_prototypes._gradients_operator, (*flat, found, torch.ones(()), *wanted, backend))


def test_transforms_get_the_reference_and_second_derivatives_an_error() -> None:
    arguments = Case(5, 5, 20, 8, dtype=F64).arguments()
    want = computed(arguments, "reference")

    def loss(student: Tensor, backend: str | None = None) -> Tensor:
        return prototype_cross_entropy(**{**arguments, "student": student}, backend=backend)[0]

    torch.testing.assert_close(torch.func.grad(loss)(arguments["student"].detach()), want.to_student)
    with pytest.raises(ValueError, match="backend='cpu' has no rule"):
        torch.func.grad(loss)(arguments["student"].detach(), "cpu")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(arguments["student"], "cpu"), arguments["student"], create_graph=True)


class Blocks(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest number of elements of a created tensor, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return out


def test_the_largest_tensor_of_the_cpu_path_does_not_grow_with_the_prototypes() -> None:
    found = []
    for size in (8192, 65536):
        arguments = Case(100, 40, size, 4, pairs=150).arguments()
        rows = {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        assignment = blocked.Assignment(**rows)
        with Blocks() as blocks:
            forward = blocked.blocked_loss(assignment, True)
            blocked.blocked_gradients(assignment, forward, torch.ones(()), True, True)
        pieces = -(-size // (blocked.ELEMENTS // 100))
        assert blocks.products == 6 * pieces
        found.append(blocks.largest)
    assert found[0] <= found[1] <= max(blocked.ELEMENTS, 4 * 65536)


S, W = torch.ones(4, 3), torch.ones(5, 3)
PAIRS = torch.tensor([[0, 1], [3, 2]])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "student": ({"student": S[0]}, r"student has shape \(3,\); it must be \[rows, D\]"),
    "student dtype": ({"student": S.int()}, "student is torch.int32"),
    "teacher dims": ({"teacher": S[:, :2]}, r"teacher has shape \(4, 2\); it must be \[rows, 3\]"),
    "teacher grad": ({"teacher": S.clone().requires_grad_()}, "teacher requires grad"),
    "teacher device": ({"teacher": S.to("meta")}, "teacher is on meta"),
    "teacher rows": ({"teacher": S[:2]}, "student has 4 rows and teacher 2"),
    "prototypes": ({"prototypes": W[:, :2]}, r"prototypes has shape \(5, 2\); it must be \[rows, 3\]"),
    "its prototypes": ({"teacher_prototypes": W[:2]}, r"teacher_prototypes has shape \(2, 3\); it must be \(5, 3\)"),
    "its prototypes grad": ({"teacher_prototypes": W.clone().requires_grad_()}, "teacher_prototypes requires grad"),
    "center": ({"center": torch.ones(1, 5)}, r"center has shape \(1, 5\); it must be \[5\]"),
    "center dtype": ({"center": torch.ones(5).int()}, "center is torch.int32"),
    "center device": ({"center": torch.ones(5, device="meta")}, "center is on meta"),
    "center grad": ({"center": torch.ones(5, requires_grad=True)}, "center requires grad"),
    "center kind": ({"center": 0.5}, "center is a float"),
    "pairs dtype": ({"pairs": PAIRS.int()}, "pairs is torch.int32; it must be int64"),
    "pairs shape": ({"pairs": PAIRS[0]}, r"pairs has shape \(2,\); it must be \[P, 2\]"),
    "pairs device": ({"pairs": PAIRS.to("meta")}, "pairs is on meta"),
    "pairs values": ({"pairs": PAIRS + 1}, "rows 1 to 4 of student and 2 to 3 of teacher, which have 4 and 4 rows"),
    "pairs below": ({"pairs": PAIRS - 1}, "rows -1 to 2 of student"),
    "student temperature": ({"student_temperature": 0}, "student_temperature=0 must be finite, above 0"),
    "teacher temperature": ({"teacher_temperature": float("nan")}, "teacher_temperature=nan"),
    "temperature shape": ({"teacher_temperature": torch.ones(1)}, r"teacher_temperature has shape \(1,\)"),
    "backend": ({"backend": "cuda"}, "backend='cuda' is unknown"),
    "no gpu": ({"backend": "triton"}, "backend='triton'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(name: str) -> None:
    change, message = WRONG[name]
    right = {"student": S, "teacher": S, "prototypes": W, "center": None,
             "student_temperature": 0.1, "teacher_temperature": 0.04}  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=f"prototype_cross_entropy: .*{message}"):
        prototype_cross_entropy(**{**right, **change})


@pytest.mark.skipif(triton is None, reason="needs Triton")
@often_and_slow
def test_triton_cases_in_the_interpreter(cases: str) -> None:
    run_triton_cases(__file__, cases)
