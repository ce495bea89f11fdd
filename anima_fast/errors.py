"""The one exception that users see.

Everything a user can cause (a wrong path, a wrong option, a damaged file, a missing package) is
raised as `UserError`; the command line prints it as one line and exits with status 2. Any other
exception is a defect of the program and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input: the message says what was expected, what was found and the remedy, in one line."""


def reason(error: BaseException) -> str:
    """The message of an exception on one line of at most 300 characters, else its class."""
    return " ".join(str(error).split())[:300] or type(error).__name__
