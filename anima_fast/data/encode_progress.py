"""Progress of an encoding phase: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Seconds between two lines where no bar can be drawn.
_LINE_EVERY_S = 30.0


class EncodeProgress:
    """Counts finished items; tells the rate at the end, also when the phase was interrupted."""

    def __init__(self, title: str, total: int, unit: str, say: Callable[[str], None]) -> None:
        self._title, self._total, self._unit, self._say = title, total, unit, say
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> EncodeProgress:
        self._started = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                _Rate(self._unit), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        """`count` more items are done and written."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(f"{self._title}: {self._done}/{self._total} ({self._rate()})")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._say(f"{self._title}: {self._done} of {self._total} ({self._rate()})")

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-6)
        return f"{self._done / elapsed:.2f} {self._unit}/s"


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0.0:.2f} {self._unit}/s")
