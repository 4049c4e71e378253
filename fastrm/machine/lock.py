"""The lock of a run folder: it names its holder, and is released when the holder's process ends.

The system's lock (``flock``) comes first. A file system may have none, or hide it from other machines; therefore the
file also names the holder, and its modification time is renewed every few seconds as a sign of life.
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
"""Seconds without a sign of life after which a lock of another machine, or one without ``flock``, is free."""
SETTLE = 0.5
"""Seconds to wait without ``flock``; then the process that wrote last has the lock."""
_MISSING = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EIO, errno.EREMOTE}
_held: set[int] = set()  # file descriptors


def _forget() -> None:
    """Close the lock in a forked process, such as a loader's, so that it does not outlive the run's process."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Lock:
    """The lock of a run folder.

    Args:
        out: the folder. It is created, and removed at the end if it is empty.
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
        if holder and not (self._guarded and holder["machine"] == _machine()):  # otherwise the system has released it
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
        """A descriptor of the file, and whether the system holds a lock on it."""
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
            os.close(descriptor)  # its holder has removed it: this is no longer the file of that name

    def _holder(self) -> dict[str, Any]:
        """The holder according to the file; empty if it names none."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return found if found.keys() >= {MARK, "host", "process", "machine", "since"} else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _taken(self, holder: dict[str, Any]) -> UsageError:
        who = "process {process} on {host} since {since}".format(**holder) if holder else "another process"
        return UsageError(f"--out {self.out} is in use by {who}; wait until it has ended, or give another --out")

    def _wait_for_silence(self, holder: dict[str, Any]) -> None:
        """Return if the holder is gone. For another machine, this takes some time to see."""
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
        """Modification time and content; the file is opened, so that a network file system refreshes them."""
        with open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()

    def _live(self) -> None:
        """Until the end, show signs of life and check whether another run has taken over."""
        while not self._end.wait(BEAT):
            with contextlib.suppress(OSError):
                if self.path.read_text(encoding="utf-8") != self._text:
                    self._lost = True
                    return
                os.utime(self.path)

    def check(self) -> None:
        """Raise a TrainingError if another run has taken over, because this one was suspended for more than a
        minute."""
        if self._lost:
            raise TrainingError(
                f"--out {self.out} was taken over by another run while this one was suspended; this one ends"
            )

    def release(self) -> None:
        """Release the lock, and remove the folder if it is empty; does nothing without the lock."""
        self._end.set()
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if self._text and self.path.read_text(encoding="utf-8") == self._text:
                    self.path.unlink()  # while the lock is still held, so that nobody else's file is removed
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
    """An identifier of this machine until its next start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _alive(process: int) -> bool:
    """Whether there is another process with this id on this machine."""
    if process == os.getpid():  # as in a container that was restarted
        return False
    if os.name == "nt":  # which has no harmless signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
