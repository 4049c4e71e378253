"""fused_ema_ and EMA against a float64 definition: dtypes, layouts, modules, prepared lists, compilation and errors."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastrm.kernels import EMA, _ema_kernel, _seen, ema, ema_avg_fn, fused_ema_, multi_tensor, pairing
from tests.interpreted import BACKENDS, INTERPRETED, SLOW_TRITON, TRITON, device_of, often_and_slow, run_triton_cases

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MANY = 6_149 if INTERPRETED else 70_001  # several blocks of 2048, and a part of one
SIZES: list[tuple[int, ...]] = [(0,), (1,), (7,), (1023,), (1024,), (4097,), (MANY,), ()]
MOMENTA = [0.0, 0.5, 0.996, 0.99999, 1.0]

Array = NDArray[np.float64]


def numpy(tensor: Tensor) -> Array:
    """A float64 NumPy copy of a tensor."""
    return tensor.detach().cpu().double().numpy().copy()


def definition(teacher: Array, student: Array, momentum: float) -> Array:
    return momentum * teacher + (1 - momentum) * student


def assert_close(got: Tensor, teacher: Array, student: Array, momentum: float) -> None:
    """Assert that a tensor is the moving average, within the rounding of its dtype and of float32."""
    spacing = torch.finfo(got.dtype).eps
    if got.dtype in (BF16, F16):
        spacing *= 2 if INTERPRETED else 1  # the interpreter truncates bfloat16 instead of rounding it
        spacing /= 2
    want = definition(teacher, student, momentum)
    slack = 0 if got.dtype == F64 else 2 * torch.finfo(F32).eps
    bound = spacing * np.abs(want) + (slack + 2 * torch.finfo(F64).eps) * (np.abs(teacher) + np.abs(student)) + 6e-8
    assert (np.abs(numpy(got) - want) <= bound).all()


def tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """Normally distributed tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def check(
    teacher: list[Tensor], student: list[Tensor], momentum: float, backend: str, shadow: list[Tensor] | None = None
) -> None:
    """Update the teacher, and assert that teacher and shadow are right and that the student did not change."""
    old, source = [numpy(t) for t in teacher], [numpy(s) for s in student]
    fused_ema_(teacher, student, momentum, shadow=shadow, backend=backend)
    for i, t in enumerate(teacher):
        assert_close(t, old[i], source[i], momentum)
        np.testing.assert_array_equal(numpy(student[i]), source[i])
        if shadow is not None:
            assert_close(shadow[i], old[i], source[i], momentum)


@often_and_slow
def test_triton_cases_in_the_interpreter(cases: str) -> None:
    run_triton_cases(__file__, cases)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("teacher", "student", "shadow"),
    [(F32, F32, None), (F32, BF16, BF16), (F32, F16, None), (BF16, BF16, None), (F16, F16, F32), (BF16, F32, F16),
     (F64, F64, None), (F64, F32, F32), (F32, F64, None)],
)  # fmt: skip
def test_teacher_and_shadow_equal_the_definition(
    teacher: torch.dtype, student: torch.dtype, shadow: torch.dtype | None, backend: str
) -> None:
    device = device_of(backend)
    for seed, momentum in enumerate(MOMENTA[::2] if INTERPRETED else MOMENTA):
        t, s = tensors(SIZES, teacher, device, seed), tensors(SIZES, student, device, seed + 10)
        check(t, s, momentum, backend, None if shadow is None else [x.to(shadow) for x in t])


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_as_a_tensor_is_read_at_each_call(backend: str) -> None:
    device = device_of(backend)
    for dtype in (F32, F64):
        t, s = tensors(SIZES, dtype, device, 0), tensors(SIZES, dtype, device, 1)
        momentum = torch.tensor(0.5, dtype=dtype, device=device)
        prepared = EMA(t, s, backend=backend)
        for value in (0.25, 0.875):
            momentum.fill_(value)
            old = [numpy(x) for x in t]
            prepared.update_(momentum)
            for i, x in enumerate(t):
                assert_close(x, old[i], numpy(s[i]), value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_is_not_rounded_to_the_dtype_of_the_tensors(backend: str) -> None:
    """0.999 in bfloat16 is 1, which would leave this teacher unchanged."""
    teacher, student = torch.zeros(9, dtype=BF16, device=device_of(backend)), torch.full((9,), 1000.0, dtype=BF16)
    fused_ema_([teacher], [student.to(teacher.device)], 0.999, backend=backend)
    np.testing.assert_allclose(numpy(teacher), 1.0, rtol=2**-7)


def inside(view: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """A view of a larger block, the block, and the indices of the view's elements in it."""
    block = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device, dtype)
    mine = view(torch.arange(size)).reshape(-1)
    return view(block), block, mine


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x[64 : 64 + 4800].view(4, 8, 10, 15),
    "channels last": lambda x: x[64 : 64 + 4800].view(4, 10, 15, 8).permute(0, 3, 1, 2),
    "transposed": lambda x: x[64 : 64 + 4800].view(15, 10, 8, 4).permute(3, 2, 1, 0),
    "strided": lambda x: x[:9600].view(4, 8, 10, 30)[..., ::2],
    "part of rows": lambda x: x[:12000].view(4, 8, 15, 25)[:, :, :10, 5:20],
    "misaligned": lambda x: x[3 : 3 + 4800].view(4, 8, 10, 15),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("student_view", [*VIEWS, "expanded"])
@pytest.mark.parametrize("teacher_view", VIEWS)
def test_views_of_any_layout_are_updated_and_nothing_else(teacher_view: str, student_view: str, backend: str) -> None:
    device = device_of(backend)
    teacher, block, mine = inside(VIEWS[teacher_view], 20_000, F32, device)
    if student_view == "expanded":
        student = torch.randn(4, 8, 10, 1, device=device).expand(4, 8, 10, 15)
    else:
        student = inside(VIEWS[student_view], 20_001, BF16, device)[0]
    outside = torch.ones(20_000, dtype=torch.bool)
    outside[mine] = False
    before = block.cpu()[outside]
    shadow, shadow_block, _ = inside(VIEWS[teacher_view], 20_000, F16, device)
    shadow_before = shadow_block.cpu()[outside]
    check([teacher], [student], 0.75, backend, [shadow])
    assert torch.equal(block.cpu()[outside], before)
    assert torch.equal(shadow_block.cpu()[outside], shadow_before)


@pytest.mark.parametrize("backend", ["reference", "cpu", SLOW_TRITON])
def test_300_tensors_of_several_dtypes_are_updated(backend: str) -> None:
    device = device_of(backend)
    shapes = [(1 + 37 * i % 91, 1 + i % 5) for i in range(300)]
    t, s = tensors(shapes, F32, device, 0), tensors(shapes, F32, device, 1)
    s = [x.bfloat16() if i % 3 == 0 else x for i, x in enumerate(s)]
    t = [x.double() if i % 7 == 0 else x for i, x in enumerate(t)]
    check(t, s, 0.9, backend)
    check(t, s, 0.9, backend)  # uses the tables of the first call


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_tensors_are_updated_once(backend: str) -> None:
    device = device_of(backend)
    teacher, student = torch.zeros(5, device=device), torch.ones(5, device=device)
    fused_ema_([teacher, teacher], [student, student], 0.5, backend=backend)
    assert (teacher == 0.5).all()
    tied, other = (nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}).to(device) for _ in range(2))
    tied["b"].weight, other["b"].weight = tied["a"].weight, other["a"].weight
    old, source = numpy(tied["a"].weight), numpy(other["a"].weight)
    # state_dict() creates a new tensor for each name.
    fused_ema_(tied.state_dict().values(), other.state_dict().values(), 0.5, backend=backend)
    assert_close(tied["b"].weight, old, source, 0.5)
    with pytest.raises(ValueError, match="two students"):
        fused_ema_([teacher, teacher], [student, student + 1], 0.5, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefixes_of_wrapped_modules_are_ignored(backend: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module, name: str) -> None:
            super().__init__()
            self.add_module(name, module)

    device = device_of(backend)
    teacher = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(device)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    want = [
        definition(numpy(t), numpy(s), 0.5) for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]
    fused_ema_(teacher, Wrapped(Wrapped(student, "_orig_mod"), "module"), 0.5, backend=backend)
    for t, expected in zip(teacher.parameters(), want, strict=True):
        np.testing.assert_allclose(numpy(t), expected, rtol=1e-6)
    assert (teacher[1].running_mean == 0).all()
    with pytest.raises(ValueError, match=r"without a partner.*0\.bias"):
        fused_ema_(teacher, nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)).to(device), 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_tensors_are_copied(backend: str) -> None:
    device = device_of(backend)
    values = [torch.tensor(7), torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([True, False])]
    student = [x.to(device) for x in values] + [torch.ones(3, device=device)]
    teacher, shadow = [torch.zeros_like(x) for x in student], [torch.zeros_like(x) for x in student]
    fused_ema_(teacher, student, 0.75, shadow=shadow, backend=backend)
    for t, h, s in zip(teacher[:3], shadow[:3], student[:3], strict=True):
        assert torch.equal(t, s)
        assert torch.equal(h, s)
    assert (teacher[3] == 0.25).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_lists_and_tensors_are_allowed(backend: str) -> None:
    fused_ema_([], [], 0.5, backend=None if backend == "triton" else backend)
    empty = torch.empty(3, 0, device=device_of(backend))
    fused_ema_([empty], [empty.clone()], 0.5, shadow=[empty.half()], backend=backend)
    EMA([empty], [empty.clone()], backend=backend).update_(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_the_argument_and_nothing_is_written(backend: str) -> None:
    device = device_of(backend)
    good, other = torch.zeros(3, device=device), torch.ones(3, device=device)
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        ([good, good.clone()], [other], None, ValueError, "1 student tensors for 2 teacher"),
        ([good], [torch.ones(4, device=device)], None, ValueError, r"student\[0\] has shape \(4,\)"),
        ([good, good.long()], [other, other], None, TypeError, r"teacher\[1\] is torch.int64"),
        (
            [good, torch.zeros(1, device=device).expand(3)],
            [other, other],
            None,
            ValueError,
            r"teacher\[1\] is expanded",
        ),
        ([good], [other], [torch.zeros(2, device=device)], ValueError, r"shadow\[0\] has shape \(2,\)"),
        ([good, 3.0], [other, other], None, TypeError, r"teacher\[1\] is a float"),
        (good, other, None, TypeError, "teacher is a Tensor"),
    ]
    for teacher, student, shadow, error, message in cases:
        with pytest.raises(error, match=message):
            fused_ema_(teacher, student, 0.5, shadow=shadow, backend=backend)
    for momentum, error in ((1.5, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("x", TypeError)):
        with pytest.raises(error, match="momentum"):
            fused_ema_([good], [other], momentum, backend=backend)  # type: ignore[arg-type]
    assert (good == 0).all()


def test_a_generator_that_is_used_up_is_refused() -> None:
    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    ours, theirs = teacher.parameters(), student.parameters()
    fused_ema_(ours, theirs, 0.5)
    before = numpy(teacher.weight)
    with pytest.raises(ValueError, match="teacher is a generator that is used up"):
        fused_ema_(ours, theirs, 0.5)
    with pytest.raises(ValueError, match="student is a generator that is used up"):
        EMA(teacher.parameters(), theirs)
    np.testing.assert_array_equal(numpy(teacher.weight), before)
    fused_ema_((p for p in teacher.parameters() if p.ndim > 2), (p for p in student.parameters() if p.ndim > 2), 0.5)


def test_lazy_layers_are_refused_until_they_have_a_shape() -> None:
    student = nn.LazyLinear(2)
    teacher = copy.deepcopy(student)
    with pytest.raises(ValueError, match=r"teacher\[0\] belongs to a lazy layer"):
        fused_ema_(teacher, student, 0.5)
    student(torch.ones(1, 3))
    teacher(torch.ones(1, 3))
    fused_ema_(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_may_be_a_number_of_numpy(backend: str, kind: Any) -> None:
    """As from a schedule in an array; the rest to 1 is not rounded to the dtype of the array."""
    device = device_of(backend)
    teacher, momentum = [torch.zeros(3, dtype=F64, device=device)], kind(0.996)
    fused_ema_(teacher, [torch.ones(3, device=device)], momentum, backend=backend)
    np.testing.assert_allclose(numpy(teacher[0]), 1 - float(momentum), rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_are_replaced_in_a_module_are_followed(backend: str) -> None:
    device = device_of(backend)
    student = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).to(device)
    teacher = copy.deepcopy(student)
    prepared = EMA(teacher, student, backend=backend)
    prepared.update_(0.5)

    def assign(network: nn.Sequential) -> None:
        network.load_state_dict({name: x.clone() for name, x in network.state_dict().items()}, assign=True)

    def replace(network: nn.Sequential) -> None:
        network[2] = nn.Linear(2, 2).to(device)

    for change in (assign, replace):
        for network, value in ((student, 3.0), (teacher, 1.0)):
            change(network)
            with torch.no_grad():
                for p in network.parameters():
                    p.fill_(value)
        for at, kept in enumerate((prepared, copy.deepcopy(prepared))):
            kept.update_(0.5)
            assert all((numpy(p) == 2).all() for p in teacher.parameters()), at
    student[0] = nn.Linear(3, 2, bias=False).to(device)
    with pytest.raises(ValueError, match=r"parameters without a partner: .*0.bias"):
        prepared.update_(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_with_a_new_address_is_updated(backend: str) -> None:
    device = device_of(backend)
    t, s = tensors([(6, 4), (9,)], F32, device, 0), tensors([(6, 4), (9,)], F32, device, 1)
    prepared = EMA(t, s, backend=backend)
    prepared.update_(0.5)
    check(t, s, 0.5, backend)
    kept = t[0].data
    t[0].data = kept.clone()  # the same values at another address
    before = kept.clone()
    check(t, s, 0.5, backend)
    want = definition(numpy(t[0]), numpy(s[0]), 0.5)
    prepared.update_(0.5)
    np.testing.assert_allclose(numpy(t[0]), want, rtol=1e-6, atol=1e-7)
    assert torch.equal(kept, before)
    s[0].data = s[0].data.view(4, 6).t()  # the same memory with other strides
    check(t, s, 0.5, backend)


@pytest.mark.parametrize("guards", ["torch.compile's guards", "none"])
def test_checks_are_repeated_only_for_lists_that_changed(guards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if guards == "none":
        monkeypatch.setattr(_seen, "_GUARDS", None)
    shapes = [(6, 4), (9,), (4, 4)]
    t, s = tensors(shapes, F32, torch.device("cpu"), 0), tensors(shapes, F32, torch.device("cpu"), 1)
    planned: list[None] = []
    check_pairs = pairing.check
    monkeypatch.setattr(pairing, "check", lambda *lists: planned.append(None) or check_pairs(*lists))

    def plans(teacher: list[Tensor], student: list[Tensor]) -> int:
        planned.clear()
        check(teacher, student, 0.5, "cpu")
        return len(planned)

    assert [plans(t, s), plans(t, s), plans([*t], [*s])] == [1, 0, 0]
    other = [*s[:2], s[2].clone()]
    assert [plans(t, other), plans(t, other)] == [1, 0]
    assert [plans([*t, t[0]], [*s, s[0]]), plans([*t, t[0]], [*s, s[0]])] == [1, 0]  # tied
    assert plans(t, other) == 0
    t[0].requires_grad_()
    assert plans(t, other) == 0
    for change in (
        lambda x: x.view(4, 6).t(),  # other strides at one address
        lambda x: x.as_strided((6, 3), (4, 1)),  # another size and other strides
        lambda x: x.clone(),
    ):
        for lists in (t, other):
            lists[0].data = change(lists[0].data)
        assert [plans(t, other), plans(t, other)] == [1, 0]
    with pytest.raises(TypeError, match=r"student\[2\] is a int"):
        fused_ema_(t, [*other[:2], 1], 0.5)  # type: ignore[list-item]


def test_modules_that_changed_are_matched_again() -> None:
    class Named(nn.Linear):
        def named_parameters(self, *args: Any, **options: Any) -> Any:
            return iter([("weight", self.weight)])

    def twins() -> tuple[nn.Sequential, nn.Sequential]:
        teacher = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)))
        return teacher, copy.deepcopy(teacher)

    def check_modules(teacher: nn.Module, student: nn.Module) -> None:
        with torch.no_grad():
            for p in student.parameters():
                p.normal_()
        named = dict(student.named_parameters())
        want = {name: definition(numpy(p), numpy(named[name]), 0.25) for name, p in teacher.named_parameters()}
        fused_ema_(teacher, student, 0.25)
        for name, p in teacher.named_parameters():
            np.testing.assert_allclose(numpy(p), want[name], rtol=1e-6, atol=1e-6)

    teacher, student = twins()
    for _ in range(2):
        check_modules(teacher, student)
    student[0].weight = nn.Parameter(torch.ones(3, 3))  # a new parameter of the same name
    check_modules(teacher, student)
    student[0], student[2][1] = student[2][1], student[0]  # the same parameters with other names
    check_modules(teacher, student)
    for each in (teacher, student):
        each[2].add_module("late", nn.Linear(2, 2))
    check_modules(teacher, student)
    for each in (teacher, student):
        each[2][1].weight = each[0].weight  # tied
    check_modules(teacher, student)
    student[0].register_parameter("more", nn.Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match="without a partner"):
        fused_ema_(teacher, student, 0.25)
    teacher, student = twins()
    for _ in range(2):
        check_modules(torch.jit.script(teacher), torch.jit.script(student))
        student[2] = torch.jit.script(student[2])
        check_modules(teacher, student)
    own, its = Named(3, 3), Named(3, 3)
    bias = numpy(own.bias)
    for _ in range(2):
        check_modules(own, its)
    np.testing.assert_array_equal(numpy(own.bias), bias)
    gc.collect()
    count = len(pairing._MATCHES)
    check_modules(*twins())
    gc.collect()
    assert len(pairing._MATCHES) == count


def test_plans_hold_no_tensors_and_the_oldest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = _seen.Seen()
    monkeypatch.setattr(ema, "_PLANS", plans)
    monkeypatch.setattr(_seen, "TENSORS", 8)
    lists = [([torch.zeros(3)], [torch.ones(3)]) for _ in range(5)]
    for t, s in lists:
        fused_ema_(t, s, 0.5)
    assert [plans.find(None, (*both, None)) is None for both in lists] == [True] + [False] * 4
    last = weakref.ref(lists[-1][0][0])
    del lists, t, s
    gc.collect()
    assert last() is None
    fused_ema_([torch.zeros(3)] * 9, [torch.ones(3)] * 9, 0.5)  # more than are remembered at a time


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_is_moved_by_exchanging_its_tensors(backend: str) -> None:
    """torch refuses this for a tensor with a weak reference; it does it by itself for DTensors and torchao's."""
    torch.manual_seed(0)
    student = nn.Linear(3, 4)
    teacher = copy.deepcopy(student)
    prepared = EMA(teacher, student, backend=backend)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (F32, F64, F32):
            teacher.to(dtype), student.to(dtype)
            for update_ in (lambda m: fused_ema_(teacher, student, m, backend=backend), prepared.update_):
                with torch.no_grad():
                    student.weight.normal_()
                want = definition(numpy(teacher.weight), numpy(student.weight), 0.25)
                update_(0.25)
                np.testing.assert_allclose(numpy(teacher.weight), want, rtol=1e-6, atol=1e-6)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_of_inference_mode_is_written_only_there(backend: str, prepared: bool) -> None:
    device = device_of(backend)
    sizes = (3, 40_000)
    student = [torch.ones(size, device=device) for size in sizes]
    with torch.inference_mode():
        teacher = [torch.zeros(size, device=device) for size in sizes]
        update_ = EMA(teacher, student, backend=backend).update_
        if not prepared:
            update_ = partial(fused_ema_, teacher, student, backend=backend)
        update_(0.5)
    mixed = [torch.zeros(3, device=device), teacher[1]]
    for written in (update_, partial(fused_ema_, mixed, student, backend=backend)):
        with pytest.raises(ValueError, match=r"fused_ema_: teacher\[\d\] was made in torch.inference_mode"):
            written(0.5)
    assert [float(numpy(t).mean()) for t in (*mixed, *teacher)] == [0, 0.5, 0.5, 0.5]
    with torch.inference_mode():
        update_(0.0)
    assert all((numpy(t) == 1).all() for t in teacher)


@pytest.mark.parametrize("momentum", [0.2, 0.75])
@pytest.mark.parametrize("student_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_large_tensors_of_different_layouts(
    dtype: torch.dtype, student_layout: torch.memory_format, momentum: float
) -> None:
    """On the CPU, large tensors of one dtype take another path if their layouts agree."""
    teacher = torch.randn(8, 64, 10, 10, dtype=dtype).to(memory_format=torch.channels_last)
    student = torch.randn(8, 64, 10, 10, dtype=dtype).to(memory_format=student_layout)
    assert teacher.numel() > ema.LARGE
    check([teacher], [student], momentum, "cpu", [teacher.half()])


@pytest.mark.parametrize("size", [3, 70_001])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_that_the_teacher_changed(backend: str, size: int) -> None:
    device = device_of(backend)
    x, teacher = torch.ones(size, device=device, requires_grad=True), torch.ones(size, device=device)
    product = (x * teacher).sum()
    fused_ema_([teacher], [torch.zeros(size, device=device)], 0.5, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    parameter = nn.Parameter(torch.ones(3, device=device))
    fused_ema_([parameter], [torch.zeros(3, device=device)], 0.5, backend=backend)
    assert parameter.requires_grad
    assert parameter.grad_fn is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_lists_equal_the_definition(backend: str) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    device = device_of(backend)
    dtypes = st.sampled_from([F16, BF16, F32, F64])
    shape = st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 64]), max_size=3).map(tuple)
    # Each pair: shape, dtypes of teacher and student, whether each is transposed, and elements to skip before each.
    pair = st.tuples(shape, dtypes, dtypes, st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3))

    def make(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, skip: int, seed: int) -> Tensor:
        order = tuple(reversed(shape)) if transposed else shape
        block = torch.randn(skip + int(np.prod(order, dtype=int)), generator=torch.Generator().manual_seed(seed))
        view = block.to(device, dtype)[skip:].view(order)
        return view.permute(tuple(reversed(range(len(order))))) if transposed else view

    @hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.lists(pair, max_size=6), st.sampled_from(MOMENTA), st.integers(0, 1000))
    def holds(pairs: list[tuple[Any, ...]], momentum: float, seed: int) -> None:
        teacher = [make(n, dt, flip, skip, seed) for n, dt, _, flip, _, skip, _ in pairs]
        student = [make(n, dt, flip, skip, seed + 1) for n, _, dt, _, flip, _, skip in pairs]
        check(teacher, student, momentum, backend if pairs or backend != "triton" else "reference")

    holds()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiled_without_graph_breaks_or_recompilation_for_another_momentum(backend: str) -> None:
    counter = importlib.import_module("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    t, s = tensors([(5, 3), (7,)], F32, torch.device("cpu"), 0), tensors([(5, 3), (7,)], F32, torch.device("cpu"), 1)
    plain = [x.clone() for x in t]
    prepared = EMA(t, s, backend=backend)

    def step(momentum: float | Tensor) -> Tensor:
        fused_ema_([*t, t[0]], [*s, s[0]], momentum, backend=backend)  # the last pair repeats the first
        prepared.update_(momentum)
        return t[0].sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for momentum in (0.9, 0.99, 0.5, 0.75, 0.25, torch.tensor(0.125), torch.tensor(0.5)):
        total = compiled(momentum)
        for _ in range(2):
            fused_ema_(plain, s, momentum, backend=backend)
        for x, want in zip(t, plain, strict=True):
            torch.testing.assert_close(x, want)
        torch.testing.assert_close(total, plain[0].sum())
    assert counter.frame_count <= 3  # once for the first number, for any number, and for any tensor
    with pytest.raises(ValueError, match="momentum=2"):
        compiled(2.0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_with_modules_and_shadow(backend: str) -> None:
    teacher, student = nn.Linear(4, 4), nn.Linear(4, 4)
    shadow = [p.detach().bfloat16() for p in teacher.parameters()]
    want = [
        definition(numpy(t), numpy(s), 0.5) for t, s in zip(teacher.parameters(), student.parameters(), strict=True)
    ]

    @torch.compile(fullgraph=True, backend=backend)
    def step(x: Tensor) -> Tensor:
        fused_ema_(teacher, student, 0.5, shadow=shadow)
        return teacher(x)

    x = torch.randn(2, 4)
    torch.testing.assert_close(step(x), teacher(x))
    for t, h, expected in zip(teacher.parameters(), shadow, want, strict=True):
        np.testing.assert_allclose(numpy(t), expected, rtol=1e-6)
        np.testing.assert_allclose(numpy(h), expected, rtol=2**-8)


@pytest.mark.parametrize("backend", [TRITON])
def test_more_than_2_31_elements(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offsets have 64 bits. Without a GPU the memory is only reserved, and only the last chunks run."""
    device, size = device_of(backend), 2**31 + 5000
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    try:
        teacher, student = (torch.empty(size, dtype=F16, device=device) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"cannot reserve the memory: {error}")
    if INTERPRETED:
        cut = multi_tensor.cut
        monkeypatch.setattr(_ema_kernel, "cut", lambda *sizes: [column[-3:] for column in cut(*sizes)])
    teacher[-5000:], student[-5000:] = 0, 1
    teacher[:5000] = 3
    fused_ema_([teacher], [student], 0.5, backend=backend)
    assert (teacher[-4000:] == 0.5).all()
    assert INTERPRETED is bool((teacher[:5000] == 3).all())


def test_the_launch_is_on_the_tensors_device() -> None:
    context = multi_tensor.guard(torch.device("cuda", 1))
    assert isinstance(context, torch.cuda.device)
    assert context.idx == 1


@pytest.mark.gpu
def test_triton_compiles_once_for_all_momenta() -> None:
    t, s = [torch.zeros(5000, device="cuda")], [torch.ones(5000, device="cuda")]
    fused_ema_(t, s, 0.5)

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _ema_kernel._ema_kernel.device_caches.values())

    count = compiled()
    for momentum in (0.0, 1.0, 0.996, 0.25):
        fused_ema_(t, s, momentum)
    assert compiled() == count


@pytest.mark.gpu
def test_it_runs_in_a_cuda_graph_and_without_synchronisation() -> None:
    t, s = tensors(SIZES, F32, torch.device("cuda"), 0), tensors(SIZES, F32, torch.device("cuda"), 1)
    momentum = torch.tensor(0.5, device="cuda")
    fused_ema_(t, s, momentum)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_ema_(t, s, momentum)
        fused_ema_(t, s, 0.75)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_ema_(t, s, momentum)
    old = [numpy(x) for x in t]
    momentum.fill_(0.25)
    graph.replay()
    for i, x in enumerate(t):
        assert_close(x, old[i], numpy(s[i]), 0.25)


@pytest.mark.gpu
def test_compiled_on_a_gpu() -> None:
    t, s = tensors(SIZES, F32, torch.device("cuda"), 0), tensors(SIZES, BF16, torch.device("cuda"), 1)
    want = [definition(numpy(x), numpy(y), 0.5) for x, y in zip(t, s, strict=True)]
    torch.compile(lambda: fused_ema_(t, s, 0.5), fullgraph=True)()
    for x, expected in zip(t, want, strict=True):
        np.testing.assert_allclose(numpy(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    t, s = torch.zeros(5000, device="cuda:1"), torch.ones(5000, device="cuda:1")
    fused_ema_([t], [s], 0.5)
    assert (t == 0.5).all()
    assert torch.cuda.current_device() == 0


def part(name: str) -> Any:
    """A module of another library; skips the test if it is not installed."""
    pytest.importorskip(name.split(".")[0], reason=f"{name.split('.')[0]} is not installed")
    return importlib.import_module(name)


def network(seed: int) -> nn.Sequential:
    """A small convolutional network with these random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5))


def train_step(student: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step of the student on random images."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    student(x).square().mean().backward()
    optimizer.step()


def loop(theirs: Callable[[nn.Module, int], None], ours: Callable[[nn.Module, int], None]) -> None:
    """Train a student for five steps, and update the teacher of the other library and fastrm's after each."""
    student = network(0)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for step in range(5):
        train_step(student, optimizer, step)
        theirs(student, step)
        ours(student, step)


def test_it_replaces_the_update_of_lightly() -> None:
    utils = part("lightly.models.utils")
    theirs, ours = network(1), network(1)
    loop(lambda s, _: utils.update_momentum(s, theirs, 0.9), lambda s, _: fused_ema_(ours, s, 0.9))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_replaces_the_update_of_timm() -> None:
    timm = part("timm.utils")
    start = network(0)
    theirs = timm.ModelEmaV3(start, decay=0.9, use_warmup=True)
    ours = copy.deepcopy(start)

    def fused(student: nn.Module, step: int) -> None:
        decay = theirs.get_decay(step)
        # timm averages floating-point buffers like parameters, and copies integer ones.
        fused_ema_(ours.state_dict().values(), student.state_dict().values(), decay)

    loop(lambda s, step: theirs.update(s, step), fused)
    for (name, a), b in zip(ours.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_replaces_the_update_of_averaged_model(backend: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    device = device_of(backend)
    theirs = AveragedModel(network(0), device, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ours = AveragedModel(network(0), device, multi_avg_fn=ema_avg_fn(0.9, backend=backend), use_buffers=True)

    def fused(student: nn.Module, step: int) -> None:
        nonlocal ours
        if step == 3:  # as a checkpoint of the whole module does
            ours = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
        ours.update_parameters(student)

    loop(lambda s, _: theirs.update_parameters(s), fused)
    for (name, a), b in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert a == 5  # BatchNorm's number of batches is copied


def test_groups_of_averaged_model_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    prepare = EMA._prepare
    monkeypatch.setattr(EMA, "_prepare", lambda self: (prepared.append(1), prepare(self)))
    average = ema_avg_fn(0.5)
    a, b = [torch.zeros(3), torch.zeros(2)], [torch.ones(3), torch.ones(2)]
    for _ in range(3):
        average([x.detach() for x in a], [x.detach() for x in b], torch.tensor(1))
    assert len(prepared) == 1
    torch.testing.assert_close(a[0], torch.full((3,), 0.875))
    average([a[0].view(3, 1), a[1]], [b[0].view(3, 1), b[1]])  # the same memory with another shape
    average([a[1], a[0]], [b[1], b[0]])
    assert len(prepared) == 3
    torch.testing.assert_close(a[0], torch.full((3,), 1 - 1 / 32))
    average([], [])
    with pytest.raises(ValueError, match="ema_avg_fn: momentum"):
        ema_avg_fn(1.5)
    with pytest.raises(ValueError, match="backend"):
        ema_avg_fn(0.5, backend="numpy")
    with pytest.raises(ValueError, match="student"):
        average(a, b[:1])
