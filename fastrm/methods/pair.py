"""A student and its teacher, which is averaged from it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class TeacherPair:
    """Networks of one layout, and the low-precision copy of the teacher's weights that it may compute from.

    It is no Module, so that the method which holds it has both networks as its own parts, under these names in its
    ``state_dict``.

    Attributes:
        student, teacher: the optimizer averages the parameters of the first into the second. They start alike.
        low_precision: the teacher's parameters in a half-precision dtype, by name; empty without a copy.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.low_precision: dict[str, Tensor] = {}
        self._computed_from: dict[str, Tensor] = {}

    def keep_low_precision(self, dtype: torch.dtype) -> None:
        """Let the teacher compute from a copy of its weights in ``dtype``, under autocast to that.

        Autocast would round all weights anew in each forward, to the same values. The optimizer writes the copy in the
        pass that moves the teacher; what else writes the teacher has to call :meth:`refresh`.
        """
        self.low_precision = {name: p.detach().to(dtype) for name, p in self.teacher.named_parameters()}
        layers = {name for name, m in self.teacher.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        # Only these layers compute in low precision; normalisation, say, takes its own parameters as they are.
        self._computed_from = {n: low for n, low in self.low_precision.items() if n.rpartition(".")[0] in layers}

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the low-precision copy up to date, if there is one."""
        for name, low in self.low_precision.items():
            low.copy_(self.teacher.get_parameter(name))

    def teach(self, view: Tensor) -> Any:
        """What the teacher says of a view, [B, C, H, W]."""
        if self._computed_from and torch.is_autocast_enabled(view.device.type):
            return functional_call(self.teacher, self._computed_from, (view,))
        return self.teacher(view)

    def partners(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """For each parameter of the student that is trained, the teacher's, and that of the copy if there is one.

        What is frozen stays alike by itself.
        """
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        teacher = dict(self.teacher.named_parameters())
        return (
            {p: teacher[name] for name, p in trained.items()},
            {p: self.low_precision[name] for name, p in trained.items() if self.low_precision},
        )
