"""Errors that the command line prints in one line."""

from textwrap import shorten


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
    """The message of an exception in one line; its type if there is no message.

    The second line belongs to a first one such as "Error(s) in loading state_dict for Net:".
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return shorten(" ".join(lines[:2]), 300, placeholder=" …") if lines[0].endswith(":") else lines[0]
