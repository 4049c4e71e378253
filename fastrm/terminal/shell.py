"""Runs a command, and copes with closed or limited streams, and a missing home or current folder."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fastrm.errors import Stopped, TrainingError, UsageError
from fastrm.files import home, temporary
from fastrm.machine.memory import exhausted, shortage

_ASCII = {"±": "+-", "…": "..."}
_CLOSED = 128 + 13  # as a shell shows SIGPIPE


def run(main: Callable[[], object]) -> NoReturn:
    """Run an entry point. A usage error ends it with one line and status 2, a failed training with status 1.

    If the reader of its standard output is gone, it ends silently, like other programs by SIGPIPE.
    """
    stdout = sys.stdout
    try:
        if stdout is not None:
            sys.stdout = _Output(stdout)
        status = _status(main)
        if stdout is not None:
            sys.stdout.flush()
    except _OutputLostError as lost:
        status = _CLOSED if lost.errno == errno.EPIPE else _complain(f"error: {lost}", 1)
    finally:
        sys.stdout = stdout
    sys.exit(status)


def _status(main: Callable[[], object]) -> Any:
    try:
        _prepare()
        main()
    except SystemExit as stop:
        return stop.code
    except UsageError as error:
        return _complain(f"error: {error}", 2)
    except Stopped as stop:
        return _complain(str(stop), stop.status)
    except TrainingError as error:
        return _complain(f"error: {error}", 1)
    except (MemoryError, RuntimeError, OSError) as error:
        if not exhausted(error):
            raise
        return _complain(f"error: {shortage(error)}", 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    return 0


def _complain(message: str, status: int) -> int:
    """Print the error if standard error is open, and return the status."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:  # print(file=None) would write to standard output
            print(message, file=sys.stderr, flush=True)
    return status


def _prepare() -> None:
    """Replace closed streams and a missing home folder.

    Raises:
        UsageError: the current folder does not exist.
    """
    # Otherwise the next opened file would get the number of a closed stream, and receive printed output.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    codecs.register_error("fastrm", _spelled)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="fastrm")
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(f"the current folder cannot be used: {error.strerror}; cd to one that exists") from None
    _lend_home()


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """The replacement for characters that the encoding of a stream does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    kept = (_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(kept), error.end


def _lend_home() -> None:
    """Set a user name and a home folder for the caches of libraries, if the user has none, as in many containers."""
    if not hasattr(os, "getuid"):
        return
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", str(os.getuid()))
    own = home()
    if own is None:
        os.environ["HOME"] = str(temporary())
    elif not os.access(own, os.W_OK) and not (own / ".triton").exists():
        os.environ.setdefault("TRITON_HOME", str(temporary()))


def _to_nowhere(stream: Any) -> None:
    """Discard the buffer of a stream and everything written to it later."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


class _OutputLostError(Exception):
    """Standard output cannot be written. Not an OSError, because commands attribute those to their files."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output cannot be written: {error.strerror or error}")
        self.errno = error.errno


class _Output:
    """Standard output, or its replacement."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, and return its length."""
        try:
            self.stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Write the buffer."""
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        _to_nowhere(self.stream)
        raise _OutputLostError(error) from None


class _Screen(_Output):
    def _lose(self, error: OSError) -> None:
        _to_nowhere(self.stream)
        _complain(f"notice: {_OutputLostError(error)}; the run continues, and logs to its folder", 0)


def screen() -> Any:
    """Standard output for a run, which continues with a notice if the output can no longer be written."""
    return None if sys.stdout is None else _Screen(getattr(sys.stdout, "stream", sys.stdout))
