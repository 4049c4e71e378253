"""Signals that make a run save: after SIGTERM, SIGINT and SIGHUP it ends, after SIGUSR1 it continues."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastrm.machine.distributed import world

# Windows has neither of the last two.
HANGUP = getattr(signal, "SIGHUP", None)
SAVING = getattr(signal, "SIGUSR1", None)
ENDING = (signal.SIGINT, signal.SIGTERM, HANGUP)


class Asked(NamedTuple):
    """The requests of signals and hooks."""

    save: bool
    """Save now."""
    end: int
    """End for this signal; 0 means no."""
    stop: bool
    """End, because a hook requested it."""
    failed: bool
    """A hook failed."""


class Signals:
    """Context in which the first signal is recorded, and a second signal that ends a run takes effect at once.

    With several processes, a signal to any of them counts for all at the same step. This is one step later, because the
    processes exchange requests while they train, and no step waits for the exchange.
    """

    def __init__(self) -> None:
        self._save, self._end = False, 0
        self._sent: tuple[torch.Tensor, Any] | None = None
        self._before: dict[int, Any] = {}
        self._group: Any = dist.new_group(backend="gloo") if world().size > 1 else None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # other threads get no signals
            self._before = {number: signal.signal(number, self._note) for number in _numbers()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._sent is not None:  # complete the exchange; but another process may have died
            with contextlib.suppress(RuntimeError):
                self._sent[1].wait(datetime.timedelta(seconds=10))

    def _note(self, number: int, _: FrameType | None) -> None:
        self._save = True
        if number in ENDING:
            if self._end:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._end = number

    def save_soon(self) -> None:
        """Request a checkpoint, like a signal."""
        self._save = True

    def asked(self, *, stop: bool = False, failed: bool = False, wait: bool = False) -> Asked:
        """The requests in any process since the last call. Call this in all processes.

        With several processes, it returns the requests up to the previous call, whose exchange is complete; with
        ``wait``, also those of this call.
        """
        save, self._save = self._save, False  # at once: a later signal belongs to the next call
        wishes = torch.tensor([int(save), self._end, int(stop), int(failed)])
        answered = [wishes]
        if self._group is not None:  # over gloo, so that no device must be waited for
            sent = dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group, async_op=True)
            questions = [question for question in (self._sent, (wishes, sent)) if question is not None]
            self._sent = None if wait else questions.pop()
            for _, arriving in questions:
                arriving.wait()
            answered = [torch.zeros_like(wishes), *(answer for answer, _ in questions)]
        together = torch.stack(answered).amax(dim=0).tolist()
        return Asked(bool(together[0]), together[1], bool(together[2]), bool(together[3]))


class Deaths:
    """Context in which :meth:`mute` stops torch from reporting the deaths of loader processes, until the context ends.

    torch reports them in a handler of SIGCHLD, which raises a RuntimeError wherever the main thread is. While a run
    that failed is closed, this would interrupt the closing.
    """

    def __init__(self) -> None:
        self._handler: Any = None

    def mute(self) -> None:
        """Ignore the deaths of processes from here to the end of the context."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if hasattr(signal, "SIGCHLD") and in_main_thread and self._handler is None:
            self._handler = signal.signal(signal.SIGCHLD, lambda *_: None)  # SIG_IGN would reap the processes too

    def __enter__(self) -> Deaths:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGCHLD, self._handler)


def _numbers() -> list[int]:
    """Signals to handle; SIGHUP is excluded under nohup."""
    wanted = [number for number in (SAVING, *ENDING) if number is not None]
    return [number for number in wanted if number != HANGUP or signal.getsignal(number) is not signal.SIG_IGN]


def leave_to_the_trainer(_: int = 0) -> None:
    """Make a loader process ignore signals that a scheduler or a terminal sends to all processes of a run.

    The trainer handles these signals, and needs its loader until it has saved. SIGTERM from the parent process still
    ends it, because Python ends loader processes in this way when a script ends.
    """
    for number in _numbers():
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    # Only sigwaitinfo tells who sent a signal, not Python's handlers. macOS and Windows do not have it; there SIGTERM
    # keeps its effect.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_the_trainer, daemon=True).start()


def _end_for_the_trainer() -> None:
    """Wait for a SIGTERM from the parent process, and exit."""
    trainer = multiprocessing.parent_process()
    while True:
        sent = signal.sigwaitinfo({signal.SIGTERM})
        if trainer is not None and sent.si_pid == trainer.pid:
            os._exit(0)
