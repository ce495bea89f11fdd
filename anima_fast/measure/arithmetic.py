"""In which arithmetic a run computes: what the options and the device decide together.

    --mixed_precision  --sums   where short float16 sums are faster      elsewhere
    auto               auto     fp16, short sums                         bf16
    auto               full     bf16                                     bf16
    auto               short    fp16, short sums                         the same, if kernels run
    fp16               auto     fp16, short sums                         fp16, float32 sums
    fp16               full     fp16, float32 sums                       fp16, float32 sums
    fp16               short    fp16, short sums                         the same, or an error
    bf16, no           auto     as asked for, float32 sums               as asked for
    bf16, no           short    an error                                 an error

Where bfloat16 does not exist (before sm_80) auto is fp16 where the table says bf16. Only the
project's own kernels have short sums, and only where the card's rounding is found good enough.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from anima_fast.device import uses_fused_blocks
from anima_fast.errors import UserError
from anima_fast.options.rules import check_sums

# The cards with bfloat16. Of older ones Triton (3.7.1, compiled for 7.5) uses no tensor core.
BFLOAT16 = (8, 0)
# What is preferred where nothing was measured.
CHAIN = 64


@dataclass(frozen=True)
class ShortSums:
    """What short float16 sums are worth on a device.

    Attributes:
        chain: the terms of a sum that its rounding allows; 0 for none.
        faster: whether they are really faster than float32 sums.
        text: why, and how that is known.
        ratio: how many times as fast a product is; None where nobody measured.
    """

    chain: int
    faster: bool
    text: str
    ratio: float | None = None


@dataclass(frozen=True)
class Machine:
    """What a device can do.

    Attributes:
        has_bf16: it computes in bfloat16.
        obstacle: why the project's kernels do not run there; "" when they do.
        short: what short sums are worth; may measure, so it is called where it decides only.
    """

    has_bf16: bool
    obstacle: str
    short: Callable[[], ShortSums]


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a run.

    Attributes:
        precision: no, fp16 or bf16 (`device.DTYPES`), of weights and activations.
        chain: terms of a float16 sum, 0 for float32 sums.
        reason: why, in a few words.
        encoders: the precision of the text encoder, the LLM adapter and the VAE.
        chosen: the program chose the precision.
    """

    precision: str
    chain: int
    reason: str
    encoders: str
    chosen: bool = field(default=False, compare=False)

    @property
    def sums(self) -> str:
        """short or full, as `--sums` takes it."""
        return "short" if self.chain else "full"

    @property
    def text(self) -> str:
        """For people: "fp16, float16 sums of 64 terms"."""
        if self.precision != "fp16":
            return "fp32" if self.precision == "no" else self.precision
        return f"fp16, {f'float16 sums of {self.chain} terms' if self.chain else 'float32 sums'}"


def resolve(precision: str, sums: str, machine: Machine) -> Arithmetic:
    """The arithmetic that `--mixed_precision` and `--sums` mean on a device.

    Raises `UserError` for short sums where they cannot be.
    """
    auto, wide = precision == "auto", "bf16" if machine.has_bf16 else "fp16"
    if precision not in ("auto", "fp16"):
        check_sums(precision, sums)
        return Arithmetic(precision, 0, "as asked for", precision)
    # Encoders stay what they are in bf16: Qwen3 may overflow in float16, and caches stay valid.
    full = Arithmetic(wide if auto else "fp16", 0, "", wide if auto else "fp16", auto)
    must = sums == "short" and not auto
    if sums == "full":
        return _because(full, "--sums full")
    if machine.obstacle:
        if must:
            raise UserError(
                f"--sums short needs the project's kernels, and {machine.obstacle}: use --sums full"
            )
        return _because(full, machine.obstacle)
    short = machine.short()
    if must and not short.chain:
        raise UserError(f"--sums short cannot be used: {short.text}; use --sums full")
    if not short.chain or not (short.faster or sums == "short"):
        return _because(full, short.text)
    reason = short.text if short.faster else "--sums short"
    return Arithmetic("fp16", short.chain, reason, full.encoders, auto)


def _because(found: Arithmetic, reason: str) -> Arithmetic:
    if found.chosen and found.precision == "fp16":
        reason = f"this card has no bfloat16; sums in float32: {reason}"
    return replace(found, reason=reason)


def machine(
    device: torch.device, kernels: str, *, compiled: bool = False, short: Callable[[], ShortSums]
) -> Machine:
    """What a device can do with `--kernels` and `--compile`; `short` is for a card."""
    on_card = device.type == "cuda"
    recent = not on_card or torch.cuda.get_device_capability(device) >= BFLOAT16
    obstacle = "" if recent else "Triton uses no tensor cores before Ampere"
    if not uses_fused_blocks(kernels, device, compiled=compiled):
        obstacle = _obstacle(on_card, kernels, compiled)
    return Machine(
        has_bf16=recent,
        obstacle=obstacle,
        # Kernels that run off a card are interpreted.
        short=short if on_card else lambda: ShortSums(CHAIN, False, "no card computes here"),
    )


def _obstacle(on_card: bool, kernels: str, compiled: bool) -> str:
    if not on_card:
        return "no card computes here"
    if compiled:
        return "--compile runs plain PyTorch"
    if kernels == "eager":
        return "plain PyTorch runs (--kernels eager)"
    assert importlib.util.find_spec("triton") is None
    return "the package triton is missing"


def by_name(name: str, capability: tuple[int, int]) -> ShortSums:
    """What a card's name says of short sums, where nothing was measured."""
    half_rate = re.search(r"\b(geforce|titan)\b", name, re.IGNORECASE) is not None
    if half_rate and capability >= BFLOAT16:
        return ShortSums(CHAIN, True, "float16 sums are faster on a GeForce or TITAN, by its name")
    return ShortSums(CHAIN, False, "float16 sums are not faster on this card, by its name")


@contextmanager
def sums_of_run(chain: int = 0) -> Iterator[None]:
    """Inside the block products of float16 are summed in chains, of `chain` terms to begin with.

    Afterwards they are summed in float32 again, as a program must not depend on what it ran before.
    """
    try:
        set_sums(chain)
        yield
    finally:
        set_sums(0)


def set_sums(chain: int) -> None:
    """From here on products of float16 have sums of `chain` terms, 0 for float32 sums.

    It holds for the process. Triton is not imported where nobody wants short sums.
    """
    if chain or "anima_fast.kernels.sums" in sys.modules:
        from anima_fast.kernels import sums

        sums.set_sums(chain)
