"""One run at a time in a folder: a lock that says who has it, and that the end of its process releases.

The system's own lock (``flock``) is asked for first. A file system may have none, or keep it from other machines;
therefore the file also says who holds it, and shows a sign of life every few seconds: its time of change.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from fastrm.errors import TrainingError, UsageError
from fastrm.own import MARK, require

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment, unused-ignore]

NAME = ".fastrm.lock"
BEAT = 10.0
"""Seconds between two signs of life."""
STALE = 60.0
"""Seconds without one after which a lock of another machine, or one that the system does not guard, is free."""
SETTLE = 0.5
"""Seconds after which, where the system guards nothing, the one of two that wrote last has the lock."""
_MISSING = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EREMOTE}
_held: set[int] = set()  # file descriptors


def _forget() -> None:
    """Let a forked process, such as a loader's, not keep the lock beyond the end of the run's."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Lock:
    """The lock of a run folder.

    Args:
        out: the folder, which is made, and removed again at the end if nothing was written into it.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / NAME
        self._descriptor = -1
        self._made: list[Path] = []
        self._guarded = False
        self._text = ""
        self._lost = False
        self._end = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UsageError: another run has it.
        """
        try:
            self._acquire()
        except BaseException:
            self.release()
            raise

    def _acquire(self) -> None:
        require("--out", self.out, _wrote, holds=self.path)
        self._made = [folder for folder in (self.out, *self.out.parents) if not folder.exists()]
        self.out.mkdir(parents=True, exist_ok=True)
        self._descriptor, self._guarded = self._opened()
        _held.add(self._descriptor)
        holder = self._holder()
        if holder and not (self._guarded and holder["machine"] == _machine()):  # else the system has freed it
            self._wait_for_silence(holder)
        own = {MARK: NAME, "host": socket.gethostname(), "process": os.getpid(), "machine": _machine()}
        since = datetime.datetime.now(datetime.timezone.utc).isoformat(sep=" ", timespec="seconds")
        self._text = json.dumps({**own, "since": since})
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, self._text.encode())
        os.fsync(self._descriptor)
        if not self._guarded:
            time.sleep(SETTLE)
            if self.path.read_text(encoding="utf-8") != self._text:
                raise self._taken(self._holder())
        threading.Thread(target=self._live, name="lock", daemon=True).start()

    def _opened(self) -> tuple[int, bool]:
        """A descriptor of the file, and whether the system guards it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is None:
                    return descriptor, False
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                        return descriptor, True
            except OSError as error:
                if error.errno in _MISSING:
                    return descriptor, False
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise self._taken(self._holder()) from None
                raise
            os.close(descriptor)  # its holder has removed it since: this is no longer the file of that name

    def _holder(self) -> dict[str, Any]:
        """Who the file says has the lock; nothing where it does not say."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return found if found.keys() >= {MARK, "host", "process", "machine", "since"} else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _taken(self, holder: dict[str, Any]) -> UsageError:
        who = "process {process} on {host} since {since}".format(**holder) if holder else "another process"
        return UsageError(f"--out {self.out} is in use by {who}; wait until it has ended, or give another --out")

    def _wait_for_silence(self, holder: dict[str, Any]) -> None:
        """Return if who holds the lock is gone. On another machine that shows only in time."""
        seen = self._sign()
        age = time.time() - seen[0] / 1e9
        if (holder["machine"], holder["host"]) == (_machine(), socket.gethostname()):  # containers share a machine
            if _alive(holder["process"]) and age < STALE:
                raise self._taken(holder)
            return
        if abs(age) > 3600:
            return
        print(
            f"notice     --out {self.out} was in use by process {holder['process']} on {holder['host']}; waiting "
            f"{STALE:.0f} s for a sign of life of it"
        )
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT / 2))
            if self._sign() != seen:
                raise self._taken(holder)

    def _sign(self) -> tuple[int, bytes]:
        """Time of the last change, and the content; by opening the file, so that a network's file system looks."""
        with open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()

    def _live(self) -> None:
        """Show signs of life, and look whether another run has taken over, until the end."""
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):
                if self.path.read_text(encoding="utf-8") != self._text:
                    self._lost = True
                    return
                os.utime(self.path)

    def check(self) -> None:
        """Raise a TrainingError if another run has taken over, since this one was held up for longer than a minute."""
        if self._lost:
            raise TrainingError(
                f"--out {self.out} was taken over by another run while this one stood still; this one ends"
            )

    def release(self) -> None:
        """Give the lock back, and remove the folder if nothing is in it; whoever does not hold it does nothing."""
        self._end.set()
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._text and self.path.read_text(encoding="utf-8") == self._text:
                    self.path.unlink()  # while it is still held: nobody else's is removed
            _held.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _wrote(path: Path) -> bool:
    content = path.read_bytes()
    return not content or MARK in json.loads(content)


def _machine() -> str:
    """What tells this machine, as long as it runs, from others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _alive(process: int) -> bool:
    """Whether there is another process of this number on this machine."""
    if process == os.getpid():  # as in a container that was started anew
        return False
    if os.name == "nt":  # where there is no harmless signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
