"""One optimizer step: micro-batches, loss, backward pass, check for finite gradients, optimizer and queues."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from fastrm.data.loader import Batch
from fastrm.errors import TrainingError
from fastrm.machine.distributed import replicate, world
from fastrm.methods import Method, StepOutput
from fastrm.methods.base import unchanged_buffers
from fastrm.methods.verify import verify
from fastrm.optim import TeacherOptimizer
from fastrm.optim.groups import decayed, scaled
from fastrm.optim.schedules import Rates
from fastrm.settings.config import check_choice

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_SKIPPED = 10
"""Steps in a row without a finite gradient, after which a run stops."""


class Output(NamedTuple):
    """A micro-batch and its results; tensors are on their device."""

    loss: Tensor
    """The loss with all its factors, 0-d, detached."""
    contrastive: Tensor
    """The method's own loss, 0-d."""
    residual: Tensor | None
    """The residual term without its weight, 0-d; None if it is neither trained nor measured."""
    gap: Tensor | None
    """1 - mean cosine between student and teacher on the same view, 0-d; None if it is not measured."""
    features: Tensor
    """The student's backbone features of the first view, [B, C]."""
    indices: list[int]
    """Indices of the images in the data set."""
    views: tuple[Tensor, ...]
    """Views of the images, [B, C, H, W] each."""


class Step:
    """One optimizer step of a run.

    A step whose gradient is not finite changes nothing: neither student, teacher, optimizer state, BatchNorm's running
    statistics nor queue. On a GPU the host does not wait to know: the flag stays on the device, and is read when
    values are logged.

    Args:
        method: student, teacher and queues, on their device.
        optimizer: updates the student, and the teacher in the same step.
        precision: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        accumulate: micro-batches per step.
        clip_norm: largest norm of the whole gradient; None does not limit it.
        clip_each: let it be the largest norm of each parameter's gradient instead.
        layout: memory format of the images.
    """

    def __init__(
        self,
        method: Method[Any],
        optimizer: Any,
        *,
        precision: str,
        accumulate: int,
        clip_norm: float | None,
        layout: torch.memory_format,
        clip_each: bool = False,
    ) -> None:
        self.method, self.optimizer = method, optimizer
        self.accumulate, self.layout = accumulate, layout
        self.clip_norm, self.clip_each = clip_norm, clip_each
        self.holds = False
        """Whether the parameters that the method freezes in the first epochs are frozen now."""
        self.params = [p for p in method.parameters() if p.requires_grad]
        self.device = self.params[0].device
        check_choice("precision", precision, ("fp32", *AUTOCAST))
        self.autocast = AUTOCAST.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.skipped = torch.zeros((), device=self.device)
        """Number of skipped steps since the start of this process."""
        self.in_a_row = torch.zeros((), device=self.device)
        self.residual_weight = torch.zeros((), device=self.device)
        self.statistics = _one_tensor(method)
        self.network = replicate(method, self.device) if world().size > 1 else method

    def __call__(
        self,
        batches: Iterable[Batch],
        rates: Rates,
        *,
        measure: bool,
    ) -> list[Output]:
        """Make a step on ``accumulate`` micro-batches; ``measure`` adds values that training does not need."""
        self.residual_weight.fill_(rates.residual_weight)
        self._set(rates)
        self.method.set_rates(rates)
        self.holds = rates.holds and any(True for _ in self.method.held())
        taken: list[Batch] = []

        def views() -> Iterator[tuple[Tensor, ...]]:
            for batch in batches:
                taken.append(batch)
                yield batch.views

        outputs = self._run(views(), measure)
        return [
            Output(*found[:4], features=found.features, indices=batch.indices, views=batch.views)
            for found, batch in zip(outputs, taken, strict=True)
        ]

    def _set(self, rates: Rates) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = scaled(rates.lr, group)
            group["weight_decay"] = decayed(rates.weight_decay, group)
        self.optimizer.ema_momentum = rates.teacher_momentum

    def _run(self, batches: Iterable[tuple[Tensor, ...]], measure: bool) -> list[StepOutput]:
        statistics = self.statistics.clone()
        outputs = []
        for number, views in enumerate(batches, start=1):
            last = number == self.accumulate
            with contextlib.nullcontext() if last or isinstance(self.network, Method) else self.network.no_sync():
                outputs.append(self._micro_batch(views, measure))
        with record_function("optimizer and teacher update"):
            skip = self._move()
            self.statistics.copy_(torch.where(skip != 0, statistics, self.statistics))
        with record_function("queue"):
            for output in outputs:
                self.method.push(output.keys, skip=skip)
        return outputs

    def _micro_batch(self, views: tuple[Tensor, ...], measure: bool) -> StepOutput:
        arranged = [view.contiguous(memory_format=self.layout) for view in views]
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            count = self.method.views
            further = {"more": arranged[count:]} if len(arranged) > count else {}
            output: StepOutput = self.network(*arranged[:count], self.residual_weight, measure=measure, **further)
        # Recomputed blocks would update BatchNorm's statistics a second time.
        student = self.method.student
        recomputing = unchanged_buffers(student) if student.backbone.recomputes else contextlib.nullcontext()
        with record_function("backward"), recomputing:
            self._scaled(output.loss).backward()
        return output._replace(loss=output.loss.detach())

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss / self.accumulate)

    def _move(self) -> Tensor:
        """Clip, and step if the gradient is finite; return 1 if it is not, otherwise 0."""
        for held in self.method.held() if self.holds else ():
            held.grad = None
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.clip_norm is not None and self.clip_each:
            norms = torch.stack(torch._foreach_norm(grads))
            torch._foreach_mul_(grads, list((self.clip_norm / (norms + 1e-6)).clamp(max=1).unbind()))
        elif self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.clip_norm, norm)
        skip = (~norm.isfinite()).float()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        elif isinstance(self.optimizer, TeacherOptimizer):
            self.optimizer.found_inf = skip
            self.optimizer.step()
        elif not skip:  # apex's LAMB does not take the flag
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += skip
        self.in_a_row.add_(1).mul_(skip)  # in place, so that a captured step keeps counting
        return skip

    def verify(self, views: tuple[Tensor, ...]) -> dict[str, float]:
        """Compare the fused losses with the reference on a micro-batch: :func:`fastrm.methods.verify.verify`."""
        arranged = tuple(view.contiguous(memory_format=self.layout) for view in views)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return verify(self.method, arranged, self.residual_weight, scaled=self._scaled)

    def check(self, done: int) -> int:
        """Number of skipped steps so far; the host waits for the device.

        Raises:
            TrainingError: the last ten were.
        """
        total, in_a_row = torch.stack([self.skipped, self.in_a_row]).tolist()
        if in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"{in_a_row:.0f} steps in a row, up to step {done}, had a gradient that is not finite and were "
                "skipped; what was saved before is kept; a lower --lr, --clip-norm or --precision fp32 may help"
            )
        return int(total)


def _one_tensor(module: nn.Module) -> Tensor:
    """Lay BatchNorm's running means and variances into one tensor, so that one copy keeps and restores all of them."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    places = [(m, name) for m in norms for name in ("running_mean", "running_var") if m._buffers.get(name) is not None]
    if not places:
        return torch.empty(0, device=next(module.parameters()).device)
    values = [getattr(m, name) for m, name in places]
    together = torch.cat([value.flatten() for value in values])
    start = 0
    for (m, name), value in zip(places, values, strict=True):
        # `set_` instead of slices: slices share a version counter, so updating one buffer would make backward fail for
        # all.
        own = torch.empty(0, dtype=value.dtype, device=value.device)
        m._buffers[name] = own.set_(together.untyped_storage(), start, value.shape, value.stride())
        start += value.numel()
    return together
