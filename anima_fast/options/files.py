"""From command-line words and a TOML file to options, and from options back to TOML.

A value on the command line beats the file, the file beats the default. Sections of the file are
only for the reader: all keys are flattened. Names may be spelt with hyphens or underscores.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anima_fast.errors import UserError
from anima_fast.files import write_text
from anima_fast.options.declare import Spec, convert, nearest, specs
from anima_fast.options.finetune import network_options
from anima_fast.options.other_names import ALIASES, IGNORED, REFUSED
from anima_fast.options.rules import check_required
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.options.sample import SampleOptions

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

# What the command line and the file may name beside the fields of `TrainOptions`.
OTHER_NAMES = frozenset(itertools.chain(ALIASES, IGNORED, REFUSED))
RunOptions = TrainOptions | FinetuneOptions


def refused(cls: type[RunOptions]) -> dict[str, str]:
    """Names that a kind of training refuses, each with the reason and the remedy."""
    if cls is TrainOptions:
        return REFUSED
    known = specs(cls)
    return {n: text for n, text in REFUSED.items() if n not in known} | network_options()


def resolve_train_options(
    cli_values: Mapping[str, Any],
    config_file: str | Path | None = None,
    *,
    complete: bool = True,
    cls: type[RunOptions] = TrainOptions,
) -> tuple[RunOptions, list[str]]:
    """The options of a run from both sources.

    Args:
        cli_values: option name -> text, list of texts, or a value of the right type. The names of
            `option_groups.tables` are allowed too.
        config_file: a TOML file; `.toml` is appended where the ending is missing.
        complete: whether everything that a run needs must be there.
        cls: the options of a LoRA, or of full fine-tuning.
    Returns:
        the checked options and the notices to show.
    Raises:
        UserError: unknown, refused or missing options, wrong values, impossible combinations.
    """
    notices: list[str] = []
    values: dict[str, Any] = {}
    if config_file is not None:
        path = config_path(config_file)
        values = _accept(cls, read_config(path), f"{path.name}: ", notices, text=False)
    values |= _accept(cls, cli_values, "--", notices, text=True)
    if values.get("preset"):
        from anima_fast.options.presets import apply_presets

        below, lines = apply_presets(values["preset"], values, cls)
        values = below | values
        notices = [*lines, *notices]
    options = cls(**values)
    if complete:
        check_required(options)
    return options, [*notices, *options.notices]


def config_path(path: str | Path) -> Path:
    """The configuration file meant by `--config_file`, with `.toml` appended when missing."""
    path = Path(path)
    return path if path.suffix == ".toml" else path.with_name(path.name + ".toml")


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML file, sections flattened.

    Raises:
        UserError: a missing or unreadable file, invalid TOML, a key that stands in two sections.
    """
    try:
        parsed = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"--config_file {path} does not exist: check the path") from None
    except OSError as error:
        raise UserError(f"cannot read --config_file {path}: {error.strerror or error}") from error
    except ValueError as error:
        # Covers text that is not UTF-8 too.
        raise UserError(f"--config_file {path} is not valid TOML: {error}") from error
    flat: dict[str, Any] = {}
    _flatten(parsed, flat, path.name)
    return flat


def _flatten(table: Mapping[str, Any], flat: dict[str, Any], where: str) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            _flatten(value, flat, where)
            continue
        name = key.replace("-", "_")
        if name in flat:
            raise UserError(f"{where}: {key} stands in two sections: keep one of them")
        flat[name] = value


def _accept(
    cls: type[RunOptions], given: Mapping[str, Any], place: str, notices: list[str], *, text: bool
) -> dict[str, Any]:
    """Options of one source in their types; the other known names become notices or errors."""
    known = specs(cls)
    values = {
        name: convert(known[name], value, f"{place}{name}", text=text)
        for name, value in given.items()
        if name in known and value is not None
    }
    for name, value in given.items():
        if name not in known and value is not None and not _is_off(value):
            _other(cls, name, value, place, values, notices)
    return values


def _other(
    cls: type[RunOptions],
    name: str,
    value: Any,
    place: str,
    values: dict[str, Any],
    notices: list[str],
) -> None:
    known, reasons = specs(cls), refused(cls)
    if name in reasons:
        raise UserError(f"{place}{name}: {reasons[name]}")
    if name in IGNORED:
        notices.append(f"{name} is ignored: {IGNORED[name]}")
    elif name in ALIASES:
        alias = ALIASES[name]
        meant = value if alias.value is None else alias.value
        # The plain name beats the older spelling.
        values.setdefault(
            alias.target, convert(known[alias.target], meant, f"{place}{name}", text=True)
        )
    else:
        names = [*known, *ALIASES, *IGNORED, *reasons]
        raise UserError(f"{place}{name}: unknown option: {nearest(name, names)}")


def _is_off(value: Any) -> bool:
    """A table's option that is given but turned off, as configuration files of others have it."""
    if isinstance(value, str):
        return value.lower() in ("", "false", "no", "none", "0")
    return not value


def to_toml(options: Any, *, only_changed: bool = False) -> str:
    """Options as TOML, in a section for each help group; secrets are left out.

    Args:
        options: `TrainOptions` (or any class of options).
        only_changed: leave out what equals its default.
    """
    import tomli_w

    sections: dict[str, dict[str, Any]] = {}
    for name, spec in specs(type(options)).items():
        value = getattr(options, name)
        if value is None or spec.secret or (only_changed and value == spec.default):
            continue
        plain = list(value) if isinstance(value, tuple) else value
        sections.setdefault(section_name(spec), {})[name] = plain
    return tomli_w.dumps(sections)


def section_name(spec: Spec) -> str:
    """The TOML section of an option: its help group in small letters."""
    return "".join(c if c.isalnum() else "_" for c in spec.group.lower())


def write_config(options: RunOptions, config_file: str | Path | None) -> Path:
    """Write the changed options to the `--config_file` path, for `--output_config`.

    Raises:
        UserError: without a path, or when the file exists.
    """
    if config_file is None:
        raise UserError("--output_config needs --config_file FILE to know where to write")
    path = config_path(config_file)
    if path.exists():
        raise UserError(f"{path} exists: delete it or give another --config_file")
    write_text(path, to_toml(options, only_changed=True))
    return path


def option_table_markdown(cls: type = TrainOptions) -> str:
    """The documentation's table of options, by group; for `TrainOptions` the other names too."""
    lines: list[str] = []
    for group, members in itertools.groupby(specs(cls).values(), key=lambda spec: spec.group):
        lines += [f"### {group}", "", "| Option | Value | Default | Meaning |", "|---|---|---|---|"]
        lines += [_row(spec) for spec in members]
        lines.append("")
    if cls is TrainOptions:
        lines += _named("Other spellings", {n: f"`{a.target}`" for n, a in ALIASES.items()})
        lines += _named("Accepted without effect", IGNORED)
        lines += _named("Refused", REFUSED)
    return "\n".join(lines)


def finetune_table_markdown() -> str:
    """The options of full fine-tuning that LoRA training has not, and those it refuses."""
    shared = specs(TrainOptions)
    own = [
        spec
        for name, spec in specs(FinetuneOptions).items()
        if name not in shared or spec.default != shared[name].default
    ]
    lines = ["| Option | Value | Default | Meaning |", "|---|---|---|---|", *map(_row, own), ""]
    return "\n".join([*lines, *_named("Refused", network_options())])


def option_page() -> str:
    """`docs/options.md`: the tables with a heading and a sentence each."""
    return (
        "# Options\n\n"
        "Made from the code by `python -m anima_fast.options.files`; a test compares the two.\n\n"
        "## `anima-fast train`\n\n"
        "Underscores and hyphens mean the same, and every option is a key of the TOML file of "
        "`--config_file`.\n\n"
        f"{option_table_markdown()}\n"
        "## `anima-fast finetune`\n\n"
        "Trains all weights of the model. It has the options of `train` but those of the network, "
        "and these; a default that differs is shown.\n\n"
        f"{finetune_table_markdown()}\n"
        "## `anima-fast sample`\n\n"
        f"{option_table_markdown(SampleOptions)}"
    )


def _row(spec: Spec) -> str:
    default = "" if spec.default in (None, (), "") else f"`{spec.default}`"
    value = (spec.metavar or "flag").replace("|", "\\|")
    return f"| `--{spec.name}` | {value} | {default} | {spec.help.replace('|', chr(92) + '|')} |"


def _named(title: str, entries: Mapping[str, str]) -> list[str]:
    rows = [f"| `--{name}` | {text} |" for name, text in entries.items()]
    return [f"### {title}", "", "| Option | |", "|---|---|", *rows, ""]


if __name__ == "__main__":
    sys.stdout.write(option_page())
