"""What a run tells other programs in a plain file next to `log.jsonl`: `run.json`.

`anima-fast watch` reads it; training itself never does. If the disk refuses it, the run goes on
without it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from anima_fast import __version__
from anima_fast.console import describe_error
from anima_fast.errors import UserError
from anima_fast.files import write_json
from anima_fast.training.checks import given

if TYPE_CHECKING:
    from anima_fast.training.run import Run, TrainResult

RUN_FILE = "run.json"


class RunFile:
    """`OUT/run.json`: what runs, and how it ended; a context manager around the steps.

    Keys: version, output_name, method, pid, started_at and updated_at (seconds since 1970), state
    (running, finished, interrupted or failed), first_step, steps, epochs, batches_per_epoch,
    images, device, base_model, final (the file, or null), error (a text, or null).
    """

    def __init__(self, run: Run, first_step: int) -> None:
        options, length = run.options, run.length
        self.path = run.folder / RUN_FILE
        now = time.time()
        self.facts: dict[str, Any] = {
            "version": __version__,
            "output_name": options.output_stem,
            "method": run.training.name,
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
            "base_model": Path(given(options.pretrained_model_name_or_path)).name,
            "final": None,
            "error": None,
        }

    def __enter__(self) -> RunFile:
        self._write()
        return self

    def finish(self, result: TrainResult) -> None:
        """Record how the run ended, by itself or by a signal."""
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
