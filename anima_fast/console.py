"""Messages for the person at the console: level, file and colours."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from anima_fast.errors import UserError
from anima_fast.files import disk_error

if TYPE_CHECKING:
    from rich.console import Console

LOGGER = "anima_fast"


def configure_console(
    level: str = "INFO", file: str | None = None, *, simple: bool = False
) -> logging.Logger:
    """Set up and return the package's logger, which shows messages of `level` and above.

    `file` gets them too, with the time; `simple` means plain lines on stderr instead of rich ones.
    """
    logger = logging.getLogger(LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    logger.propagate = False
    logger.addHandler(_plain_handler() if simple else _rich_handler())
    if file:
        logger.addHandler(_file_handler(Path(file)))
    return logger


def one_line(text: object) -> str:
    """A text as one line without control characters, which a file could send to the terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return handler


def _rich_handler() -> logging.Handler:
    from rich.logging import RichHandler

    return RichHandler(console=safe_console(), show_time=False, show_path=False)


def safe_console(console: Console | None = None) -> Console:
    """A console (Rich's on stderr) that raises `OSError` when its pipe is closed.

    Rich would end the program.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    console.on_broken_pipe = _closed  # type: ignore[method-assign]
    return console


def _closed() -> None:
    raise BrokenPipeError("the console is closed")


def _file_handler(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, path) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


CONSOLE_FILE = "console.log"


def describe_error(error: BaseException) -> str:
    """What went wrong, on one line; with its type unless it is a message for users."""
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


class ConsoleLog:
    """The lines that the console shows, each with its time, in `OUT/console.log`.

    A context manager: an error that ends a run becomes the last line, if the run has written any.

    Without a folder nothing is written. A `fresh` run, which does not resume, moves an older file
    to `console.previous.log`.
    """

    def __init__(self, folder: str | None, *, fresh: bool = True) -> None:
        self.path = Path(folder) / CONSOLE_FILE if folder else None
        if self.path is not None and fresh:
            with contextlib.suppress(OSError):
                os.replace(self.path, self.path.with_name("console.previous.log"))

    def __enter__(self) -> ConsoleLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None or self.path is None or not self.path.is_file():
            return
        if isinstance(error, Exception):
            self.write(f"error: {describe_error(error)}")
        else:
            self.write("interrupted")

    def write(self, text: str) -> None:
        """Append a line. The file is closed again, so that others may move it on Windows too."""
        if self.path is None:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="replace") as file:
                file.write(f"{stamp} {' '.join(text.splitlines())}\n")
