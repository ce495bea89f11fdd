"""What `bench run` is asked to measure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anima_fast.bench.metrics import METRICS
from anima_fast.bench.run_file import Measurement
from anima_fast.errors import UserError

# Beside the ops of the registry: one fused block, the training step, the loss curve, the program.
WHOLES = ("block", "step", "loss", "program")
MODES = ("fwd", "bwd", "both")
# A provider of the whole step.
DIFFUSERS = "diffusers"
# The names that a choice has, and how the command line calls them.
WORDS = {"ops": "OP", "dtypes": "--dtype", "providers": "--provider", "modes": "--mode",
         "metrics": "--metric"}  # fmt: skip
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Choice:
    """A selection; what is empty selects everything.

    Attributes:
        ops: names of the registry, or of `WHOLES`.
        sizes: letters of the legend that replace those of the real shapes (`--case L=4096`).
        dtypes, providers, modes, metrics: names.
        archs: compute capabilities to compile for, 89 for 8.9.
        candidate: FILE.py:function, one more provider; "" for none.
        quick: the set that CI runs.
        seconds: what each op at one size may take, on a card.
    """

    ops: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    archs: tuple[int, ...] = ()
    candidate: str = ""
    quick: bool = False
    seconds: float = 4.0

    def wants(self, *metrics: str) -> bool:
        """Whether one of these metrics is asked for."""
        return not self.metrics or not set(metrics).isdisjoint(self.metrics)

    def wants_op(self, *names: str) -> bool:
        """Whether one of these ops is asked for."""
        return not self.ops or not set(names).isdisjoint(self.ops)

    def accepts(self, row: Measurement) -> bool:
        """Whether a row is asked for: a group may measure more than that at once."""
        # "own mlp" is the block's own provider under a policy; a candidate has ":" in its name; a
        # ratio of times needs ours and eager's, whoever else is asked for.
        provider, mode = row.provider.split()[0], mode_of(row)
        known = (
            provider in self.providers
            or ":" in provider
            or (row.metric == "time" and provider in ("own", "eager"))
        )
        return (
            self.wants(row.metric)
            and (not self.providers or known)
            and (not self.dtypes or not row.dtype or row.dtype in self.dtypes)
            and (not self.modes or mode not in MODES or mode in self.modes)
        )

    def dumps(self) -> str:
        """As text, for another process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def loads(cls, text: str) -> Choice:
        """The choice of `dumps`."""
        values: Any = json.loads(text)
        return cls(**values | {k: tuple(v) for k, v in values.items() if isinstance(v, list)})


def name_of(dtype: torch.dtype) -> str:
    """As rows name it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def mode_of(row: Measurement) -> str:
    """The mode of a row: that of an error is a tensor's name, and gradients belong to backward."""
    if row.metric != "error" or not row.mode:
        return row.mode
    return "fwd" if row.mode.startswith("out") else "bwd"


def parse_choice(
    ops: Iterable[str],
    *,
    cases: Iterable[str] = (),
    archs: Iterable[str] = (),
    candidate: str = "",
    quick: bool = False,
    seconds: float = 4.0,
    **names: Iterable[str],
) -> Choice:
    """A choice from the words of a command line; commas separate as repeated options do.

    Args:
        ops: names.
        cases: "L=4096,B=2".
        archs: capabilities such as "89", or cards by name.
        candidate, quick, seconds: as `Choice` has them.
        names: dtypes, providers, modes, metrics.

    Raises:
        UserError: a name or a size that does not exist.
    """
    from anima_fast.bench.providers import load_candidate, provider_names
    from anima_fast.kernels.registry import OPS

    known = {
        "ops": (*OPS, *WHOLES),
        "dtypes": DTYPES,
        "providers": (*provider_names(), DIFFUSERS),
        "modes": MODES,
        "metrics": tuple(METRICS),
    }
    chosen: dict[str, Any] = {}
    for kind, given in {"ops": ops, **names}.items():
        words = [word for text in given for word in text.split(",") if word]
        for word in words:
            if word not in known[kind]:
                raise UserError(f"{WORDS[kind]} {word}: use one of {', '.join(known[kind])}")
        chosen[kind] = tuple(dict.fromkeys(words))
    if candidate:
        # Before anything is measured; the op's process loads it again.
        load_candidate(candidate)
        if len(chosen["ops"]) != 1 or chosen["ops"][0] in WHOLES:
            raise UserError("--candidate needs the name of the one op that it computes")
        # That process starts in another folder.
        place, _, name = candidate.rpartition(":")
        candidate = f"{Path(place).resolve()}:{name}" if place.endswith(".py") else candidate
    return Choice(
        sizes=_sizes(cases),
        archs=tuple(dict.fromkeys(_arch(word) for text in archs for word in text.split(","))),
        candidate=candidate,
        quick=quick,
        seconds=seconds,
        **chosen,
    )


def _arch(word: str) -> int:
    from anima_fast.kernels.dispatch import SHARED_KIB
    from anima_fast.measure.cards import find_card

    if word.isdecimal() and int(word) in SHARED_KIB:
        return int(word)
    try:
        return find_card(word).arch
    except UserError as error:
        known = ", ".join(map(str, SHARED_KIB))
        raise UserError(f"--arch {word} is unknown: use {known}, or a card; {error}") from error


def _sizes(cases: Iterable[str]) -> dict[str, int]:
    sizes = {}
    for word in (word for text in cases for word in text.split(",") if word):
        letter, _, number = word.partition("=")
        if not number.isdecimal() or not int(number) or not letter.isidentifier():
            raise UserError(f"--case {word}: expected sizes such as L=4096,B=2")
        sizes[letter] = int(number)
    return sizes
