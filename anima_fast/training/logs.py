"""What a run writes about itself: `log.jsonl` always, TensorBoard and wandb when asked for.

Each line of `log.jsonl` is one JSON object with `kind` and `step`; a number that is not finite is
null. Kinds: step; epoch; validation (`loss`, `divergence`, `per_sigma`); sigma_bins (`means` and
`counts` of the training loss in ten bins of sigma); preview (`files`); event (`text`: what changed
the way the run continues). The file never holds the same step twice: when a run resumes, the lines
after the resumed step are dropped first.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anima_fast.files import disk_error, write_text
from anima_fast.training.trackers import open_trackers

if TYPE_CHECKING:
    from anima_fast.options.output import LogOptions

LOG_FILE = "log.jsonl"


class RunLog:
    """The log of one run, a context manager.

    Args:
        folder: the output folder.
        options: of trackers.
        config: all options of the run, which trackers record with `log_config`.
        first_step: steps already made; 0 for a fresh run, which moves an older log aside to
            `log.previous.jsonl`.

    Raises:
        UserError: a tracker's package is missing, or the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        options: LogOptions,
        *,
        config: Mapping[str, Any],
        first_step: int = 0,
    ) -> None:
        self.path = folder / LOG_FILE
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
            self.trackers = open_trackers(folder, options, config)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

        Args:
            step, epoch: of the run.
            loss: of the validation images.
            loss_average: of training, if there is one.
            per_sigma: the loss at each noise level.
            per: step or epoch, whichever validation is due by.
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

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []

    def _write(
        self, kind: str, step: int, record: Mapping, scalars: Mapping[str, float | None]
    ) -> None:
        # The end of an epoch comes again when a run resumes from a state saved just there.
        # Events differ: a step may have several.
        if kind != "event" and (kind, step) in self._written:
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
            tracker.scalars(known, step)

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
            if step <= last_step and (kind == "event" or (kind, step) not in self._written):
                self._written.add((kind, step))
                kept.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in kept))


def _finite(value: Any) -> Any:
    """The value with every number that is not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
