"""A student, and its teacher, which is a moving average of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class TeacherPair:
    """Two networks of the same architecture, and an optional low-precision copy of the teacher's weights.

    This is not a Module, so that the method registers both networks as its own, under these names in its
    ``state_dict``.

    Attributes:
        student, teacher: the optimizer averages the student's parameters into the teacher's, which start equal.
        low_precision: the teacher's parameters in a half-precision dtype, by name; empty without a copy.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.low_precision: dict[str, Tensor] = {}
        self._computed_from: dict[str, Tensor] = {}

    def keep_low_precision(self, dtype: torch.dtype) -> None:
        """Let the teacher compute from a copy of its weights in ``dtype``, under autocast to ``dtype``.

        The values are the same as autocast's, which would convert all weights in each forward pass. The optimizer
        writes the copy in the same pass as the teacher; any other code that changes the teacher must call
        :meth:`refresh`.
        """
        self.low_precision = {name: p.detach().to(dtype) for name, p in self.teacher.named_parameters()}
        layers = {name for name, m in self.teacher.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        # Autocast computes only these layers in low precision; normalisation, for example, uses its float32 parameters.
        self._computed_from = {n: low for n, low in self.low_precision.items() if n.rpartition(".")[0] in layers}

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the low-precision copy, if there is one."""
        for name, low in self.low_precision.items():
            low.copy_(self.teacher.get_parameter(name))

    def teach(self, view: Tensor) -> Any:
        """The teacher's encoding of a view [B, C, H, W]."""
        if self._computed_from and torch.is_autocast_enabled(view.device.type):
            return functional_call(self.teacher, self._computed_from, (view,))
        return self.teacher(view)

    def partners(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """The teacher's parameter, and the one of its copy if there is one, for each trained parameter of the student.

        Frozen parameters need no update, since they are equal in both networks.
        """
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        teacher = dict(self.teacher.named_parameters())
        return (
            {p: teacher[name] for name, p in trained.items()},
            {p: self.low_precision[name] for name, p in trained.items() if self.low_precision},
        )
