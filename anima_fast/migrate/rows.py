"""Foreign keys as tables: a row for each key that has one counterpart here.

    Row("caching_batch_size", "vae_batch_size")
    Row("model.dtype", "mixed_precision", one_of(DTYPES))
    Row("epochs", "max_train_epochs", None, "a batch that is not full ends an epoch here")

A converter turns the foreign value into ours; None says that the key has nothing to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from anima_fast.migrate.ledger import DEFAULT, Ledger, is_off
from anima_fast.options.declare import Spec, check_value, specs
from anima_fast.options.run import FinetuneOptions, TrainOptions

CLASSES = {"train": TrainOptions, "finetune": FinetuneOptions}
# Options of any command.
OPTIONS: Mapping[str, Spec] = {**specs(FinetuneOptions), **specs(TrainOptions)}


def on(value: Any) -> Any:
    """The value as it is, unless it turns its option off."""
    return None if is_off(value) else value


def number(value: Any) -> Any:
    """A whole number as one with a point, which TOML tells apart."""
    return float(value) if isinstance(value, int) else value


def one_of(names: Mapping[str, Any], other: Any = None) -> Callable[[Any], Any]:
    """A converter by a table of names; the rest becomes `other`."""
    return lambda value: names.get(str(value), other)


def when_on(value: Any) -> Callable[[Any], Any]:
    """A converter to one value where the key is on."""
    return lambda given: None if is_off(given) else value


class Row(NamedTuple):
    """Foreign keys of which the first counts, our option, the converter, what the user is told,
    and our value where the source leaves the keys out."""

    keys: str
    option: str
    convert: Callable[[Any], Any] | None = None
    why: str = ""
    default: Any = None


def settle(rows: Iterable[Row], ledger: Ledger) -> None:
    """Settle the keys of a table that are open; the first key that gives an option counts.

    Raises:
        UserError: a value that the option cannot have.
    """
    for keys, option, convert, why, default in rows:
        for key in filter(ledger.has, keys.split()):
            value = ledger.get(key)
            value = given(OPTIONS[option], convert(value) if convert else value)
            if value is not None and option in ledger.options:
                ledger.drop(f"{option} is given by another key", key)
            elif value is not None:
                check_value(OPTIONS[option], value, key, text=True)
                ledger.take(key, option, value, why)
        if default is not None:
            ledger.add(DEFAULT, **{option: default})


def given(spec: Spec, value: Any) -> Any:
    """A value from the looser types of other files (numbers as text, 10.0 for 10, text for a list)
    in the type of its option; None when it says "not given" there."""
    if isinstance(value, str) and spec.kind in ("int", "float", "steps"):
        with contextlib.suppress(ValueError):
            value = int(value) if value.strip().isdigit() else float(value)
    if spec.kind in ("int", "steps") and isinstance(value, float) and value.is_integer():
        value = int(value)
    elif spec.kind == "str" and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    elif spec.kind == "bool" and isinstance(value, int):
        value = bool(value)
    elif spec.is_list and isinstance(value, str):
        value = value.split()
    elif spec.kind == "words" and isinstance(value, (list, tuple)):
        value = [str(v) for v in value if str(v)]
    nothing = value in (None, "", [], ())
    if isinstance(value, str) and spec.optional:
        nothing |= value.lower() == "none"
    if isinstance(value, (int, float)) and spec.kind != "bool":
        nothing |= value == 0 and (spec.low or 0) > 0
    return None if nothing else value
