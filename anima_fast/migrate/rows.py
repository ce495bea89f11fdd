"""Foreign keys as tables: a row for each key that has one counterpart here.

    Row("caching_batch_size", "vae_batch_size")
    Row("model.dtype", "mixed_precision", one_of(DTYPES))
    Row("epochs", "max_train_epochs", whole, "a batch that is not full ends an epoch here")

A converter turns the foreign value into ours; None says that the key has nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger, is_off, show
from anima_fast.options.declare import Spec, specs
from anima_fast.options.run import FinetuneOptions, TrainOptions

CLASSES = {"train": TrainOptions, "finetune": FinetuneOptions}
# Options of any command.
OPTIONS: Mapping[str, Spec] = {**specs(FinetuneOptions), **specs(TrainOptions)}
DEFAULT = "the default there"

Converter = Callable[[Any], Any]


def on(value: Any) -> Any:
    """The value as it is, unless it turns its option off."""
    return None if is_off(value) else value


def number(value: Any) -> float | None:
    """A number, unless it is left out."""
    return None if value in (None, "") else float(value)


def rate(value: Any) -> float | None:
    """A number, unless it is off."""
    return None if is_off(value) else float(value)


def whole(value: Any) -> int | None:
    """A whole number, unless it is left out."""
    return None if value in (None, "") else int(float(value))


def one_of(names: Mapping[str, Any], other: Any = None) -> Converter:
    """A converter by a table of names; the rest becomes `other`."""
    return lambda value: names.get(str(value), other)


def when_on(value: Any) -> Converter:
    """A converter to one value where the key is on."""
    return lambda given: None if is_off(given) else value


class Row(NamedTuple):
    """A foreign key, our option, how the value is converted, and what the user is told.

    `default` is our value where the source leaves the key out.
    """

    key: str
    option: str
    convert: Converter | None = None
    why: str = ""
    default: Any = None


class Item(NamedTuple):
    """An option of sd-scripts: `key` is its name in the ledger, `name` the option's."""

    key: str
    name: str
    value: Any


def settle(rows: Iterable[Row], ledger: Ledger) -> None:
    """Settle the keys of a table that are open; the first key that gives an option counts.

    Raises:
        UserError: a value that the converter cannot read.
    """
    for key, option, convert, why, default in rows:
        try:
            value = convert(ledger.get(key)) if convert and ledger.has(key) else ledger.get(key)
        except (TypeError, ValueError):
            shown = show(ledger.get(key))
            raise UserError(f"{key}: expected a number, got {shown!r}") from None
        value = given(OPTIONS[option], value)
        if value is None:
            if default is not None:
                ledger.add(option, default, DEFAULT)
        elif option in ledger.options:
            ledger.drop(key, f"{option} is given by another key")
        else:
            ledger.take(key, option, value, why)


def reasons(table: Mapping[str, str]) -> dict[str, str]:
    """Key -> reason, from a table of reasons with their keys in one text."""
    return {key: why for why, keys in table.items() for key in keys.split()}


def given(spec: Spec, value: Any) -> Any:
    """A value in the type of its option; None when it says "not given" in files of others."""
    value = plain(spec, value)
    if value is None or value == "" or value == [] or value == ():
        return None
    if spec.is_list or spec.kind == "bool":
        return value
    if isinstance(value, str):
        return None if spec.optional and value.lower() == "none" else value
    return None if value == 0 and (spec.low or 0) > 0 else value


def plain(spec: Spec, value: Any) -> Any:
    """A value in the looser types of other files: numbers as text, 10.0 for 10, text for a list."""
    if isinstance(value, str) and spec.kind in ("int", "float", "steps"):
        value = value.strip()
        try:
            value = float(value) if spec.kind != "int" or not value.isdigit() else int(value)
        except ValueError:
            return value
    if spec.kind in ("int", "steps") and isinstance(value, float) and value.is_integer():
        return int(value)
    if spec.kind == "str" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if spec.kind == "bool" and isinstance(value, int):
        return bool(value)
    if spec.is_list and isinstance(value, str):
        return value.split()
    if spec.kind == "words" and isinstance(value, (list, tuple)):
        return [str(v) for v in value if str(v)]
    return value
