"""The one exception that users see.

Everything a user can cause (a wrong path, a wrong option, a damaged file, a missing package) is
raised as `UserError`; the command line prints it as one line and exits with its status. Any other
exception is a defect of the program and keeps its traceback.
"""

import signal


class UserError(ValueError):
    """Bad input: the message says what was expected, what was found and the remedy, in one line.

    `status` is the exit status: 2 for what is refused before any work, 3 where training failed.
    """

    status = 2


class Stopped(KeyboardInterrupt):
    """A signal ends the program with nothing to save."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = stop_status(number)


def stop_status(number: int) -> int:
    """The exit status of a run that a signal ended: 130 for Ctrl-C, 143 for every other."""
    return 130 if number == signal.SIGINT else 143


def reason(error: BaseException) -> str:
    """The message of an exception on one line of at most 300 characters, else its class."""
    return " ".join(str(error).split())[:300] or type(error).__name__
