"""What a run writes about itself: `log.jsonl` and `run.json`; TensorBoard and wandb if asked for.

Each line of `log.jsonl` is one JSON object with `kind` and `step`; a number that is not finite is
null. Kinds: start (`precision` and `sums`; again when a run resumes); step; epoch; validation
(`loss`, `divergence`, `per_sigma`); sigma_bins (`means` and `counts` of the training loss in ten
bins of sigma); preview (`files`); event (`text`: what changed the way the run continues). The file
never holds the same step twice: when a run resumes, the lines after the resumed step are dropped
first.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from anima_fast import __version__
from anima_fast.console import describe_error
from anima_fast.errors import Stopped, UserError
from anima_fast.files import disk_error, write_json, write_text
from anima_fast.training.kind import given
from anima_fast.training.trackers import open_trackers

if TYPE_CHECKING:
    from anima_fast.options.output import LogOptions
    from anima_fast.training.run import Run, TrainResult


# Of these a step may have several.
REPEATED = ("start", "event")


class RunLog:
    """The log of one run, a context manager.

    Args:
        folder: the output folder.
        options: of trackers.
        first_step: steps already made; 0 for a fresh run, which moves an older log aside to
            `log.previous.jsonl`.

    Raises:
        UserError: a tracker's package is missing, or the folder cannot be written.
    """

    def __init__(self, folder: Path, options: LogOptions, *, first_step: int = 0) -> None:
        self.path = folder / "log.jsonl"
        self._written: set[tuple[str, int]] = set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if first_step:
                self._keep_until(first_step)
            elif self.path.exists():
                os.replace(self.path, self.path.with_name("log.previous.jsonl"))
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise disk_error(error, self.path) from error
        try:
            self.trackers = open_trackers(folder, options)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for tracker in self.trackers:
            tracker.close()

    def start(self, step: int, precision: str, sums: str) -> None:
        """Log in which arithmetic the run goes on after `step` steps."""
        self._write("start", step, {"precision": precision, "sums": sums}, {})

    def step(self, record: Mapping[str, Any]) -> None:
        """Log an optimizer step.

        Args:
            record: `step`, `epoch`, `loss`, `loss_avg`, `lr` (a rate per group name) and anything
                else that JSON holds; `d_lr` (effective rates of adaptive optimizers) and `max_norm`
                (keys_scaled, average_key_norm, max_key_norm) go to the trackers too.
        """
        scalars = {"loss/current": record.get("loss"), "loss/average": record.get("loss_avg")}
        scalars |= {f"lr/{name}": rate for name, rate in record.get("lr", {}).items()}
        scalars |= {f"lr/d*lr/{name}": rate for name, rate in record.get("d_lr", {}).items()}
        scalars |= {f"max_norm/{name}": v for name, v in record.get("max_norm", {}).items()}
        self._write("step", record["step"], record, scalars)

    def epoch(self, step: int, epoch: int, loss_average: float | None) -> None:
        """Log the end of an epoch (counted from 1) after `step` steps."""
        record = {"epoch": epoch, "loss_avg": loss_average}
        self._write("epoch", step, record, {"loss/epoch_average": loss_average})

    def validation(
        self,
        step: int,
        epoch: int,
        loss: float,
        loss_average: float | None = None,
        per_sigma: Mapping[str, float] | None = None,
        *,
        per: str = "epoch",
    ) -> None:
        """Log a validation loss; its divergence is the distance from the training average.

        per_sigma: the loss at each noise level. per: step or epoch, whichever it is due by.
        """
        divergence = None if loss_average is None else loss - loss_average
        record: dict[str, Any] = {"epoch": epoch, "loss": loss, "divergence": divergence}
        record |= {"per_sigma": dict(per_sigma)} if per_sigma else {}
        scalars = {
            f"loss/validation/{per}_average": loss,
            f"loss/validation/{per}_divergence": divergence,
            **{f"loss/validation/sigma_{s}": value for s, value in (per_sigma or {}).items()},
        }
        self._write("validation", step, record, scalars)

    def sigma_bins(self, step: int, epoch: int, bins: Mapping[str, list]) -> None:
        """Log the mean training loss by noise level since the last time."""
        self._write("sigma_bins", step, {"epoch": epoch, **bins}, {})

    def preview(self, step: int, epoch: int, files: list[str]) -> None:
        """Log pictures, named relative to the output folder."""
        self._write("preview", step, {"epoch": epoch, "files": files}, {})

    def event(self, step: int, text: str) -> None:
        """Log something that changed the way the run continues."""
        self._write("event", step, {"text": text}, {})

    def _write(
        self, kind: str, step: int, record: Mapping, scalars: Mapping[str, float | None]
    ) -> None:
        # The end of an epoch comes again when a run resumes from a state saved just there.
        if kind not in REPEATED and (kind, step) in self._written:
            return
        self._written.add((kind, step))
        line = json.dumps(_finite({"kind": kind, "step": step, **record}), allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self.path) from error
        known = {name: value for name, value in scalars.items() if value is not None}
        for tracker in self.trackers:
            tracker.record(known, step)

    def _keep_until(self, last_step: int) -> None:
        """Drop the lines after `last_step`, and one that a kill cut off."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                kind, step = record["kind"], record["step"]
            except (ValueError, KeyError, TypeError):
                continue
            if step <= last_step and (kind in REPEATED or (kind, step) not in self._written):
                self._written.add((kind, step))
                kept.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in kept))


class RunFile:
    """`OUT/run.json`: what runs, and how it ended; a context manager around the steps.

    `anima-fast watch` reads it; training itself never does. If the disk refuses it, the run goes on
    without it.

    Keys: version, run (as in the run's states and files), output_name, method, pid, started_at and
    updated_at (seconds since 1970), state (running, finished, interrupted or failed), first_step,
    steps, epochs, batches_per_epoch, images, device, precision (no, fp16 or bf16), sums (short or
    full), base_model, final (the file, or null), error (a text, or null).
    """

    def __init__(self, run: Run, first_step: int) -> None:
        options, length = run.options, run.length
        self.path = run.folder / "run.json"
        now = time.time()
        self.facts: dict[str, Any] = {
            "version": __version__,
            "run": run.id,
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
            "precision": options.mixed_precision,
            "sums": run.training.arithmetic.sums,
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
        if isinstance(error, Stopped):
            self.facts |= {"state": "failed", "error": "stopped without saving"}
        elif error is not None:
            self.facts |= {"state": "failed", "error": describe_error(error)}
        self.facts["updated_at"] = time.time()
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(UserError):
            write_json(self.path, self.facts)


def _finite(value: Any) -> Any:
    """The value with every number that is not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
