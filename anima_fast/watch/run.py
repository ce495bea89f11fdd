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
from anima_fast.watch.log import LogView
from anima_fast.watch.pictures import Picture, Pictures
from anima_fast.watch.reading import JsonFile, changed_at, moment, number
from anima_fast.watch.state import describe_state
from anima_fast.watch.tail import Tail

CONSOLE_BYTES = 256 << 10
CONSOLE_LINES = 1000
# The log of the run before counts as such when it is older than the start by more than this: file
# systems round times.
_CLOCK_S = 2.0


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
            hidden = self.log_is_older(run)
            same = known if known.get("session") == self.session else {}
            parts = self._parts(run, hidden, same)
            updated = self._updated_at(run, hidden)
            last = {} if hidden else self.log.last
            return {
                "version": __version__,
                "out": str(self.out),
                "folder_exists": self.out.is_dir(),
                "now": self.clock(),
                "run": run,
                "state": describe_state(
                    run,
                    step=last.get("step"),
                    step_s=self.log.step_s,
                    quiet_s=None if updated is None else max(0.0, self.clock() - updated),
                    says_something=bool(self.console_lines),
                ),
                "updated_at": updated,
                "started_at": moment(run.get("started_at")),
                "last": last,
                "step_s": None if hidden else self.log.step_s,
                "not_finite": 0 if hidden else self.log.not_finite,
                "behind": self.log.tail.behind,
                "read": self.log.tail.position / max(1, self.log.tail.size),
                **parts,
            }

    def log_is_older(self, run: Mapping[str, Any]) -> bool:
        """Whether the log is that of the run before: a fresh one keeps it until its first step."""
        started, written = moment(run.get("started_at")), changed_at(self.log.tail.path)
        if run.get("state") != "running" or number(run.get("first_step")) != 0:
            return False
        return started is not None and written is not None and written < started - _CLOCK_S

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
        self.console_lines.extend(line.decode("utf-8", "replace") for line in lines)
        self.console_count += len(lines)

    def _parts(
        self, run: Mapping[str, Any], hidden: bool, known: Mapping[str, str]
    ) -> dict[str, Any]:
        """What is sent only when it changed, and the tokens that tell."""
        log = LogView(self.log.tail.path) if hidden else self.log
        log_key = f"{log.key}.{int(hidden)}"
        tokens = {
            "session": self.session,
            "log": log_key,
            # The last row may still change.
            "row": str(max(0, len(log.steps) - 1)),
            "marks": f"{log_key}.{log.marks}",
            "pictures": f"{self.pictures.version}.{log.marks}.{self.run_file.version}",
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
            parts["pictures"] = self.pictures.answer(
                lambda one, facts: self._place(one, facts, run)
            )
        if known.get("dataset") != tokens["dataset"] or "dataset" not in known:
            parts["dataset"] = self.dataset_file.value
        return parts

    def _console_answer(self, seen: int) -> dict[str, Any]:
        """The lines after the first `seen`; `first` is the number of the first one sent."""
        fresh = min(len(self.console_lines), max(0, self.console_count - seen))
        lines = list(self.console_lines)[len(self.console_lines) - fresh :]
        return {"first": self.console_count - fresh, "lines": lines}

    def _place(self, one: Picture, facts: Mapping[str, Any], run: Mapping[str, Any]) -> dict:
        """When a picture was made: the log's word, else what its name and time tell."""
        step, epoch = self.log.previews.get(one.name, (facts.get("step"), facts.get("epoch")))
        if step is None and epoch is not None:
            step = self.log.epoch_end(epoch)
        started = moment(run.get("started_at"))
        is_fresh = not number(run.get("first_step"))
        earlier = is_fresh and started is not None and one.time < started - _CLOCK_S
        return {"step": step, "epoch": epoch, "earlier": earlier}

    def _updated_at(self, run: Mapping[str, Any], hidden: bool) -> float | None:
        """When the run last wrote something, in seconds since 1970."""
        files = [self.run_file.path, self.console.path]
        files += [] if hidden else [self.log.tail.path]
        times = [moment(run.get("updated_at")), *map(changed_at, files)]
        times += [one.time for one in self.pictures.found[-1:]]
        return max((t for t in times if t is not None), default=None)


def _whole(text: str | None) -> int:
    """A row or line number from a URL; 0 for anything else."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else 0
