"""Live progress at the console: a rich display on a terminal, plain lines everywhere else.

`Bars` is the display, `ItemProgress` counts items at a rate, `Progress` shows a training run.
Nothing in a run's display can stop it: when the console breaks (closed pipe, characters it cannot
show), the display is switched off with one warning in the log and training goes on.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from anima_fast.console import ConsoleLog, safe_console

logger = logging.getLogger("anima_fast")
SMOOTHING = 0.9
# Seconds between two lines where no bar can be drawn.
PLAIN_SECONDS = 30.0
PLAIN_LINES = 10


class Bars:
    """Live bars, one for each title, gone at the end; nothing where stderr is not a terminal.

    `columns` follow title, bar and count.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        self.live = sys.stderr.isatty()
        self._bars: dict[str, TaskID] = {}
        self._display = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns,
            console=safe_console(), transient=True, disable=not self.live,
        )  # fmt: skip

    def __enter__(self) -> Bars:
        self._try(self._display.start)
        return self

    def __exit__(self, *_: object) -> None:
        # Older Rich ends a display that is disabled with an empty line.
        self._try(self._display.stop)

    def show(self, title: str, done: int, total: int | None) -> None:
        """Move the bar of this title to `done` of `total` (None: unknown), adding it first."""
        if title not in self._bars:
            self._bars[title] = self._display.add_task(title, total=total)
        self._try(self._display.update, self._bars[title], completed=done)

    def _try(self, action: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Draw; a terminal that is gone takes no more bars."""
        if not self.live:
            return
        try:
            action(*args, **kwargs)
        except OSError:
            self.live = False


class ItemProgress:
    """Counts finished items; tells the rate at the end, even when interrupted.

    Args:
        title: what is done, as in "encoding images".
        total: how many items there are.
        unit: what an item is called, in the plural.
        say: gets a line at the end, and twice a minute where no bar can be drawn.
    """

    def __init__(self, title: str, total: int, unit: str, say: Callable[[str], None]) -> None:
        self._title, self._total, self._unit, self._say = title, total, unit, say
        self._done = 0
        self._bars = Bars(_Rate(unit), TimeRemainingColumn())

    def __enter__(self) -> ItemProgress:
        self._started = self._last_line = time.monotonic()
        self._bars.__enter__()
        self._bars.show(self._title, 0, self._total)
        return self

    def advance(self, count: int) -> None:
        """`count` more items are done and written."""
        self._done += count
        self._bars.show(self._title, self._done, self._total)
        if not self._bars.live and time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._say(f"{self._title}: {self._done}/{self._total} ({self._rate()})")

    def __exit__(self, *_: object) -> None:
        self._bars.__exit__()
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


class Progress:
    """Steps, losses and speed of a run on the console (stderr), a context manager.

    `simple` writes plain lines on a terminal too; `log` is a file that gets them as well.
    """

    def __init__(
        self, *, simple: bool = False, console: Console | None = None, log: ConsoleLog | None = None
    ) -> None:
        self.log = log
        self.console = safe_console(console)
        self.live = self.console.is_terminal and not simple
        self.first = self.total = 0
        self.step_s: float | None = None
        self._display: RichProgress | None = None
        self._bar = TaskID(0)
        self._broken = False
        self._last_line = float("-inf")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._try(self._display.stop)
        self._display = None

    def say(self, text: str) -> None:
        """Print a message, above the live display if there is one."""
        self._try(self._print, text)
        if self.log is not None:
            self.log.write(text)

    def start(self, step: int, total: int) -> None:
        """Begin to count steps at `step` of `total`."""
        self.first, self.total = step, total
        if self.live:
            self._try(self._start_display)

    def step(self, record: Mapping[str, Any]) -> None:
        """Show an optimizer step.

        Args:
            record: `step`, `epoch`, `loss_avg` (or `loss`), `lr` (a rate per group name), `step_s`
                (seconds of this step), `images_per_s`, `memory_mib`; absent ones are left out.
        """
        step, seconds = record["step"], record.get("step_s")
        # The first step of a run compiles, allocates and reads: it says nothing about the rest.
        if seconds is not None and step > self.first + 1:
            known = self.step_s if self.step_s is not None else seconds
            self.step_s = SMOOTHING * known + (1 - SMOOTHING) * seconds
        text = describe(record, self.step_s, self.total)
        if self._display is not None:
            self._try(self._display.update, self._bar, completed=step, facts=text)
        if self._is_due(step):
            self._last_line = time.monotonic()
            if self._display is None:
                self._try(self._print, f"step {step}/{self.total} | {text}")
            if self.log is not None:
                self.log.write(f"step {step}/{self.total} | {text}")

    def _start_display(self) -> None:
        """A bar, the step, and the facts of `describe`, cut where the terminal is narrow."""
        facts = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._display = RichProgress(
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False, table_column=facts),
            console=self.console,
            expand=True,
            refresh_per_second=4,
        )
        self._bar = self._display.add_task(
            "", total=self.total, completed=self.first, facts="starting"
        )
        self._display.start()

    def _is_due(self, step: int) -> bool:
        """Plain lines: the first and the last step, every tenth of the run, and twice a minute."""
        every = max(1, (self.total - self.first) // PLAIN_LINES)
        return (
            step in (self.first + 1, self.total)
            or (step - self.first) % every == 0
            or time.monotonic() - self._last_line >= PLAIN_SECONDS
        )

    def _print(self, text: str) -> None:
        if self.live:
            self.console.print(text, markup=False, highlight=False)
            return
        file = self.console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        # A Windows console with an old code page cannot show every character of a file name.
        print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)

    def _try(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call a display function; when it fails, switch the display off for good."""
        if self._broken:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:
            self._broken = True
            logger.warning("the progress display is off: %s", error)
            if self._display is not None:
                # Give the terminal back, if it still takes anything.
                with contextlib.suppress(Exception):
                    self._display.stop()
            self._display = None


def describe(record: Mapping[str, Any], step_s: float | None, total: int) -> str:
    """One line with epoch, smoothed loss, time left, rate, speed and memory, as far as known.

    `record` is that of `Progress.step`, `step_s` smoothed seconds per step, `total` all steps.
    """
    seconds = step_s if step_s is not None else record.get("step_s")
    left = seconds * max(0, total - record["step"]) if seconds is not None and total else None
    rates = (record.get("lr") or {}).values()
    memory = record.get("memory_mib")
    facts = (
        (record.get("epoch"), "epoch {}"),
        (record.get("loss_avg", record.get("loss")), "loss {:.4f}"),
        (None if left is None else clock(left), "{} left"),
        ("/".join(dict.fromkeys(f"{rate:.3g}" for rate in rates)) or None, "lr {}"),
        (seconds, "{:.2f} s/step"),
        (record.get("images_per_s"), "{:.2f} images/s"),
        (None if memory is None else memory / 1024, "{:.1f} GiB"),
    )
    return " | ".join(text.format(value) for value, text in facts if value is not None)


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`, or `m:ss` below an hour."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
