"""How one option is declared, described and checked.

An option is a dataclass field made by `option(...)`: its annotation gives the type, its metadata
the help sentence, the help group and the limits. Everything else that knows options (flags, TOML
keys, keys of the dataset file, checks, the table in the documentation) comes from `specs(cls)`, so
nothing is listed twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from anima_fast.errors import UserError
from anima_fast.options.kinds import KINDS, pair_text, shown

Made = TypeVar("Made", bound="Checked")
# What messages call a value of a wrong type, where its looks may not tell.
TYPE_NAMES = {bool: "a boolean", str: "a text", dict: "a table"}


def option(group: str, default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is an option; `more` are further attributes of its `Spec`."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **more})


@dataclass(frozen=True)
class Spec:
    """The description of one option.

    Attributes:
        kind: a key of `KINDS`; given where the annotation does not say enough.
        default: the value when it is not given; None means off or "decided by the program".
        help: one sentence, with the unit where there is one.
        group: the panel of the help page.
        choices: the only values allowed, if not empty.
        low, high: the allowed range of a number, both ends included.
        multiple: what a whole number must be a multiple of.
        optional: None is a value.
        secret: never written into the files of a run.
        as_text: a size or range that is checked and stays text.
    """

    name: str
    kind: str
    default: Any
    help: str
    group: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    multiple: int = 1
    optional: bool = True
    secret: bool = False
    as_text: bool = False

    @property
    def is_list(self) -> bool:
        """Takes one or more words."""
        return self.kind in ("words", "numbers")

    @property
    def metavar(self) -> str:
        """What the help page shows in place of the value."""
        return "|".join(self.choices) or KINDS[self.kind].metavar


def _specs(cls: type) -> Mapping[str, Spec]:
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if "help" not in field.metadata:
            continue
        # `option` is of a key of dataset files (dataset_keys.py).
        meta = {key: value for key, value in field.metadata.items() if key != "option"}
        kind, optional = _kind(hints[field.name])
        meta["as_text"] = kind == "str" and meta.get("kind") in ("size", "range")
        meta["kind"] = meta.get("kind") or kind
        found[field.name] = Spec(name=field.name, default=field.default, optional=optional, **meta)
    return types.MappingProxyType(found)


# The options of a dataclass by name, in the order of declaration.
specs: Callable[[type], Mapping[str, Spec]] = functools.cache(_specs)


def _kind(hint: Any) -> tuple[str, bool]:
    """The kind of an annotation, and whether it allows None."""
    plain = {
        bool: "bool", int: "int", float: "float", str: "str", Mapping[str, Any]: "table",
        tuple[str, ...]: "words", tuple[float, ...]: "numbers",
        tuple[int, int]: "size", tuple[float, float]: "range",
    }  # fmt: skip
    if hint in plain:
        return plain[hint], False
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    optional = len(members) < len(typing.get_args(hint))
    return ("steps" if len(members) > 1 else plain[members[0]]), optional


def nearest(
    name: str, known: Iterable[str], otherwise: str = "remove it, or see --help for the known ones"
) -> str:
    """The end of a message about an unknown name: the nearest known one, or `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else otherwise


def convert(spec: Spec, value: Any, where: str, *, text: bool = False) -> Any:
    """One value in the type of its option; nothing (None or "") is None where that is a value.

    `where` is what messages call the place, such as `--network_dim`; with `text` numbers and
    booleans may be spelled as text (the command line). Raises `UserError` for a wrong type, a
    value out of range or not among the choices.
    """
    if value is None or (value == "" and spec.optional):
        if spec.optional or value == spec.default:
            return None
        raise UserError(f"{where}: expected {KINDS[spec.kind].expected}, got nothing")
    return check_value(spec, value, where, text=text)


def convert_all(
    cls: type, values: Mapping[str, Any], place: str, *, text: bool = False
) -> dict[str, Any]:
    """`convert` for each value that is an option of a dataclass; others are left out."""
    return {
        name: convert(spec, values[name], f"{place}{name}", text=text)
        for name, spec in specs(cls).items()
        if name in values
    }


def check_value(spec: Spec, value: Any, where: str, *, text: bool = False) -> Any:
    """`convert` where nothing is not a value: in dataset files."""
    try:
        converted = KINDS[spec.kind].read(value, text)
    except (ValueError, TypeError, OverflowError):
        found = shown(value)
        # On the command line everything is a text.
        if not text and type(value) in TYPE_NAMES:
            found += f", {TYPE_NAMES[type(value)]}"
        expected = KINDS[spec.kind].expected
        raise UserError(f"{where}: expected {expected}, got {found}") from None
    for part in converted if isinstance(converted, tuple) else (converted,):
        _check_number(spec, part, where)
    if spec.choices and converted not in spec.choices:
        near = nearest(converted, spec.choices, "use one of these")
        raise UserError(f"{where}: {shown(value)} is not one of {', '.join(spec.choices)}: {near}")
    return pair_text(value) if spec.as_text else converted


def _check_number(spec: Spec, value: Any, where: str) -> None:
    below = spec.low is not None and value < spec.low
    above = spec.high is not None and value > spec.high
    if below or above:
        wanted = f"of at least {spec.low:g}"
        if spec.high is not None:
            wanted = f"from {spec.low or 0:g} to {spec.high:g}"
        # A float as people write it: -1, not -1.0.
        number = f"{value:.15g}" if isinstance(value, float) else shown(value)
        raise UserError(f"{where}: {number} is out of range: use a number {wanted}")
    if spec.multiple > 1 and value is not None and value % spec.multiple:
        example = f", such as {spec.default}" if spec.default else ""
        raise UserError(
            f"{where}: {value} does not suit this model: use a multiple of {spec.multiple}{example}"
        )


@dataclass(frozen=True)
class Checked:
    """Options that are checked (type, range, choice) when an instance is made."""

    def __post_init__(self) -> None:
        for name, spec in specs(type(self)).items():
            self._put(name, convert(spec, getattr(self, name), f"--{name}"))
        self._settle()

    @classmethod
    def of(cls: type[Made], values: Mapping[str, Any]) -> Made:
        """An instance of values that `convert` has returned, which are not converted again."""
        options = object.__new__(cls)
        for name, spec in specs(cls).items():
            options._put(name, values.get(name, spec.default))
        options._settle()
        return options

    def _settle(self) -> None:
        """What options mean together; see `rules.py`."""

    def _put(self, name: str, value: Any) -> None:
        # The instance is frozen for everybody else.
        object.__setattr__(self, name, value)
