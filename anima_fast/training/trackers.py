"""Trackers that get a run's scalars next to `log.jsonl`: TensorBoard and Weights & Biases."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anima_fast.errors import UserError
from anima_fast.files import disk_error, parse_config, read_text

if TYPE_CHECKING:
    from anima_fast.options.output import LogOptions

PROJECT = "network_train"


class Tracker(NamedTuple):
    """`record` takes scalars by name and their step, `close` finishes and flushes."""

    record: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def open_trackers(output: Path, options: LogOptions) -> list[Tracker]:
    """The trackers of `--log_with`; TensorBoard when only `--logging_dir` is given."""
    chosen = options.log_with or ("tensorboard" if options.logging_dir else None)
    if chosen is None:
        return []
    base = Path(options.logging_dir) if options.logging_dir else output / "logs"
    stamp = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
    folder = base / f"{options.log_prefix or ''}{stamp}"
    arguments = {}
    if file := options.log_tracker_config:
        what = "--log_tracker_config"
        try:
            arguments = parse_config(read_text(file, what), f"{what} {file}")
        except UserError as error:
            raise UserError(f"{error}; give tables named tensorboard or wandb") from None
    names = TRACKERS if chosen == "all" else (chosen,)
    return [TRACKERS[name](options, folder, arguments.get(name, {})) for name in names]


def _tensorboard(options: LogOptions, folder: Path, arguments: Mapping[str, Any]) -> Tracker:
    """Event files in `LOGGING_DIR/PREFIXyyyymmddHHMMSS/PROJECT`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    folder /= options.log_tracker_name or PROJECT
    try:
        writer = SummaryWriter(str(folder), **arguments)
    except OSError as error:
        raise disk_error(error, folder) from error
    if options.log_config:
        text = json.dumps(public_options(options), indent=1, default=str)
        writer.add_text("options", f"```\n{text}\n```")

    def record(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(record, writer.close)


def _wandb(options: LogOptions, folder: Path, arguments: Mapping[str, Any]) -> Tracker:
    """A run of Weights & Biases."""
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    if options.wandb_api_key:
        wandb.login(key=options.wandb_api_key)
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "project": options.log_tracker_name or PROJECT,
        "name": options.wandb_run_name,
        "dir": str(folder),
        "config": public_options(options) if options.log_config else None,
    }
    run = wandb.init(**{**defaults, **arguments})
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _missing(name: str) -> UserError:
    return UserError(f'--log_with {name} needs the package: pip install "anima-fast[{name}]"')


def public_options(options: LogOptions) -> dict[str, Any]:
    """The options of the run by name, without secrets."""
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if not field.metadata.get("secret")
    }
