"""The whole step as one CUDA graph, for networks whose kernels take longer to launch than to run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastrm.methods import StepOutput
from fastrm.optim.groups import scaled
from fastrm.run.step import Step

EAGER = 2
"""Steps of either kind, measured or not, before one is captured: they make the state and compile the kernels."""


class GraphedStep(Step):
    """A :class:`fastrm.run.step.Step` that is captured once and replayed: the same numbers, in one launch.

    What changes from step to step lies in tensors that stay where they are: the images, which are copied there, the
    learning rate, the teacher's momentum and the residual term's weight. A step that is measured is a graph of its own.
    What a step returns is overwritten by the next.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher_momentum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.rates = [torch.zeros_like(self.teacher_momentum) for _ in self.optimizer.param_groups]
        self.images: list[tuple[Tensor, ...]] = []
        self.eager = {False: 0, True: 0}
        self.captured: dict[bool, tuple[torch.cuda.CUDAGraph, list[StepOutput]]] = {}
        self.stream = torch.cuda.Stream(self.device)

    def _set(self, lr: float, teacher_momentum: float) -> None:
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            group["lr"] = rate.fill_(scaled(lr, group))
        self.optimizer.ema_momentum = self.teacher_momentum.fill_(teacher_momentum)

    def _run(self, batches: Iterable[tuple[Tensor, ...]], measure: bool) -> list[StepOutput]:
        given = list(batches)
        if not self.images:
            self.images = [tuple(map(self._like, views)) for views in given]
        for views, own in zip(given, self.images, strict=True):
            for view, image in zip(views, own, strict=True):
                image.copy_(view, non_blocking=True)
        if self.eager[measure] < EAGER:
            self.eager[measure] += 1
            return self._beside(measure)
        if measure not in self.captured:
            graph = torch.cuda.CUDAGraph()
            # Records, and runs nothing; threads that load images may go on meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = super()._run(self.images, measure)
            self.captured[measure] = graph, outputs
        graph, outputs = self.captured[measure]
        graph.replay()
        return outputs

    def _beside(self, measure: bool) -> list[StepOutput]:
        """Run on a stream that is not the default one, as what is to be captured has to."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            outputs = super()._run(self.images, measure)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return outputs

    def _like(self, view: Tensor) -> Tensor:
        return torch.empty_like(view, memory_format=self.layout)
