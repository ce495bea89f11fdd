"""What a run tells others through plain files beside `log.jsonl`: `run.json` and `console.log`.

`anima-fast watch` and whoever else likes reads them; nothing reads them back here. A disk that
refuses them is no reason to stop: the run goes on without.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from anima_fast import __version__
from anima_fast.errors import UserError
from anima_fast.files import write_json

if TYPE_CHECKING:
    from anima_fast.training.loop import TrainResult
    from anima_fast.training.setup import Run

RUN_FILE = "run.json"
CONSOLE_FILE = "console.log"


def describe_error(error: BaseException) -> str:
    """What went wrong, on one line; the kind too where it is no message for users."""
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


class ConsoleLog:
    """The lines that the console shows, each with its time, in `OUT/console.log`.

    A context manager: what ends the run early is the last line of a run that has said something.

    Args:
        folder: the output folder; None writes nothing.
        fresh: a run that does not resume moves an older file to `console.previous.log`.
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


class RunFile:
    """`OUT/run.json`: what runs, and how it ended; a context manager around the steps.

    Keys: version, output_name, method, pid, started_at and updated_at (seconds since 1970), state
    (running, finished, interrupted or failed), first_step, steps, epochs, batches_per_epoch,
    images, device, base_model, final (the file, or null), error (a text, or null).
    """

    def __init__(self, run: Run, first_step: int) -> None:
        options, length = run.options, run.length
        self.path = Path(options.output_dir) / RUN_FILE
        now = time.time()
        self.facts: dict[str, Any] = {
            "version": __version__,
            "output_name": options.output_stem,
            "method": options.about[0],
            "pid": os.getpid(),
            "started_at": now,
            "updated_at": now,
            "state": "running",
            "first_step": first_step,
            "steps": length.steps,
            "epochs": length.epochs,
            "batches_per_epoch": length.batches_per_epoch,
            "images": len(run.plan.items),
            "device": str(run.device),
            "base_model": Path(options.pretrained_model_name_or_path).name,
            "final": None,
            "error": None,
        }

    def __enter__(self) -> RunFile:
        self._write()
        return self

    def finish(self, result: TrainResult) -> None:
        """How the run ended, when it ended by itself or by a signal."""
        state = "interrupted" if result.interrupted_by else "finished"
        self.facts |= {"state": state, "final": result.output.name}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None:
            self.facts |= {"state": "failed", "error": describe_error(error)}
        self.facts["updated_at"] = time.time()
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(UserError):
            write_json(self.path, self.facts)
