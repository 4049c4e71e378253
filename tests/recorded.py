"""CUDA graphs without a GPU: what a capture launches is recorded, has not run when it ends, and is replayed.

Operations and Triton launches (in the interpreter) are recorded with their very tensors. A replay makes them again on
what these hold by then; Python of the captured code does not run again. So whatever a step rebinds, or remembers on the
host of what it wrote, goes wrong as it would on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


class Graph(TorchDispatchMode):
    """What ``torch.cuda.CUDAGraph`` would hold."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], None]] = []
        self._made: dict[Any, Tensor] = {}
        self._before: dict[Any, tuple[Tensor, Tensor]] = {}

    def record(self, launch: Callable[[], Any], given: list[Tensor]) -> Any:
        """Note an operation, keep what it may overwrite, and make it, for what follows to have its shapes."""
        for tensor in given:  # not all of what is written is in the schema: batch_norm's running statistics are not
            if (place := _memory(tensor)) not in self._made and place not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[place] = whole, whole.clone()
        result = launch()
        known = {*self._made, *self._before, *map(_memory, given)}
        new = [tensor for tensor in _tensors(result) if _memory(tensor) not in known]
        self._made |= {_memory(tensor): tensor for tensor in new}

        def again() -> None:
            for kept, now in zip(_tensors(result), _tensors(launch()), strict=True):
                if _memory(kept) in self._made and _memory(kept) != _memory(now):
                    kept.copy_(now)

        self.launches.append(again)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastrm":  # what it is made of is recorded, not itself
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        assert func._schema.name.partition("::")[2] not in READS, f"the host reads a value in a capture: {func}"
        if func.is_view or func._schema.name.startswith(("aten::set_", "aten::detach")):
            return func(*args, **kwargs)
        return self.record(lambda: func(*args, **kwargs), _tensors((args, kwargs)))

    def finish(self) -> None:
        """Nothing has run: what was there is as it was, and what was made holds nothing of use."""
        for whole, before in self._before.values():
            whole.copy_(before)
        for tensor in self._made.values():
            if tensor.is_floating_point():
                torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        """Make all launches again."""
        for launch in self.launches:
            launch()


@contextlib.contextmanager
def _capture(graph: Graph, **_: Any) -> Iterator[None]:
    assert Graph.capturing is None
    Graph.capturing = graph
    try:
        with graph:
            yield
    finally:
        Graph.capturing = None
        graph.finish()


@pytest.fixture
def cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """``torch.cuda.CUDAGraph``, ``graph`` and streams, for tensors on the CPU."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: Graph.capturing is not None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Graph.capturing is not None)
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    plain = interpreter.InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        graph = Graph.capturing
        if graph is None:
            return plain(self, *args, **kwargs)

        graph.launches.append(lambda: plain(self, *args, **kwargs))  # its results are tensors that are there already
        return None

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    return Graph
