"""What `log.jsonl` says, read as it grows."""

from __future__ import annotations

import os
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from anima_fast.reports.reading import Tail, log_record, number
from anima_fast.reports.watch.curves import CurveTable

# Of one call: parsing that much takes well below a second.
BYTES_AT_ONCE = 8 << 20
MOST_EVENTS = 500
MOST_EPOCH_MARKS = 2000
MOST_PREVIEW_FILES = 20_000
MOST_BINS = 100
# Steps whose median is the speed now.
_RECENT = 50
_SCALARS = ("loss", "loss_avg", "grad_norm", "step_s", "images_per_s", "memory_mib")
_GROUPS = ("lr", "d_lr", "max_norm")


class LogView:
    """The records of a log as curves, marks and the newest values."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.tail = Tail(path)
        self.clear()

    def clear(self) -> None:
        """Forget everything, as the log began anew."""
        self.steps = CurveTable()
        self.validation = CurveTable()
        self.events: deque[dict] = deque(maxlen=MOST_EVENTS)
        self.epochs: deque[tuple[float, float]] = deque(maxlen=MOST_EPOCH_MARKS)
        self.previews: dict[str, tuple[float, float | None]] = {}
        # The first and the last record.
        self.sigma_bins: list[dict] = []
        self.last: dict[str, Any] = {}
        self.not_finite = 0
        # Counts the records that are no steps.
        self.marks = 0
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._generation = self.tail.generation

    def refresh(self) -> None:
        """Read what was added, at most `BYTES_AT_ONCE`; `tail.behind` tells whether more waits."""
        lines = self.tail.read(BYTES_AT_ONCE)
        if self.tail.generation != self._generation:
            self.clear()
        for line in lines:
            self._take(line)

    @property
    def key(self) -> str:
        """Changes when the rows sent before no longer stand at their places."""
        return f"{self._generation}.{self.steps.stride}"

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

    def _take(self, line: bytes) -> None:
        record = log_record(line)
        if record is None:
            return
        step = float(record["step"])
        step = int(step) if step.is_integer() else step
        kind = record.get("kind")
        if kind == "step":
            self._take_step(step, record)
            return
        take = {
            "epoch": self._take_epoch,
            "validation": self._take_validation,
            "preview": self._take_preview,
            "event": self._take_event,
            "sigma_bins": self._take_bins,
        }.get(str(kind))
        if take:
            self.marks += 1
            take(step, record)

    def _take_step(self, step: float, record: Mapping) -> None:
        values = {name: number(record.get(name)) for name in _SCALARS if name in record}
        for group in _GROUPS:
            rates = record.get(group)
            if isinstance(rates, dict):
                values |= {f"{group}/{name}": number(rate) for name, rate in rates.items()}
        epoch = number(record.get("epoch"))
        if not self.steps.add(step, values, epoch):
            return
        self.not_finite += "loss" in values and values["loss"] is None
        seconds = values.get("step_s")
        # The first step of a run compiles, allocates and reads: it says nothing about the rest.
        if seconds is not None and self.last:
            self._seconds.append(seconds)
        self.last = {"step": step, "epoch": epoch, "values": values}

    def _take_epoch(self, step: float, record: Mapping) -> None:
        epoch = number(record.get("epoch"))
        if epoch is not None:
            self.epochs.append((step, epoch))

    def _take_validation(self, step: float, record: Mapping) -> None:
        values = {name: number(record.get(name)) for name in ("loss", "divergence")}
        per_sigma = record.get("per_sigma")
        if isinstance(per_sigma, dict):
            values |= {f"sigma/{sigma}": number(loss) for sigma, loss in per_sigma.items()}
        self.validation.add(step, values, number(record.get("epoch")))

    def _take_preview(self, step: float, record: Mapping) -> None:
        files = record.get("files")
        for file in files if isinstance(files, list) else ():
            if isinstance(file, str) and len(self.previews) < MOST_PREVIEW_FILES:
                name = file.replace("\\", "/").rsplit("/", 1)[-1]
                self.previews[name] = (step, number(record.get("epoch")))

    def _take_event(self, step: float, record: Mapping) -> None:
        self.events.append({"step": step, "text": str(record.get("text", ""))[:2000]})

    def _take_bins(self, step: float, record: Mapping) -> None:
        lists = {name: record.get(name) for name in ("means", "counts")}
        bins = {
            name: [number(value) for value in values[:MOST_BINS]]
            for name, values in lists.items()
            if isinstance(values, list)
        }
        at = {"step": step, "epoch": number(record.get("epoch"))}
        self.sigma_bins = [*self.sigma_bins[:1], {**at, **bins}]
