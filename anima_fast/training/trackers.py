"""Trackers that get a run's scalars next to `log.jsonl`: TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from anima_fast.errors import UserError
from anima_fast.files import disk_error, parse_config, read_text

if TYPE_CHECKING:
    from anima_fast.options.output import LogOptions
    from anima_fast.options.run import FinetuneOptions, TrainOptions

Config = Mapping[str, Any]
PROJECT = "network_train"


class Tracker(Protocol):
    """A place for scalars by name."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""

    def close(self) -> None:
        """Finish and flush."""


def open_trackers(output: Path, options: LogOptions, config: Config) -> list[Tracker]:
    """The trackers of `--log_with`; TensorBoard when only `--logging_dir` is given."""
    chosen = options.log_with or ("tensorboard" if options.logging_dir else None)
    if chosen is None:
        return []
    base = Path(options.logging_dir) if options.logging_dir else output / "logs"
    stamp = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
    folder = base / f"{options.log_prefix or ''}{stamp}"
    extra = _tracker_arguments(options)
    trackers: list[Tracker] = []
    if chosen in ("tensorboard", "all"):
        trackers.append(TensorBoard(options, config, folder, extra.get("tensorboard", {})))
    if chosen in ("wandb", "all"):
        trackers.append(Wandb(options, config, folder, extra.get("wandb", {})))
    return trackers


class TensorBoard:
    """Event files in `LOGGING_DIR/PREFIXyyyymmddHHMMSS/PROJECT`."""

    def __init__(
        self, options: LogOptions, config: Config, folder: Path, arguments: Config
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                '--log_with tensorboard needs the package: pip install "anima-fast[tensorboard]"'
            ) from error
        folder = folder / (options.log_tracker_name or PROJECT)
        try:
            self.writer = SummaryWriter(str(folder), **arguments)
        except OSError as error:
            raise disk_error(error, folder) from error
        if options.log_config:
            text = json.dumps(config, indent=1, default=str)
            self.writer.add_text("options", f"```\n{text}\n```")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish and flush."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(
        self, options: LogOptions, config: Config, folder: Path, arguments: Config
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                '--log_with wandb needs the package: pip install "anima-fast[wandb]"'
            ) from error
        if options.wandb_api_key:
            wandb.login(key=options.wandb_api_key)
        folder.mkdir(parents=True, exist_ok=True)
        defaults = {
            "project": options.log_tracker_name or PROJECT,
            "name": options.wandb_run_name,
            "dir": str(folder),
            "config": config if options.log_config else None,
        }
        self.run = wandb.init(**{**defaults, **arguments})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of a step."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish and flush."""
        self.run.finish()


def public_options(options: TrainOptions | FinetuneOptions) -> dict[str, Any]:
    """The options by name, without secrets."""
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if not field.metadata.get("secret")
    }


def _tracker_arguments(options: LogOptions) -> dict[str, dict]:
    """`--log_tracker_config`: a TOML file with a table per tracker."""
    if not options.log_tracker_config:
        return {}
    what, path = "--log_tracker_config", options.log_tracker_config
    try:
        return parse_config(read_text(path, what), f"{what} {path}")
    except UserError as error:
        raise UserError(f"{error}; give tables named tensorboard or wandb") from None
