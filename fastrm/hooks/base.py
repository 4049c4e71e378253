"""The protocol of a hook."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastrm.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from fastrm.run.run import Run
    from fastrm.run.step import Output

EVENTS = ("on_start", "on_step", "on_log", "on_evaluate", "on_checkpoint", "on_end")


class Hook:
    """Methods that a run calls. A hook needs only the methods that it uses, and need not inherit from this class.

    Every process of a run calls its own hooks, in the order in which they were passed. A hook with a state has the
    methods ``state_dict`` and ``load_state_dict``; the state is plain data and tensors, and is saved in each checkpoint
    under the name of the class. The method ``close`` is called when the run is over, however it ended. An exception in
    a hook ends the run after a checkpoint is saved.
    """

    def on_start(self, run: Run) -> None:
        """Before the first step, or before the first one after a resume."""

    def on_step(self, run: Run, step: int, outputs: Sequence[Output]) -> None:
        """After each optimizer step.

        Args:
            run: the run. ``run.logging`` says whether this step is logged; ``run.log`` adds values to its record.
            step: number of optimizer steps so far.
            outputs: results of each micro-batch. Tensors are on their device, so reading a value waits for a GPU.
        """

    def on_log(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """When values of a step are logged, which is every ``--log-every`` steps, and when a hook called
        ``run.log``."""

    def on_evaluate(self, run: Run, step: int, scores: Mapping[str, float]) -> None:
        """After an evaluation."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """After a checkpoint was handed to the thread that writes it to ``path``; it may still be writing."""

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        """After the last step, its evaluation and the results, also if ``run.stop`` ended the run."""


class Hooks:
    """The hooks of a run, in the order in which they are called.

    Args:
        hooks: hooks of the user; their exceptions are kept for later.
        before, after: built-in hooks, called before and after those; their exceptions are raised.

    Raises:
        UsageError: two hooks of one class keep a state.
    """

    def __init__(self, hooks: Iterable[Any] = (), *, before: Iterable[Any] = (), after: Iterable[Any] = ()) -> None:
        self._theirs = list(hooks)
        self._all = [*before, *self._theirs, *after]
        names = [name for name, _ in self._stateful()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"hooks: two of the class {twice[0]} keep a state, which is saved by class; give one")
        self.fault: Exception | None = None
        """The exception of one of the user's hooks."""

    def tell(self, event: str, *args: Any) -> None:
        """Call the method ``event`` of every hook that has it."""
        for hook in self._all:
            method = getattr(hook, event, None)
            if method is None:
                continue
            try:
                method(*args)
            except Exception as error:
                if all(hook is not their for their in self._theirs):
                    raise
                self.fault = self.fault or error

    def close(self) -> None:
        """Close all hooks that have a method ``close``."""
        with ExitStack() as closing:  # closes all, whatever one of them raises
            for hook in reversed(self._all):
                if (close := getattr(hook, "close", None)) is not None:
                    closing.callback(close)

    def _stateful(self) -> Iterator[tuple[str, Any]]:
        for hook in self._all:
            if hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict"):
                yield f"{type(hook).__module__}.{type(hook).__qualname__}", hook

    def state_dict(self) -> dict[str, Any]:
        """States of the hooks that have one, by class name.

        Raises:
            TypeError: a state has a value that a checkpoint, which is read without running code, cannot hold.
        """
        states = {name: hook.state_dict() for name, hook in self._stateful()}
        for name, state in states.items():
            if (found := _not_plain(state)) is not None:
                raise TypeError(
                    f"the state of the hook {name} has a {type(found).__name__} in it; a checkpoint holds tensors, "
                    "numbers, text, and lists, tuples and dicts of them"
                )
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore the state of each hook. A hook that is not in the checkpoint starts fresh."""
        for name, hook in self._stateful():
            if name in states:
                hook.load_state_dict(states[name])


def check(hooks: Any) -> list[Any]:
    """Check the hooks of the user.

    Raises:
        UsageError: an object has no method of a hook, or an unknown method whose name begins with ``on_``.
    """
    listed = list(hooks) if isinstance(hooks, Iterable) else [hooks]
    for hook in listed:
        if isinstance(hook, type):
            raise UsageError(f"hooks: {hook.__name__} is a class; give an object of it: {hook.__name__}()")
        methods = [name for name in dir(hook) if name.startswith("on_") and callable(getattr(hook, name))]
        for name in methods:
            if name not in EVENTS:
                near = difflib.get_close_matches(name, EVENTS, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; they are {', '.join(EVENTS)}"
                raise UsageError(f"hooks: {type(hook).__name__} has a method {name}, which no run calls{hint}")
        if not methods:
            raise UsageError(f"hooks: {hook!r:.80} has none of a hook's methods: {', '.join(EVENTS)}")
    return listed


def _not_plain(value: Any) -> Any:
    """The first value in a state that a checkpoint cannot hold, or None."""
    if isinstance(value, Mapping):
        inner: Iterable[Any] = [*value.keys(), *value.values()]
    elif type(value) in (list, tuple):
        inner = value
    elif value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str, bytes):
        return None
    else:
        return value
    return next((found for each in inner if (found := _not_plain(each)) is not None), None)
