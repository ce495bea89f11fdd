"""`anima-fast import-kohya`: from a source to TOML files that `train` or `finetune` reads."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
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

# Trainer -> its title and what fills a ledger from its source.
TRAINERS: dict[str, tuple[str, Callable[[Source, Ledger], str]]] = {
    "sd-scripts": ("sd-scripts", sd_scripts.convert),
    "kohya-gui": ("kohya_ss' GUI", sd_scripts.convert),
    "diffusion-pipe": ("diffusion-pipe", diffusion_pipe.convert),
    "onetrainer": ("OneTrainer", onetrainer.convert),
}


@dataclass(frozen=True)
class Imported:
    """A converted source: the `command` here and the ledger."""

    source: Source
    command: str
    ledger: Ledger


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
            for item in read_arguments(source.launch.arguments, ledger).values():
                ledger.drop("not needed here, where a config is read and its keys listed", item.key)
    try:
        command = TRAINERS[source.trainer][1](source, ledger)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # A text where a table belongs, and the like: no trainer would read such a file.
        name = source.file.name if source.file else "the command line"
        raise UserError(
            f"{name} has a value of a kind that nobody expects there: {error}"
        ) from error
    ledger.close()
    ledger.todo += _todo(source, ledger, command)
    return Imported(source, command, ledger)


def _todo(source: Source, ledger: Ledger, command: str) -> Iterator[str]:
    """What a run still needs."""
    options, known = ledger.options, specs(CLASSES[command])
    for name in REQUIRED:
        if not options.get(name):
            yield f"write {name} into the file: {known[name].help}"
    data = ledger.dataset or any(map(options.get, ("dataset_config", "train_data_dir", "in_json")))
    if not data and not any("dataset_config" in text for text in ledger.todo):
        yield "write dataset_config into the file: the source names no data"
    for variable in source.unset:
        names = [n for n, value in options.items() if variable in variable_names(str(value))]
        if names:
            why = f"${variable} is of your shell, and the text does not say its value"
            yield f"{', '.join(names)}: {why}"


def _targets(imported: Imported, out: Path | None, force: bool) -> tuple[Path, Path | None]:
    """The file of the options, and that of the dataset if there is one."""
    source, out = imported.source.file, out or Path(".")
    name = str(
        imported.ledger.options.get("output_name") or (source.stem if source else "imported")
    )
    stem = "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ")
    target = out if out.suffix == ".toml" else out / f"{stem or 'imported'}_anima.toml"
    target = Path(os.path.abspath(target))
    data = target.with_name(f"{target.stem}_dataset.toml") if imported.ledger.dataset else None
    for path in filter(None, (target, data)):
        if source is not None and path.exists() and path.samefile(source):
            raise UserError(f"{path} is the source itself: choose another file with --out")
        if path.exists() and not force:
            raise UserError(f"{path} exists: give --force to overwrite it, or --out FILE.toml")
    return target, data


def _texts(imported: Imported, target: Path, data: Path | None) -> dict[Path, str]:
    """The files and what is in them, the options first."""
    source, ledger, texts = imported.source, imported.ledger, {}
    trainer = TRAINERS[source.trainer][0]
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
