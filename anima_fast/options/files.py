"""From command-line words and a TOML file to options, and from options back to TOML.

A value on the command line beats the file, the file beats the default. Sections of the file are
only for the reader: all keys are flattened. Names may be spelled with hyphens or underscores.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from anima_fast.errors import UserError
from anima_fast.files import parse_config, read_text, write_text
from anima_fast.options.declare import Spec, convert, convert_all, nearest, specs
from anima_fast.options.finetune import network_options
from anima_fast.options.other_names import ALIASES, IGNORED, REFUSED
from anima_fast.options.presets import apply_presets
from anima_fast.options.rules import check_required
from anima_fast.options.run import RunOptions, TrainOptions

# What the command line and the file may name besides the fields of `TrainOptions`.
OTHER_NAMES = frozenset(itertools.chain(ALIASES, IGNORED, REFUSED))
OptionsT = TypeVar("OptionsT", bound=RunOptions)


def refused(cls: type) -> dict[str, str]:
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
    cls: type[OptionsT] = TrainOptions,  # type: ignore[assignment]
) -> tuple[OptionsT, list[str]]:
    """The checked options of a run from both sources, and the notices to show.

    Args:
        cli_values: option name -> text, list of texts, or a value of the right type. The names in
            `other_names.py` are allowed too.
        config_file: a TOML file; `.toml` is appended when missing.
        complete: whether everything that a run needs must be given.
        cls: the options of a LoRA, or of full fine-tuning.
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
        below, lines = apply_presets(values["preset"], values, cls)
        values = below | values
        notices = [*lines, *notices]
    options = cls.of(values)
    if complete:
        check_required(options)
    return options, [*notices, *options.notices]


def config_path(path: str | Path) -> Path:
    """The configuration file meant by `--config_file`, with `.toml` appended when missing."""
    path = Path(path)
    return path if path.suffix == ".toml" else path.with_name(path.name + ".toml")


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a TOML file, sections flattened; a key in two of them is refused."""
    what = "--config_file"
    flat: dict[str, Any] = {}
    _flatten(parse_config(read_text(path, what), f"{what} {path}"), flat, path.name)
    return flat


def _flatten(table: Mapping[str, Any], flat: dict[str, Any], where: str) -> None:
    for key, value in table.items():
        if isinstance(value, Mapping):
            _flatten(value, flat, where)
            continue
        name = key.replace("-", "_")
        if name in flat:
            raise UserError(f"{where}: {key} is in two sections: keep one of them")
        flat[name] = value


def _accept(
    cls: type, given: Mapping[str, Any], place: str, notices: list[str], *, text: bool
) -> dict[str, Any]:
    """Options of one source in their types; the other known names become notices or errors."""
    known = specs(cls)
    present = {name: value for name, value in given.items() if value is not None}
    values = convert_all(cls, present, place, text=text)
    for name, value in present.items():
        if name in known or _is_off(value):
            continue
        if name in ALIASES:
            alias = ALIASES[name]
            meant = convert(known[alias.target], alias.value or value, f"{place}{name}", text=True)
            # The plain name beats the older spelling.
            values.setdefault(alias.target, meant)
        else:
            notices.append(_without_effect(cls, name, place))
    return values


def _without_effect(cls: type, name: str, place: str) -> str:
    """The notice about a name that is ignored. Raises `UserError` for any other."""
    reasons = refused(cls)
    if name in reasons:
        raise UserError(f"{place}{name}: {reasons[name]}")
    if name not in IGNORED:
        names = [*specs(cls), *ALIASES, *IGNORED, *reasons]
        raise UserError(f"{place}{name}: unknown option: {nearest(name, names)}")
    return f"{name} is ignored: {IGNORED[name]}"


def _is_off(value: Any) -> bool:
    """Whether a name that is not an option is turned off, as in configuration files of others."""
    if isinstance(value, str):
        return value.lower() in ("", "false", "no", "none", "0")
    return not value


def to_toml(options: Any, *, only_changed: bool = False) -> str:
    """Options as TOML, in a section for each help group; secrets are left out.

    `only_changed` leaves out what equals its default.
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
    """Write the changed options to a new file at the path of `--config_file`."""
    if config_file is None:
        raise UserError("--output_config needs --config_file FILE to know where to write")
    path = config_path(config_file)
    if path.exists():
        raise UserError(f"{path} exists: delete it or give another --config_file")
    write_text(path, to_toml(options, only_changed=True))
    return path
