"""One run as the page shows it: every file of the output folder, and what follows from them."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast import __version__
from anima_fast.reports.reading import JsonFile, Tail, changed_at, moment, number, open_shared
from anima_fast.reports.watch.log import LogView
from anima_fast.reports.watch.pictures import Picture, Pictures
from anima_fast.reports.watch.state import ENDED, describe_state

CONSOLE_BYTES = 256 << 10
CONSOLE_LINES = 1000
# File systems and the console log round times.
_CLOCK_S = 2.0
# What a run still says after it wrote how it ended comes within this time.
_AFTERWORD_S = 30.0


class WatchedRun:
    """The files of an output folder, which need not exist yet.

    Args:
        out: the folder.
        clock: seconds since 1970.
    """

    def __init__(self, out: str | os.PathLike, clock: Any = time.time) -> None:
        self.out = Path(out).absolute()
        self.clock = clock
        # Differs after a restart of the server, whose tokens begin anew.
        self.session = secrets.token_hex(4)
        self.log = LogView(self.out / "log.jsonl")
        self.run_file = JsonFile(self.out / "run.json")
        self.dataset_file = JsonFile(self.out / "dataset.json")
        self.pictures = Pictures(self.out)
        self.console = Tail(self.out / "console.log")
        self.console_lines: deque[str] = deque(maxlen=CONSOLE_LINES)
        self.console_count = 0
        # The times on the first and the last line of the console log, in some time zone.
        self._console_times: tuple[float, float] | None = None
        self._console_generation = 0
        self._lock = threading.Lock()

    def answer(self, known: Mapping[str, str]) -> dict[str, Any]:
        """Everything that changed, as JSON holds it.

        Args:
            known: `tokens` of the answer before; with none of them the answer is whole.
        """
        with self._lock:
            self._refresh()
            run = self.run_file.value or {}
            log, started = self.log, moment(run.get("started_at"))
            is_new = self.next_run_prepares()
            if is_new:
                # What is known of the run before says nothing about this one.
                run, log, started = {}, LogView(self.log.tail.path), self.console_began()
            same = known if known.get("session") == self.session else {}
            updated = self._updated_at(run)
            return {
                "version": __version__,
                "out": str(self.out),
                "folder_exists": self.out.is_dir(),
                "now": self.clock(),
                "run": run,
                "state": describe_state(
                    run,
                    step=log.last.get("step"),
                    step_s=log.step_s,
                    quiet_s=None if updated is None else max(0.0, self.clock() - updated),
                    says=self._last_words(),
                    goes_on=self._goes_on(),
                ),
                "updated_at": updated,
                "started_at": started,
                "last": log.last,
                "step_s": log.step_s,
                "not_finite": log.not_finite,
                "behind": log.tail.behind,
                "read": log.tail.position / max(1, log.tail.size),
                **self._parts(run, log, started, f"{log.key}.{int(is_new)}", same),
            }

    def next_run_prepares(self) -> bool:
        """Whether `run.json` and the log are still those of the run before.

        A run moves the console log of the one before aside when it begins, but writes `run.json`
        and its own log only when data and models are read.
        """
        began = self.console_began()
        started = moment((self.run_file.value or {}).get("started_at"))
        if began is None or (started is not None and began <= started + _CLOCK_S):
            return False
        logged = changed_at(self.log.tail.path)
        return logged is not None and logged < began - _CLOCK_S

    def console_began(self) -> float | None:
        """When the first line of the console log was written, in seconds since 1970.

        The file tells when the last line was written, the lines only how long before that the
        first one was: they may be of a container or a machine in another time zone.
        """
        written = changed_at(self.console.path)
        if written is None or self._console_times is None:
            return None
        first, last = self._console_times
        return written - max(0.0, last - first)

    def _last_words(self) -> str | None:
        """The last line of the console log without its time."""
        if not self.console_lines:
            return None
        line = self.console_lines[-1]
        return line if moment(line[:19]) is None else line[20:]

    def _goes_on(self) -> bool:
        """Whether the console says more since `run.json` was written: an ended run is resumed.

        Both times are the files': all files of a copied folder may be new.
        """
        wrote, said = changed_at(self.run_file.path), changed_at(self.console.path)
        return wrote is not None and said is not None and said > wrote + _AFTERWORD_S

    def _refresh(self) -> None:
        self.run_file.refresh()
        self.dataset_file.refresh()
        self.log.refresh()
        self.pictures.refresh()
        lines = self.console.read(CONSOLE_BYTES, start_at_end=True)
        if self.console.generation != self._console_generation:
            self._console_generation = self.console.generation
            self.console_lines.clear()
            self.console_count = 0
            self._console_times = None
        self.console_lines.extend(line.decode("utf-8", "replace") for line in lines)
        times = (moment(line[:19].decode("ascii", "replace")) for line in reversed(lines))
        last = next((time for time in times if time is not None), None)
        if last is not None:
            known = self._console_times
            first = known[0] if known else first_moment(self.console.path)
            self._console_times = (last if first is None else first, last)
        self.console_count += len(lines)

    def _parts(
        self,
        run: Mapping[str, Any],
        log: LogView,
        started: float | None,
        log_key: str,
        known: Mapping[str, str],
    ) -> dict[str, Any]:
        """What is sent only when it changed, and the tokens that tell."""
        tokens = {
            "session": self.session,
            "log": log_key,
            # The last row may still change.
            "row": str(max(0, len(log.steps) - 1)),
            "marks": f"{log_key}.{log.marks}",
            "pictures": f"{self.pictures.version}.{log_key}.{log.marks}.{self.run_file.version}",
            "console": str(self._console_generation),
            "line": str(self.console_count),
            "dataset": str(self.dataset_file.version),
        }
        first = _whole(known.get("row")) if known.get("log") == log_key else 0
        follows = known.get("console") == tokens["console"]
        parts: dict[str, Any] = {
            "tokens": tokens,
            "log": log.steps.answer(first),
            "console": self._console_answer(_whole(known.get("line")) if follows else 0),
        }
        if known.get("marks") != tokens["marks"]:
            parts["marks"] = log.marks_answer()
        if known.get("pictures") != tokens["pictures"]:
            since = None if number(run.get("first_step")) else started
            parts["pictures"] = self.pictures.answer(
                lambda one, facts: _place(one, facts, log, since)
            )
        if known.get("dataset") != tokens["dataset"]:
            parts["dataset"] = self.dataset_file.value
        return parts

    def _console_answer(self, seen: int) -> dict[str, Any]:
        """The lines after the first `seen`; `first` is the number of the first one sent."""
        fresh = min(len(self.console_lines), max(0, self.console_count - seen))
        lines = list(self.console_lines)[len(self.console_lines) - fresh :]
        return {"first": self.console_count - fresh, "lines": lines}

    def _updated_at(self, run: Mapping[str, Any]) -> float | None:
        """When the run ended, or last wrote something, in seconds since 1970."""
        ended = moment(run.get("updated_at")) if str(run.get("state")) in ENDED else None
        if ended is not None and not self._goes_on():
            return ended
        files = (self.run_file.path, self.console.path, self.log.tail.path)
        times = [moment(run.get("updated_at")), *map(changed_at, files)]
        times += [one.time for one in self.pictures.found[-1:]]
        return max((t for t in times if t is not None), default=None)


def first_moment(path: Path) -> float | None:
    """The time at the beginning of a console log, in seconds since 1970."""
    try:
        with open_shared(path) as file:
            return moment(file.read(19).decode("ascii"))
    except (OSError, ValueError):
        return None


def _place(
    one: Picture, facts: Mapping[str, Any], log: LogView, since: float | None
) -> dict[str, Any]:
    """When a picture was made: the log's word, else what its name and time tell.

    `earlier` ones were there before the run began at `since`.
    """
    step, epoch = log.previews.get(one.name, (facts.get("step"), facts.get("epoch")))
    if step is None and epoch is not None:
        step = log.epoch_end(epoch)
    earlier = since is not None and one.time < since - _CLOCK_S
    return {"step": step, "epoch": epoch, "earlier": earlier}


def _whole(text: str | None) -> int:
    """A row or line number from a URL; 0 for anything else."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else 0
