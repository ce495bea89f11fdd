"""Whether a model may be computed in the fp16 that `auto` chose on a card: one verdict a model.

Training finds it (training/guard.py), in the card's tuning file it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anima_fast.measure.arithmetic import Arithmetic
from anima_fast.measure.tuning import CardFacts, TuningFile

SECTION = "guard"


@dataclass(frozen=True)
class Verdict:
    """What the first batch of a model said.

    Attributes:
        chain: terms of the float16 sums it was computed with.
        cosine: of its LoRA gradients in fp16 and bf16; None where one was not finite.
        problem: why the model is not for fp16; "" when it is.
    """

    chain: int
    cosine: float | None
    problem: str = ""

    @classmethod
    def of(cls, entry: Any) -> Verdict | None:
        """What a tuning file holds; None for anything else."""
        if not isinstance(entry, Mapping):
            return None
        chain, cosine, problem = (entry.get(name) for name in ("chain", "cosine", "problem"))
        number = cosine is None or isinstance(cosine, (int, float))
        right = isinstance(chain, int) and number and isinstance(problem, str)
        return cls(chain, cosine, problem) if right else None  # type: ignore[arg-type]


def model_key(path: str | Path) -> str:
    """A model file by name, bytes and the time of its last change."""
    path = Path(path)
    found = path.stat()
    return f"{path.name}, {found.st_size} bytes, {found.st_mtime_ns}"


def stored_verdict(card: CardFacts, model: str | Path, chain: int) -> Verdict | None:
    """The verdict on a model with such sums; None before there is one."""
    try:
        key = model_key(model)
    except OSError:
        # Whoever opens the file says so.
        return None
    verdict = Verdict.of(TuningFile(card).section(SECTION).get(key))
    return verdict if verdict is not None and verdict.chain == chain else None


def keep_verdict(card: CardFacts, model: str | Path, verdict: Verdict) -> str | None:
    """Keep a verdict; returns why it cannot be, None when it is kept."""
    return TuningFile(card).add(SECTION, {model_key(model): vars(verdict)})


def needs_verdict(found: Arithmetic) -> bool:
    """Whether the program chose fp16 where bf16 is there to fall back to."""
    return found.chosen and found.precision == "fp16" and found.encoders == "bf16"


def refused(found: Arithmetic, problem: str) -> Arithmetic:
    """bf16 instead."""
    return replace(found, precision="bf16", chain=0, reason=f"instead of fp16: {problem}")


def unless_refused(found: Arithmetic, card: CardFacts, model: str | Path) -> Arithmetic:
    """The arithmetic that was chosen, or bf16 where the model's verdict says so."""
    verdict = stored_verdict(card, model, found.chain) if needs_verdict(found) else None
    return refused(found, verdict.problem) if verdict is not None and verdict.problem else found
