"""Shows progress: bars with the remaining time on a terminal, otherwise a line at the start and at intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, ClassVar, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastrm.machine.distributed import world

T = TypeVar("T")
EVERY = 30.0
"""Seconds between two lines without a terminal."""


class Task:
    """A task with an amount ``total``, and how much of it is done."""

    def __init__(self, total: float, shown: Callable[[float], None]) -> None:
        self.total, self.done = total, 0.0
        self._shown = shown

    def reach(self, done: float) -> None:
        """Set the completed amount."""
        self.done = done
        self._shown(done)

    def advance(self, amount: float) -> None:
        """Add to the completed amount."""
        self.reach(self.done + amount)


class Display:
    """All bars of one console in one live display, since a terminal can show only one at a time.

    While a display is entered, tasks of :func:`bar` are added to it.

    Attributes:
        live: whether the console can draw bars.
    """

    current: ClassVar[Display | None] = None

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal and not console.is_dumb_terminal and not console.quiet
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=not self.live,
        )

    def __enter__(self) -> Display:
        self._before, Display.current = Display.current, self
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        Display.current = self._before
        self._bars.stop()

    @contextmanager
    def task(self, text: str, total: float, *, start: float = 0.0, lines: bool = True) -> Iterator[Task]:
        """Show a task while this context is entered; with ``lines``, also without a terminal."""
        if self.live:
            bar = self._bars.add_task(text, total=total)
            self._bars.update(bar, completed=start)

            def show(done: float) -> None:
                self._bars.update(bar, completed=done)

            try:
                yield Task(total, show)
            finally:
                self._bars.remove_task(bar)
        else:
            yield Task(total, self._lines(text, total) if lines else lambda done: None)

    def _lines(self, text: str, total: float) -> Callable[[float], None]:
        begin = said = monotonic()
        self._say(f"{text} begins")

        def show(done: float) -> None:
            nonlocal said
            now = monotonic()
            if now - said >= EVERY and 0 < done < total:
                said = now
                left = (now - begin) * (total - done) / done
                self._say(f"{text}: {done / total:.0%} done, about {spelled(left)} left")

        return show

    def _say(self, line: str) -> None:
        with suppress(OSError):  # a closed output must not end the task
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def console(**options: Any) -> Console:
    """A console; in a notebook it only writes plain lines, because the cursor cannot move there."""
    made = Console(**options)
    return Console(**options, force_jupyter=False, force_terminal=False) if made.is_jupyter else made


@contextmanager
def bar(text: str, total: float = 1.0) -> Iterator[Task]:
    """Show a task on the current display, or on a new one on standard error; only in the first process."""
    if Display.current is not None:
        with Display.current.task(text, total) as task:
            yield task
    else:
        with Display(console(stderr=True, quiet=world().rank > 0)) as display, display.task(text, total) as task:
            yield task


def tracked(items: Iterable[T], text: str, total: float) -> Iterator[T]:
    """Yield the ``total`` items, and show how many are done."""
    with bar(text, total) as task:
        for item in items:
            yield item
            task.advance(1)


def spelled(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h" if minutes >= 60 else f"{minutes}:{rest:02} min"
