"""CUDA graphs without a GPU: the launches of a capture are recorded, undone when it ends, and repeated by a replay.

Operations and Triton launches (in the interpreter) are recorded with their tensors. A replay repeats them on the
current values of these tensors; Python code of the capture does not run again. So a step that rebinds a tensor, or
remembers on the host what it wrote, goes wrong as it would on a GPU.
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
    """A stand-in for ``torch.cuda.CUDAGraph``."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], None]] = []
        self._made: dict[Any, Tensor] = {}
        self._before: dict[Any, tuple[Tensor, Tensor]] = {}

    def record(self, launch: Callable[[], Any], given: list[Tensor]) -> Any:
        """Record an operation, keep a copy of what it may overwrite, and run it, because later operations need its
        shapes.
        """
        # the schema does not list all that is written: batch_norm's running statistics, for example
        for tensor in given:
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
        # record the operations that a fastrm operation consists of, and not that operation
        if func.namespace == "fastrm":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        assert func._schema.name.partition("::")[2] not in READS, f"the host reads a value in a capture: {func}"
        if func.is_view or func._schema.name.startswith(("aten::set_", "aten::detach")):
            return func(*args, **kwargs)
        return self.record(lambda: func(*args, **kwargs), _tensors((args, kwargs)))

    def finish(self) -> None:
        """End the capture: restore what existed before, and fill what was created with NaN, because nothing has run."""
        for whole, before in self._before.values():
            whole.copy_(before)
        for tensor in self._made.values():
            if tensor.is_floating_point():
                torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat all recorded launches."""
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
    """Replace ``torch.cuda.CUDAGraph``, ``graph`` and streams by stand-ins for tensors on the CPU."""
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

        # a kernel writes only to tensors that exist already
        graph.launches.append(lambda: plain(self, *args, **kwargs))
        return None

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    return Graph
