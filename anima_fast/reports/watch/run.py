"""One run as the page shows it: every file of the output folder, and the state they show."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from anima_fast import __version__
from anima_fast.reports.reading import JsonFile, changed_at, moment, number
from anima_fast.reports.watch.log import ConsoleView, LogView
from anima_fast.reports.watch.pictures import Pictures

# File systems and the console log round their times.
_CLOCK_S = 2.0
# After a run writes how it ended, its last words come within this time.
_AFTERWORD_S = 30.0
# A run without any news for this long is called stalled. Loading and caching say little.
QUIET_S, QUIET_BEFORE_STEPS_S = 300.0, 900.0
# Slow steps get this many times their own length.
_QUIET_STEPS = 10
ENDED = {
    "finished": "The run is complete.",
    "interrupted": "The run was stopped and saved; the same command with --resume auto goes on.",
    "failed": "The run ended with an error",
}
# Last lines of a console log whose run ended while reading data and models: run.json says nothing.
_ERROR, _STOPPED = "error: ", "interrupted"


class WatchedRun:
    """The files of an output folder, which need not exist yet; `clock` gives seconds since 1970."""

    def __init__(self, out: str | os.PathLike, clock: Callable[[], float] = time.time) -> None:
        self.out = Path(out).absolute()
        self.clock = clock
        # Differs after a restart of the server, which starts its tokens over.
        self.session = secrets.token_hex(4)
        self.log = LogView(self.out / "log.jsonl")
        self.run_file = JsonFile(self.out / "run.json")
        self.dataset_file = JsonFile(self.out / "dataset.json")
        self.pictures = Pictures(self.out)
        self.console = ConsoleView(self.out / "console.log")
        self._lock = threading.Lock()

    def answer(self, known: Mapping[str, str]) -> dict[str, Any]:
        """Everything that changed since the answer with the tokens `known`, as JSON holds it."""
        with self._lock:
            self.run_file.refresh()
            self.dataset_file.refresh()
            self.log.refresh()
            self.pictures.refresh()
            self.console.refresh()
            run = self.run_file.value or {}
            log, started = self.log, moment(run.get("started_at"))
            is_new = self.next_run_prepares()
            if is_new:
                # What is known about the previous run says nothing about this one.
                run, log, started = {}, LogView(self.log.tail.path), self.console.began()
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
                    says=self.console.last_words(),
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
        """Whether `run.json` and the log are still those of the previous run.

        A run moves the console log of the previous one aside when it begins, but writes `run.json`
        and its own log only when data and models are read.
        """
        began = self.console.began()
        started = moment((self.run_file.value or {}).get("started_at"))
        if began is None or (started is not None and began <= started + _CLOCK_S):
            return False
        logged = changed_at(self.log.tail.path)
        return logged is not None and logged < began - _CLOCK_S

    def _goes_on(self) -> bool:
        """Whether the console says more since `run.json` was written: an ended run is resumed.

        Both times are the files': all files of a copied folder may be new.
        """
        wrote, said = changed_at(self.run_file.path), changed_at(self.console.tail.path)
        return wrote is not None and said is not None and said > wrote + _AFTERWORD_S

    def _parts(
        self,
        run: Mapping[str, Any],
        log: LogView,
        started: float | None,
        log_key: str,
        known: Mapping[str, str],
    ) -> dict[str, Any]:
        """What is sent only when it changed, and the tokens that show that."""
        tokens = {
            "session": self.session,
            "log": log_key,
            # The last row may still change.
            "row": str(max(0, len(log.steps) - 1)),
            "marks": f"{log_key}.{log.marks}",
            "pictures": f"{self.pictures.version}.{log_key}.{log.marks}.{self.run_file.version}",
            "console": self.console.key,
            "line": str(self.console.count),
            "dataset": str(self.dataset_file.version),
        }
        first = _whole(known.get("row")) if known.get("log") == log_key else 0
        follows = known.get("console") == tokens["console"]
        parts: dict[str, Any] = {
            "tokens": tokens,
            "log": log.steps.answer(first),
            "console": self.console.answer(_whole(known.get("line")) if follows else 0),
        }
        if known.get("marks") != tokens["marks"]:
            parts["marks"] = log.marks_answer()
        if known.get("pictures") != tokens["pictures"]:
            since = None if number(run.get("first_step")) else started
            parts["pictures"] = answer = self.pictures.answer()
            for picture in answer["pictures"]:
                picture |= _place(picture, log, since)
        if known.get("dataset") != tokens["dataset"]:
            parts["dataset"] = self.dataset_file.value
        return parts

    def _updated_at(self, run: Mapping[str, Any]) -> float | None:
        """When the run ended, or last wrote something, in seconds since 1970."""
        ended = moment(run.get("updated_at")) if str(run.get("state")) in ENDED else None
        if ended is not None and not self._goes_on():
            return ended
        files = (self.run_file.path, self.console.tail.path, self.log.tail.path)
        times = [moment(run.get("updated_at")), *map(changed_at, files)]
        times += [one.time for one in self.pictures.found[-1:]]
        return max((t for t in times if t is not None), default=None)


def _place(picture: Mapping[str, Any], log: LogView, since: float | None) -> dict[str, Any]:
    """When a picture was made: from the log, else from its name and time.

    `earlier` pictures are older than the run, which began at `since`.
    """
    named = picture.get("step"), picture.get("epoch")
    step, epoch = log.previews.get(picture["name"], named)
    if step is None and epoch is not None:
        step = log.epoch_end(epoch)
    earlier = since is not None and picture["time"] < since - _CLOCK_S
    return {"step": step, "epoch": epoch, "earlier": earlier}


def _whole(text: str | None) -> int:
    """A row or line number from a URL; 0 for anything else."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else 0


def describe_state(
    run: Mapping[str, Any],
    *,
    step: float | None,
    step_s: float | None,
    quiet_s: float | None,
    says: str | None = None,
    goes_on: bool = False,
) -> dict[str, str]:
    """`name` (for the badge) and `text` (a sentence) of a run.

    run: `run.json`, empty when there is none. step, step_s: the last one in the log, and seconds
    per step. quiet_s: seconds since the run last wrote anything. says: the last line of the console
    log. goes_on: whether an ended run writes again.
    """
    said = str(run.get("state"))
    if said in ENDED and goes_on:
        step = None
    elif said == "failed":
        return _failed(run.get("error"))
    elif said in ENDED:
        return {"name": said, "text": ENDED[said]}
    if says is not None and says.startswith(_ERROR):
        return _failed(says.removeprefix(_ERROR))
    if says == _STOPPED:
        return {"name": "interrupted", "text": "The run was stopped before it made a step."}
    if not run and step is None and says is None:
        return {"name": "waiting", "text": "No run has written here yet."}
    limit = QUIET_S if step is not None else QUIET_BEFORE_STEPS_S
    if quiet_s is not None and quiet_s > max(limit, _QUIET_STEPS * (step_s or 0.0)):
        minutes = int(quiet_s // 60)
        silent = f"No update for {f'{minutes} min' if minutes < 120 else f'{minutes // 60} h'}"
        if not run:
            return {"name": "ended", "text": f"{silent}, and no run.json that says why."}
        text = f"{silent}: it hangs, or was killed. Its console may say more."
        return {"name": "stalled", "text": text}
    if step is None:
        return {"name": "preparing", "text": "Reading data and models; no step was made yet."}
    return {"name": "running", "text": "Training."}


def _failed(error: object) -> dict[str, str]:
    reason = f": {error}" if error else "."
    return {"name": "failed", "text": f"{ENDED['failed']}{reason}"}
