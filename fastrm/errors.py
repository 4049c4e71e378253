"""The one kind of error that is the user's to mend."""


class UsageError(ValueError):
    """A setting, a file or a data set is wrong; the message names it, its value and what would be right.

    The command line prints the message alone and ends with status 2.
    """


class TrainingError(RuntimeError):
    """A run cannot go on through no fault of its settings; the message says what happened and what is kept.

    The command line prints the message alone and ends with status 1.
    """


class Stopped(TrainingError):
    """A run ended because it was asked to, and has saved; ``status`` is what the shell expects of that signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line; its kind where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
