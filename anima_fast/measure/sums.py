"""Are short float16 sums faster on this card? Two products of 4096³ say it, once.

    ratio = seconds of bf16 with float32 sums, ours or the library's / seconds of ours in short sums

Before that the rounding of the card is probed (probe.py), which chooses the length of the sums.
Both go to the card's tuning file, so that later runs measure nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anima_fast.errors import reason
from anima_fast.measure.arithmetic import BFLOAT16, ShortSums, by_name
from anima_fast.measure.probe import CHAINS, Product, choose_chain, probe
from anima_fast.measure.timer import Call, Timer
from anima_fast.measure.tuning import CardFacts, TuningFile

# "Really faster": a tenth, more than such a short measurement is wrong by.
LEAST_RATIO = 1.1
SIDE = 4096
# Calls of each product in a round, and rounds.
BATCH, ROUNDS = 2, 3
SECTION = "sums"
SHORT, OWN, LIBRARY = "short sums", "float32 sums, own kernel", "float32 sums, library"

# Products by name → the best seconds of a call; one that failed is not among them.
Seconds = Callable[[Mapping[str, Call]], Mapping[str, float]]


@dataclass(frozen=True)
class Measured:
    """What a card was found to do.

    Attributes:
        chain: the terms of a float16 sum that its rounding allows; 0 for none.
        seconds: of a product of 4096³, by `SHORT`, `OWN` and `LIBRARY`, as far as they ran.
        probe: error and gain of the sums, and bf16's error, as `probe.Probe` has them.
        failed: why the kernel with short sums did not run; "" if it did.
    """

    chain: int
    seconds: Mapping[str, float]
    probe: Mapping[str, float]
    failed: str = ""

    def judged(self) -> ShortSums:
        """Whether short sums are worth it."""
        if self.failed:
            return ShortSums(0, False, f"short sums do not run on this card ({self.failed})")
        if not self.chain:
            error, bf16 = self.probe["error"], self.probe["bf16_error"]
            text = f"this card rounds float16 sums too coarsely (error {error:.1e}, bf16 {bf16:.1e}"
            return ShortSums(0, False, f"{text}, gain {self.probe['gain']:+.0e})")
        rivals = [self.seconds[name] for name in (OWN, LIBRARY) if name in self.seconds]
        if SHORT not in self.seconds:
            return ShortSums(0, False, "products in short sums do not run on this card")
        if not rivals:
            return ShortSums(self.chain, False, "nothing ran to compare short sums with")
        ratio = min(rivals) / self.seconds[SHORT]
        text = f"products in short sums are {ratio:.2f} times as fast here, as measured"
        return ShortSums(self.chain, ratio >= LEAST_RATIO, text, ratio)

    @property
    def is_complete(self) -> bool:
        """Whether what decides ran: memory may have been full."""
        return SHORT in self.seconds or not self.chain

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Measured | None:
        """What a tuning file holds; None for anything else."""
        try:
            found = cls(
                int(entry["chain"]),
                {str(name): float(value) for name, value in entry["seconds"].items()},
                {str(name): float(value) for name, value in entry["probe"].items()},
                str(entry["failed"]),
            )
            found.judged()
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            return None
        return found if found.chain in (0, *CHAINS) else None


def card_facts(device: torch.device | int) -> CardFacts:
    """What is measured on a card holds for these."""
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    return CardFacts.of(properties.name, capability, str(torch.__version__))


def known_sums(card: CardFacts) -> ShortSums:
    """What is known of a card without measuring: its tuning file, else its name."""
    measured = Measured.of(TuningFile(card).section(SECTION))
    return _by_name(card) if measured is None else measured.judged()


def _by_name(card: CardFacts) -> ShortSums:
    major, minor = card.capability.split(".")
    return by_name(card.name, (int(major), int(minor)))


def measured_sums(
    card: CardFacts,
    device: torch.device,
    say: Callable[[str], None],
    *,
    measure: Callable[[torch.device], Measured] | None = None,
) -> ShortSums:
    """What is known of a card, measured now and kept if it was not before."""
    file = TuningFile(card)
    measured = Measured.of(file.section(SECTION))
    if measured is None:
        say("measuring float16 sums, once for this card")
        measured = (measure or measure_sums)(device)
        if not measured.is_complete:
            return _by_name(card)
        problem = file.add(SECTION, vars(measured))
        if problem is not None:
            say(f"the speed of float16 sums is measured at each start ({problem})")
    return measured.judged()


def measure_sums(
    device: torch.device, *, seconds: Seconds | None = None, product: Product | None = None
) -> Measured:
    """Probe how float16 sums are rounded, and time a product of 4096³ in the shortest that serve.

    `seconds` and `product` stand for the timer and the kernel.
    """
    try:
        chain, found = choose_chain(lambda n: probe(product or own_product, n, device))
    except torch.OutOfMemoryError:
        return Measured(CHAINS[0], {}, {})
    except Exception as error:
        # Triton or its compiler may know nothing of this card.
        return Measured(0, {}, {}, reason(error))
    figures = {"error": found.error, "gain": found.gain, "bf16_error": found.bf16_error}
    times = (seconds or best_seconds)(products(chain, device)) if chain else {}
    torch.cuda.empty_cache()
    return Measured(chain, dict(times), figures)


def own_product(a: Tensor, b: Tensor, chain: int) -> Tensor:
    """a [M, K] @ b [K, N] in float32 by the project's kernel."""
    from anima_fast.kernels.gemm import gemm

    return gemm(a, b.T, dtype=torch.float32, chain=chain)


def products(chain: int, device: torch.device) -> dict[str, Call]:
    """What is timed: the kernel in short sums, and its rivals in bf16 with float32 sums.

    Where there is no bfloat16 the rivals are in float16.
    """
    from anima_fast.kernels.gemm import gemm

    generator = torch.Generator(device).manual_seed(0)
    # Random numbers: zeros would need less power.
    half = torch.randn(2, SIDE, SIDE, generator=generator, device=device, dtype=torch.float16)
    card = device.type == "cuda"
    wide = not card or torch.cuda.get_device_capability(device) >= BFLOAT16
    x, w = half
    u, v = half.bfloat16() if wide else half
    return {
        SHORT: lambda: gemm(x, w, chain=chain),
        OWN: lambda: gemm(u, v),
        LIBRARY: lambda: u @ v.T,
    }


def best_seconds(calls: Mapping[str, Call]) -> dict[str, float]:
    """The best time of each call on the current card, in turns, compiled before."""
    timer = Timer(dict(calls), batch=BATCH)
    timer.warm(1)
    for _ in range(ROUNDS):
        timer.round()
    return {name: min(samples) for name, samples in timer.seconds.items()}
