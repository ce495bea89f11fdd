"""Messages for the person at the console: level, file and colours."""

from __future__ import annotations

import logging
from pathlib import Path

from anima_fast.files import disk_error

LOGGER = "anima_fast"


def configure_console(
    level: str = "INFO", file: str | None = None, *, simple: bool = False
) -> logging.Logger:
    """Set up and return the package's logger.

    Args:
        level: the least important level shown.
        file: also append messages to this file, with the time.
        simple: plain lines on stderr instead of rich ones.
    Raises:
        UserError: when the file cannot be written.
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
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_time=False, show_path=False)


def _file_handler(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise disk_error(error, path) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler
