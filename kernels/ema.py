"""The multi-tensor update of the teacher as a moving average of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import pairing, reference
from ._ema_kernel import OnTriton
from ._seen import Seen
from .dispatch import check_backend, check_not_recomputed, check_once, check_scalar, choose, compute_dtype
from .multi_tensor import capturing, flat, in_order
from .pairing import Tensors, taken
from .sharding import all_plain, is_fake, localised

LARGE = 32768  # elements from which torch itself splits an operation on the CPU among threads

Update = Callable[[Sequence[Tensor], Sequence[Tensor], "float | Tensor", "Sequence[Tensor] | None"], None]


class _OnCPU:
    """One pass of lerp_ or faster; a student of another dtype is converted tensor by tensor, while in the cache."""

    def __init__(self, teacher: Sequence[Tensor], student: Sequence[Tensor], shadow: Sequence[Tensor] | None) -> None:
        # lerp_ knows no 8-bit dtypes, and the shadow of a half-precision teacher must not be rounded twice.
        least = 2 if shadow is None else 4
        same = [
            t.dtype == s.dtype and t.is_floating_point() and t.element_size() >= least
            for t, s in zip(teacher, student, strict=True)
        ]
        large = [
            yes and t.dtype in (torch.float32, torch.float64) and t.numel() >= LARGE and flat(t, s)
            for yes, t, s in zip(same, teacher, student, strict=True)
        ]
        self.same = [i for i, yes in enumerate(same) if yes]
        self.large = [i for i, yes in enumerate(large) if yes]
        self.small = [i for i in self.same if not large[i]]
        self.mixed = [i for i, yes in enumerate(same) if not yes]

    @torch.no_grad()
    def __call__(
        self,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        momentum: float | Tensor,
        shadow: Sequence[Tensor] | None,
    ) -> None:
        rest = 1 - float(momentum)
        lerped = self.same
        if self.large and rest <= 0.5:
            # A step of SGD down the teacher's distance to the student, whose pass is 5 to 8 % faster than lerp_'s.
            # Near rest 1 the difference from the teacher would lose the student's last bits, and small tensors are
            # not worth waking all threads.
            lerped, large = self.small, in_order(taken(teacher, self.large))
            torch._fused_sgd_(
                large,
                in_order(taken(student, self.large)),
                [],
                weight_decay=1.0,
                momentum=0.0,
                lr=rest,
                dampening=0.0,
                nesterov=False,
                maximize=True,
                is_first_step=False,
            )
            torch.autograd.graph.increment_version(taken(teacher, self.large))
        if lerped:
            torch._foreach_lerp_(taken(teacher, lerped), taken(student, lerped), rest)
        if self.same and shadow is not None:
            torch._foreach_copy_(taken(shadow, self.same), taken(teacher, self.same))
        for i in self.mixed:
            t, s = teacher[i], student[i]
            if not t.is_floating_point():
                new = s
            elif t.dtype == compute_dtype(t, s):
                new = t.lerp_(s.to(t.dtype), rest)
            else:
                new = t.to(compute_dtype(t, s)).lerp_(s.to(compute_dtype(t, s)), rest)
            for written in (t,) if shadow is None else (t, shadow[i]):
                if written is not new:
                    written.copy_(new)


_EMA: dict[str, Callable[..., Update]] = {
    "reference": lambda teacher, student, shadow: reference.ema_,
    "cpu": _OnCPU,
    "triton": OnTriton,
}


class _Plan:
    """The prepared update of one list of tensors: the indices that take part, and the function that updates them."""

    def __init__(
        self,
        backend: str | None,
        teacher: Sequence[Tensor],
        student: Sequence[Tensor],
        shadow: Sequence[Tensor] | None,
    ) -> None:
        self.kept = pairing.check("fused_ema_", teacher, student, shadow)
        # What can be written in torch.inference_mode only is checked again at each call.
        self.lasting = not any(map(Tensor.is_inference, [*teacher, *(shadow or ())]))
        self.all_kept = len(self.kept) == len(teacher)
        nowhere = torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
        build = choose("fused_ema_", backend, _EMA, teacher[0].device if teacher else nowhere)
        self.update = build(*self.take(teacher, student, shadow))

    def take(self, *lists: Sequence[Tensor] | None) -> list[Any]:
        """The tensors that take part, of each list."""
        return [x if x is None or self.all_kept else taken(x, self.kept) for x in lists]


class EMA:
    """The prepared form of :func:`fused_ema_`: it matches and checks the pairs once, and updates them many times.

    Checks and tables are repeated when the address of a tensor changes. Tables that are built during a capture belong
    to the CUDA graph, because they have no content before a replay.

    Args:
        teacher, student, shadow: as in :func:`fused_ema_`. Tensors are kept by reference. Modules are matched again
            when one of them has other parameters, as after ``load_state_dict(assign=True)`` or ``fully_shard``.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: as in :func:`fused_ema_`.
    """

    def __init__(
        self,
        teacher: Tensors,
        student: Tensors,
        *,
        shadow: Iterable[Tensor] | None = None,
        backend: str | None = None,
    ) -> None:
        self.backend = backend
        self._given = None if shadow is None else pairing.listed("fused_ema_", "shadow", shadow)
        self._match(teacher, student)

    def _match(self, teacher: Tensors, student: Tensors) -> None:
        self.teacher, self.student = pairing.pair("fused_ema_", teacher, student)
        self.shadow = self._given
        self._watched = pairing.watched(teacher, student)
        self._prepare()

    def _prepare(self) -> None:
        self._plain = all_plain([*self.teacher, *self.student, *(self.shadow or ())])
        if not self._plain:
            pairing.check("fused_ema_", *localised("fused_ema_", self.teacher, self.student, self.shadow))
            return
        plan = _Plan(self.backend, self.teacher, self.student, self.shadow)
        self.teacher, self.student, self.shadow = plan.take(self.teacher, self.student, self.shadow)
        self._update = plan.update
        self._tensors = [*self.teacher, *self.student, *(self.shadow or ())]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)] if plan.lasting and not capturing() else []

    def update_(self, momentum: float | Tensor) -> None:
        """Update the teacher (and its shadow) in place; ``momentum`` as in :func:`fused_ema_`."""
        if not torch.compiler.is_compiling() and self._watched is not None and self._watched.changed():
            self._match(*self._watched.roots)
        if torch.compiler.is_compiling() or not self._plain:
            return fused_ema_(self.teacher, self.student, momentum, shadow=self.shadow, backend=self.backend)
        check_once("fused_ema_")
        check_scalar("fused_ema_", "momentum", momentum, low=0, high=1)
        if [*map(Tensor.data_ptr, self._tensors)] != self._addresses:
            self._prepare()
        if capturing():
            _OF_GRAPHS.append(self._update)
        self._update(self.teacher, self.student, momentum, self.shadow)


# Plans of captured CUDA graphs. A graph reads their tables, and does not announce its deletion.
_OF_GRAPHS: list[Any] = []

# Plans of past calls.
_PLANS = Seen()


def _planned(backend: str | None, lists: tuple[list[Tensor], list[Tensor], list[Tensor] | None]) -> _Plan:
    """Build a plan, and store it for later calls."""
    plan = _Plan(backend, *lists)
    if plan.lasting and not capturing():  # tables of a capture have no content before a replay of its graph
        _PLANS.keep(backend, lists, plan)
    return plan


@torch.library.custom_op("fastrm::ema_", mutates_args=("teacher", "shadow"))
def _ema_op(
    teacher: list[Tensor],
    student: list[Tensor],
    momentum: Tensor,
    shadow: list[Tensor],
    has_shadow: bool,
    backend: str | None,
) -> None:
    value = momentum.item() if momentum.device.type == "cpu" else momentum
    fused_ema_(teacher, student, value, shadow=shadow if has_shadow else None, backend=backend)


@_ema_op.register_fake
def _ema_fake(*_: Any) -> None:
    check_not_recomputed("fused_ema_")


def fused_ema_(
    teacher: Tensors,
    student: Tensors,
    momentum: float | Tensor,
    *,
    shadow: Iterable[Tensor] | None = None,
    backend: str | None = None,
) -> None:
    """Update a teacher in place: ``teacher <- momentum * teacher + (1 - momentum) * student``.

    This is the update of mean teachers (Tarvainen and Valpola, arXiv 1703.01780) and MoCo (He et al., arXiv
    1911.05722).
    It is computed in float32 (float64 if a tensor is float64). Dtypes may be mixed; the intended use is a bf16 student
    and a float32 teacher. A bf16 or fp16 *teacher* is allowed, but loses every change smaller than half the spacing of
    its values, which at momentum 0.999 is most of them.

    On a GPU, one launch updates all pairs with the same dtypes; its tables are kept until a tensor moves or is deleted.
    Call the function once before you capture it in a CUDA graph.

    Args:
        teacher: iterable of tensors, or a module: its parameters are matched with those of a student module by
            name, where the name parts that wrappers add (``module``, ``_orig_mod``, ``_fsdp_wrapped_module``,
            ``_checkpoint_wrapped_module``) are ignored. Integer tensors are copied. Buffers take part only if you pass
            them. A tensor that is listed twice is updated once. With DTensors (FSDP2), each process updates its part.
        student: like ``teacher``, tensor for tensor of the same shape, device and placements; never changed.
        momentum: number from 0 to 1, or a 0-d tensor (whose value is not checked).
        shadow: iterable of low-precision copies of the teacher, updated in the same pass.
        backend: ``None``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    Raises:
        ValueError, TypeError: the lists do not pair up, shapes, dtypes or devices do not fit, a tensor to be written
            is expanded, or the backend is not available. Then nothing is written.
        RuntimeError: called under activation checkpointing, under torch.func, or in a backward pass, except in hooks on
            the gradient of a parameter.
    """
    check_once("fused_ema_")
    teachers, students = pairing.pair("fused_ema_", teacher, student)
    shadows = None if shadow is None else pairing.listed("fused_ema_", "shadow", shadow)
    fake, plan = False, None
    if not torch.compiler.is_compiling():
        check_scalar("fused_ema_", "momentum", momentum, low=0, high=1)
        check_backend("fused_ema_", backend)
        plan = _PLANS.find(backend, (teachers, students, shadows))
        if plan is None and not all_plain([*teachers, *students, *(shadows or ())]):
            teachers, students, shadows = localised("fused_ema_", teachers, students, shadows)
            fake = any(map(is_fake, [*teachers, *students]))
            plan = None if fake else _PLANS.find(backend, (teachers, students, shadows))
    if fake:  # nothing to prepare, and no memory to prepare it for
        pairing.check("fused_ema_", teachers, students, shadows)
    if fake or torch.compiler.is_compiling():
        with torch.no_grad():
            if not isinstance(momentum, Tensor):
                # An addition keeps a changing number out of the graph; a constructor would bake it in and recompile.
                zero = teachers[0].new_zeros((), dtype=torch.float64, device="cpu") if teachers else torch.zeros(())
                momentum = zero + momentum
            return _ema_op(teachers, students, momentum, shadows or [], shadows is not None, backend)
    plan = plan or _planned(backend, (teachers, students, shadows))
    if capturing():
        _OF_GRAPHS.append(plan)
    teachers, students, shadows = plan.take(teachers, students, shadows)
    plan.update(teachers, students, momentum, shadows)
