"""Errors that the command line prints in one line."""


class UsageError(ValueError):
    """A setting, a file or a data set is wrong. The message names it, its value and what is right.

    The command line prints the message alone and ends with status 2.
    """


class TrainingError(RuntimeError):
    """A run cannot continue, for reasons other than its settings. The message says what happened and what is kept.

    The command line prints the message alone and ends with status 1.
    """


class Stopped(TrainingError):
    """A run ended on request after saving; ``status`` is the exit status of that signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    """The message of an exception in one line; its type if there is no message."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
