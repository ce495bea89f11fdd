"""What `log.jsonl` and `console.log` say, read as they grow."""

from __future__ import annotations

import os
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anima_fast.reports.reading import Tail, changed_at, log_record, moment, number, open_shared
from anima_fast.reports.watch.curves import CurveTable

# Of one call: parsing this much takes well under a second.
BYTES_AT_ONCE = 8 << 20
MOST_EVENTS = 500
MOST_EPOCH_MARKS = 2000
MOST_PREVIEW_FILES = 20_000
MOST_BINS = 100
# Steps whose median is the speed now.
_RECENT = 50
_SCALARS = ("loss", "loss_avg", "grad_norm", "step_s", "images_per_s", "memory_mib")
_GROUPS = ("lr", "d_lr", "max_norm")
# Of a console log: read at once, and kept.
CONSOLE_BYTES = 256 << 10
CONSOLE_LINES = 1000


class LogView:
    """The records of a log as curves, marks and the newest values."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.tail = Tail(path)
        self.clear()

    def clear(self) -> None:
        """Forget everything: the log started over."""
        self.steps = CurveTable()
        self.validation = CurveTable()
        self.events: deque[dict] = deque(maxlen=MOST_EVENTS)
        self.epochs: deque[tuple[float, float]] = deque(maxlen=MOST_EPOCH_MARKS)
        self.previews: dict[str, tuple[float, float | None]] = {}
        # The first and the last record.
        self.sigma_bins: list[dict] = []
        self.last: dict[str, Any] = {}
        self.not_finite = 0
        # Counts the records that are not steps.
        self.marks = 0
        self._seconds: deque[float] = deque(maxlen=_RECENT)

    def refresh(self) -> None:
        """Read what was added, at most `BYTES_AT_ONCE`; `tail.behind` says if there is more."""
        lines = self.tail.read(BYTES_AT_ONCE)
        if self.tail.restarted:
            self.clear()
        for line in lines:
            if (record := log_record(line)) is not None:
                self._take(record)

    @property
    def key(self) -> str:
        """Changes when the rows sent before are no longer at the same places."""
        return f"{self.tail.generation}.{self.steps.stride}"

    @property
    def step_s(self) -> float | None:
        """Median seconds of the newest steps; None before there is one."""
        return statistics.median(self._seconds) if self._seconds else None

    def epoch_end(self, epoch: float) -> float | None:
        """The step at which an epoch ended, if the log says so."""
        return next((step for step, ended in self.epochs if ended == epoch), None)

    def marks_answer(self) -> dict[str, Any]:
        """Validation, epochs, events and loss over sigma, as JSON holds them."""
        return {
            "validation": self.validation.answer(),
            "epochs": [list(mark) for mark in self.epochs],
            "events": list(self.events),
            "sigma_bins": self.sigma_bins,
        }

    def _take(self, record: Mapping) -> None:
        step, epoch, kind = record["step"], number(record.get("epoch")), record.get("kind")
        self.marks += kind != "step"
        if kind == "step":
            self._take_step(step, epoch, record)
        elif kind == "epoch" and epoch is not None:
            self.epochs.append((step, epoch))
        elif kind == "validation":
            values = {name: number(record.get(name)) for name in ("loss", "divergence")}
            self.validation.add(step, values | _table(record, "per_sigma", "sigma"), epoch)
        elif kind == "preview":
            files = record.get("files")
            for file in files if isinstance(files, list) else ():
                if isinstance(file, str) and len(self.previews) < MOST_PREVIEW_FILES:
                    name = file.replace("\\", "/").rsplit("/", 1)[-1]
                    self.previews[name] = (step, epoch)
        elif kind == "event":
            self.events.append({"step": step, "text": str(record.get("text", ""))[:2000]})
        elif kind == "sigma_bins":
            bins = {"step": step, "epoch": epoch, **_lists(record, ("means", "counts"))}
            self.sigma_bins = [*self.sigma_bins[:1], bins]

    def _take_step(self, step: float, epoch: float | None, record: Mapping) -> None:
        values = {name: number(record[name]) for name in _SCALARS if name in record}
        for group in _GROUPS:
            values |= _table(record, group, group)
        if not self.steps.add(step, values, epoch):
            return
        self.not_finite += "loss" in values and values["loss"] is None
        seconds = values.get("step_s")
        # The first step of a run compiles, allocates and reads: it says nothing about the rest.
        if seconds is not None and self.last:
            self._seconds.append(seconds)
        self.last = {"step": step, "epoch": epoch, "values": values}


def _table(record: Mapping, name: str, label: str) -> dict[str, float | None]:
    """The entries of a table in a record as `LABEL/KEY`."""
    entries = record.get(name)
    if not isinstance(entries, dict):
        return {}
    return {f"{label}/{key}": number(value) for key, value in entries.items()}


def _lists(record: Mapping, names: Iterable[str]) -> dict[str, list[float | None]]:
    lists = {name: record[name] for name in names if isinstance(record.get(name), list)}
    return {name: [number(v) for v in values[:MOST_BINS]] for name, values in lists.items()}


class ConsoleView:
    """The newest lines of a console log, each of which begins with its time."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.tail = Tail(path)
        self.lines: deque[str] = deque(maxlen=CONSOLE_LINES)
        # Of all lines read, including those no longer kept.
        self.count = 0
        # The times on the first and the last line, in some time zone.
        self._times: tuple[float, float] | None = None

    @property
    def key(self) -> str:
        """Changes when the file starts over."""
        return str(self.tail.generation)

    def refresh(self) -> None:
        """Read what was added; of a long file only the end."""
        lines = self.tail.read(CONSOLE_BYTES, start_at_end=True)
        if self.tail.restarted:
            self.lines.clear()
            self.count, self._times = 0, None
        self.lines.extend(line.decode("utf-8", "replace") for line in lines)
        self.count += len(lines)
        times = (moment(line[:19].decode("ascii", "replace")) for line in reversed(lines))
        last = next((time for time in times if time is not None), None)
        if last is not None:
            first = self._times[0] if self._times else _first_moment(self.tail.path)
            self._times = (last if first is None else first, last)

    def began(self) -> float | None:
        """When the first line was written, in seconds since 1970.

        The file says when the last line was written, the lines only how much earlier the first
        one was: they may come from a container or a machine in another time zone.
        """
        written = changed_at(self.tail.path)
        if written is None or self._times is None:
            return None
        first, last = self._times
        return written - max(0.0, last - first)

    def last_words(self) -> str | None:
        """The last line without its time."""
        if not self.lines:
            return None
        line = self.lines[-1]
        return line if moment(line[:19]) is None else line[20:]

    def answer(self, seen: int) -> dict[str, Any]:
        """The lines after the first `seen`; `first` is the number of the first one sent."""
        fresh = min(len(self.lines), max(0, self.count - seen))
        lines = list(self.lines)[len(self.lines) - fresh :]
        return {"first": self.count - fresh, "lines": lines}


def _first_moment(path: Path) -> float | None:
    """The time at the beginning of a console log, in seconds since 1970."""
    try:
        with open_shared(path) as file:
            return moment(file.read(19).decode("ascii"))
    except (OSError, ValueError):
        return None
