"""The loss over prototypes as operators of torch.library, which torch.compile does not trace into.

One operator computes the forward pass and one the backward pass. The forward pass keeps only a few numbers per row, and
the backward pass computes the gradient to the prototypes from them. That gradient is as large as the prototypes, so it
is not stored between the passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _prototypes_blocked as blocked
from . import _prototypes_swept as swept
from ._prototypes_blocked import ForwardResult
from ._scoring import Assignment
from .dispatch import compute_dtype

BACKENDS = {
    "cpu": (blocked.blocked_loss, blocked.blocked_gradients),
    "triton": (swept.swept_loss, swept.swept_gradients),
}

# `numbers` are the two temperatures; a tensor replaces the number at its index.
_ARGUMENTS = (
    "Tensor student, Tensor teacher, Tensor prototypes, Tensor? teacher_prototypes, Tensor? center, Tensor? pairs, "
    "float[] numbers, Tensor?[] tensors"
)


def _assignment(*flat: Any) -> Assignment:
    *rows, numbers, tensors = flat
    both = (number if tensor is None else tensor for number, tensor in zip(numbers, tensors, strict=True))
    return Assignment(*rows, *both)


def _flat(assignment: Assignment) -> tuple[Any, ...]:
    both = assignment.student_temperature, assignment.teacher_temperature
    numbers = [0.0 if isinstance(number, Tensor) else float(number) for number in both]
    return *assignment[:6], numbers, [number if isinstance(number, Tensor) else None for number in both]


def _loss(*flat: Any) -> ForwardResult:
    *arguments, to_student, backend = flat
    return BACKENDS[backend][0](_assignment(*arguments), to_student)


def _loss_shapes(*flat: Any) -> ForwardResult:
    *arguments, to_student, backend = flat
    assignment = _assignment(*arguments)
    student, dtype = assignment.student, compute_dtype(*assignment.tensors)
    sizes = (), len(assignment.prototypes), len(student), len(assignment.teacher)
    pull = student.shape if to_student and backend == "triton" else (0,)
    return ForwardResult(*(student.new_empty(size, dtype=dtype) for size in (*sizes, pull)))


def _gradients(*flat: Any) -> tuple[Tensor, Tensor]:
    *arguments, found, upstream, to_student, to_prototypes, backend = flat
    # The loss and the mean are not used here.
    kept = ForwardResult(upstream, upstream, *found)
    return BACKENDS[backend][1](_assignment(*arguments), kept, upstream, to_student, to_prototypes)


def _gradient_shapes(*flat: Any) -> tuple[Tensor, Tensor]:
    student, _, prototypes, *_, to_student, to_prototypes, _ = flat
    return (
        student.new_empty(student.shape if to_student else 0),
        prototypes.new_empty(prototypes.shape if to_prototypes else 0),
    )


_loss_operator = torch.library.custom_op(
    "fastrm::prototype_loss",
    _loss,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool to_student, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_gradients_operator = torch.library.custom_op(
    "fastrm::prototype_gradients",
    _gradients,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor[] found, Tensor upstream, bool to_student, bool to_prototypes, str backend) -> "
    "(Tensor, Tensor)",
)
_loss_operator.register_fake(_loss_shapes)
_gradients_operator.register_fake(_gradient_shapes)


class _WithGradients(torch.autograd.Function):
    """Returns the loss unchanged; the backward pass calls the operator for the gradients."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, prototypes: Tensor, loss: Tensor, *rest: Any) -> Tensor:
        backend, teacher, teacher_prototypes, center, pairs, numbers, first, second, *found = rest
        ctx.backend, ctx.numbers = backend, numbers
        ctx.save_for_backward(
            student, teacher, prototypes, teacher_prototypes, center, pairs, first, second, *found
        )  # fmt: skip
        return loss.data  # not a view, which would forbid in-place changes such as loss /= 2

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "prototype_cross_entropy: the fused backends have no second derivative, which create_graph=True needs; "
                "pass backend='reference'"
            )
        *rows, first, second, logsums, its_logsums, pull = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        both = _gradients_operator(
            *rows, ctx.numbers, [first, second], [logsums, its_logsums, pull], upstream, *wanted, ctx.backend
        )
        to_student, to_prototypes = (x if wants else None for x, wants in zip(both, wanted, strict=True))
        return to_student, to_prototypes, *[None] * 12


def differentiable(backend: str, assignment: Assignment) -> tuple[Tensor, Tensor]:
    """The loss with its graph, and the mean [K] of the teacher's logits; ``backend`` is a key of ``BACKENDS``."""
    student, prototypes, center = assignment.student, assignment.prototypes, assignment.center
    gradient = torch.is_grad_enabled() and (student.requires_grad or prototypes.requires_grad)
    if gradient and center is not None:
        center = center.clone()  # because the caller may update it before the backward pass reads it
    detached = assignment._replace(student=student.detach(), prototypes=prototypes.detach(), center=center)
    rows, (numbers, tensors) = detached[1:6], _flat(detached)[6:]
    loss, mean, *found = _loss_operator(*_flat(detached), gradient and student.requires_grad, backend)
    if gradient:
        teacher, _, teacher_prototypes, _, pairs = rows
        loss = _WithGradients.apply(
            student, prototypes, loss, backend, teacher, teacher_prototypes, center, pairs, numbers, *tensors, *found
        )  # fmt: skip
    return loss, mean
