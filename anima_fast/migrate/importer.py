"""`anima-fast import-kohya`: from a source to TOML files that `train` or `finetune` reads."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anima_fast import __version__
from anima_fast.errors import UserError
from anima_fast.files import write_text
from anima_fast.migrate import diffusion_pipe, onetrainer, sd_scripts
from anima_fast.migrate.command import read_arguments
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.rows import CLASSES
from anima_fast.migrate.shell import variable_names
from anima_fast.migrate.source import Source, open_source
from anima_fast.migrate.write import dataset_text, list_lines, options_text
from anima_fast.options.declare import specs
from anima_fast.options.files import resolve_train_options
from anima_fast.options.rules import REQUIRED

TITLES = {
    "sd-scripts": "sd-scripts", "kohya-gui": "kohya_ss' GUI", "diffusion-pipe": "diffusion-pipe",
    "onetrainer": "OneTrainer",
}  # fmt: skip
_CONVERTERS: dict[str, Callable[[Source, Ledger], str]] = {
    "sd-scripts": sd_scripts.convert, "kohya-gui": sd_scripts.convert,
    "diffusion-pipe": diffusion_pipe.convert, "onetrainer": onetrainer.convert,
}  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """A converted source: the `command` here, the ledger, and a name for the files."""

    source: Source
    command: str
    ledger: Ledger
    name: str


def import_config(
    text: str | tuple[str, ...],
    out: Path | None = None,
    *,
    folder: Path | None = None,
    force: bool = False,
    say: Callable[[str], object] = print,
) -> list[Path]:
    """Convert a source and write the files.

    Args:
        text: a command line, the path of a file, or `-`; see `open_source`.
        out: the TOML file to write, or a folder for it (default: the current one).
        folder: where the other trainer was started, for relative paths.
        force: overwrite files.
        say: called with each line for the user.
    Returns:
        the written files, the options first.
    Raises:
        UserError: what cannot be read or converted, and files that exist. Nothing is written then.
    """
    imported = convert(open_source(text, folder))
    texts = _texts(imported, *_targets(imported, out, force))
    target = next(iter(texts))
    _check(imported, texts[target])
    # The options come last: they name the dataset file.
    for path, content in reversed(texts.items()):
        write_text(path, content)
    wrote = [f"wrote {path}" for path in texts]
    start = f"start it with: {_start(imported.command, target)}"
    for line in [*list_lines(imported.ledger), "", *wrote, start]:
        say(line)
    return list(texts)


def convert(source: Source) -> Imported:
    """A source as options; see `Ledger` for what is in it."""
    ledger = Ledger()
    if source.launch is not None:
        source.launch.settle(ledger)
        if source.trainer in ("diffusion-pipe", "onetrainer"):
            for item in read_arguments(source.launch.arguments, ledger):
                ledger.drop(item.key, "not needed here, where a config is read and its keys listed")
    try:
        command = _CONVERTERS[source.trainer](source, ledger)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # A text where a table belongs, and the like: no trainer would read such a file.
        name = source.file.name if source.file else "the command line"
        raise UserError(
            f"{name} has a value of a kind that nobody expects there: {error}"
        ) from error
    ledger.close()
    _todo(source, ledger, command)
    name = ledger.options.get("output_name") or (source.file.stem if source.file else "imported")
    return Imported(source, command, ledger, str(name))


def _todo(source: Source, ledger: Ledger, command: str) -> None:
    """What a run still needs."""
    cls = CLASSES[command]
    for name in REQUIRED:
        if not ledger.options.get(name):
            ledger.todo.append(f"write {name} into the file: {specs(cls)[name].help}")
    data = ("dataset_config", "train_data_dir", "in_json")
    named = ledger.dataset is not None or any(ledger.options.get(name) for name in data)
    if not named and not any("dataset_config" in text for text in ledger.todo):
        ledger.todo.append("write dataset_config into the file: the source names no data")
    for variable in source.unset:
        names = [n for n, v in ledger.options.items() if variable in variable_names(str(v))]
        if names:
            ledger.todo.append(
                f"{', '.join(names)}: ${variable} is of your shell, and the text does not say its "
                "value"
            )


def _targets(imported: Imported, out: Path | None, force: bool) -> tuple[Path, Path | None]:
    """The file of the options, and that of the dataset if there is one."""
    stem = "".join(c if c.isalnum() or c in "-_. " else "_" for c in imported.name).strip(". ")
    out = out or Path(".")
    target = out if out.suffix == ".toml" else out / f"{stem or 'imported'}_anima.toml"
    target = Path(os.path.abspath(target))
    data = target.with_name(f"{target.stem}_dataset.toml") if imported.ledger.dataset else None
    source = imported.source.file
    for path in filter(None, (target, data)):
        if source is not None and path.exists() and path.samefile(source):
            raise UserError(f"{path} is the source itself: choose another file with --out")
        if path.exists() and not force:
            raise UserError(f"{path} exists: give --force to overwrite it, or --out FILE.toml")
    return target, data


def _texts(imported: Imported, target: Path, data: Path | None) -> dict[Path, str]:
    """The files and what is in them, the options first."""
    source, ledger, texts = imported.source, imported.ledger, {}
    trainer = TITLES[source.trainer]
    if data is not None:
        ledger.options["dataset_config"] = str(data)
    origin = source.file.name if source.file else "a command line"
    head = [f"Imported from {trainer} ({origin}) by anima_fast {__version__}."]
    head.append(f"Start: {_start(imported.command, target)}")
    texts[target] = options_text(ledger, CLASSES[imported.command], head)
    if data is not None:
        head = [f"Imported from {trainer}; {target.name} names this file."]
        texts[data] = dataset_text(ledger.dataset or {}, head)
    return texts


def _start(command: str, target: Path) -> str:
    words = ["anima-fast", command, "--config_file", str(target)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _check(imported: Imported, text: str) -> None:
    """The written options must be ones that the command accepts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "imported.toml"
        path.write_text(text, encoding="utf-8")
        try:
            resolve_train_options({}, path, complete=False, cls=CLASSES[imported.command])
        except UserError as error:
            why = str(error).removeprefix("imported.toml: ")
            raise UserError(f"the settings do not work together: {why}") from None
