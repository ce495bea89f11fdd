"""Data-sheet figures of common cards, for predictions where there is no card to measure.

Sources, one per family:

- GeForce 30: NVIDIA Ampere GA102 GPU Architecture white paper and product pages.
- GeForce 40: NVIDIA Ada GPU Architecture white paper and product pages.
- GeForce 50: NVIDIA RTX Blackwell GPU Architecture white paper and product pages.
- A100: A100 Tensor Core GPU data sheet (SXM). L4, L40S: their data sheets.
- H100, H200: Hopper data sheets (SXM). B200: HGX B200 data sheet, per GPU.

Tensor-core rates are dense, bfloat16 in and float32 accumulated. A GeForce runs those at half its
rate with float16 accumulation, which bfloat16 has not: 256 multiply-adds per SM and clock, twice
its float32 rate, at the boost clock. Other cards have one rate for both. All of these are ceilings
that long runs under a power limit do not reach.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from anima_fast.errors import UserError


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        name: as `--card` takes it.
        title: as its maker sells it.
        arch: compute capability, 89 for 8.9.
        sms: streaming multiprocessors.
        memory_gib: as sold; a driver reports one to three per cent less.
        bandwidth_gb_s: of its memory, 10⁹ bytes a second.
        bf16_tflops: dense, float32 accumulation.
        fp32_tflops: without tensor cores.
        power_w: limit of the board.
        float16_sums: how many times `bf16_tflops` float16 products with float16 sums have.
    """

    name: str
    title: str
    arch: int
    sms: int
    memory_gib: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp32_tflops: float
    power_w: int
    float16_sums: float = 1.0


def float16_sums(title: str) -> float:
    """`Card.float16_sums` of any card, by the name its driver gives it."""
    return 2.0 if re.search("geforce|titan", title, re.IGNORECASE) else 1.0


def _geforce(
    name: str, arch: int, sms: int, boost_mhz: int, memory: float, bandwidth: float, power: int
) -> Card:
    # 128 float32 lanes per SM, two operations per multiply-add.
    fp32 = sms * 128 * 2 * boost_mhz * 1e6 / 1e12
    words = [part.upper() if part == "rtx" else part.title() for part in name.split("-")]
    if words[-1].endswith("Gb"):
        words[-1] = f"{words[-1][:-2]} GB"
    title = f"GeForce {' '.join(words)}"
    return Card(
        name, title, arch, sms, memory, bandwidth, 2 * fp32, fp32, power, float16_sums(title)
    )


# name, arch, SMs, boost MHz, GiB, GB/s, W
_GEFORCE = (
    ("rtx-3060", 86, 28, 1777, 12, 360, 170),
    ("rtx-3060-ti", 86, 38, 1665, 8, 448, 200),
    ("rtx-3070", 86, 46, 1725, 8, 448, 220),
    ("rtx-3080", 86, 68, 1710, 10, 760, 320),
    ("rtx-3080-ti", 86, 80, 1665, 12, 912, 350),
    ("rtx-3090", 86, 82, 1695, 24, 936, 350),
    ("rtx-3090-ti", 86, 84, 1860, 24, 1008, 450),
    ("rtx-4060", 89, 24, 2460, 8, 272, 115),
    ("rtx-4060-ti-8gb", 89, 34, 2535, 8, 288, 160),
    ("rtx-4060-ti-16gb", 89, 34, 2535, 16, 288, 165),
    ("rtx-4070", 89, 46, 2475, 12, 504, 200),
    ("rtx-4070-super", 89, 56, 2475, 12, 504, 220),
    ("rtx-4070-ti", 89, 60, 2610, 12, 504, 285),
    ("rtx-4070-ti-super", 89, 66, 2610, 16, 672, 285),
    ("rtx-4080", 89, 76, 2505, 16, 717, 320),
    ("rtx-4080-super", 89, 80, 2550, 16, 736, 320),
    ("rtx-4090", 89, 128, 2520, 24, 1008, 450),
    ("rtx-5060", 120, 30, 2497, 8, 448, 145),
    ("rtx-5060-ti-8gb", 120, 36, 2572, 8, 448, 180),
    ("rtx-5060-ti-16gb", 120, 36, 2572, 16, 448, 180),
    ("rtx-5070", 120, 48, 2512, 12, 672, 250),
    ("rtx-5070-ti", 120, 70, 2452, 16, 896, 300),
    ("rtx-5080", 120, 84, 2617, 16, 960, 360),
    ("rtx-5090", 120, 170, 2407, 32, 1792, 575),
)
# name, title, arch, SMs, GiB, GB/s, bf16 and fp32 TFLOP/s, W
_DATA_CENTRE = (
    ("a100-40", "A100 40 GB SXM", 80, 108, 40, 1555, 312, 19.5, 400),
    ("a100-80", "A100 80 GB SXM", 80, 108, 80, 2039, 312, 19.5, 400),
    ("l4", "L4", 89, 58, 24, 300, 121, 30.3, 72),
    ("l40s", "L40S", 89, 142, 48, 864, 362, 91.6, 350),
    ("h100-sxm", "H100 SXM", 90, 132, 80, 3350, 989, 67, 700),
    ("h200", "H200 SXM", 90, 132, 141, 4800, 989, 67, 700),
    ("b200", "B200 (HGX)", 100, 148, 180, 7700, 2250, 75, 1000),
)

CARDS: dict[str, Card] = {
    card.name: card
    for card in (*(_geforce(*row) for row in _GEFORCE), *(Card(*row) for row in _DATA_CENTRE))
}

# What drivers call cards that are sold under another name.
_DRIVER_NAMES = {
    "h100-80gb-hbm3": "h100-sxm",
    "a100-sxm4-40gb": "a100-40",
    "a100-sxm4-80gb": "a100-80",
}


def find_card(name: str) -> Card:
    """The card called `name`: as in `CARDS`, or with spaces, capitals, without "rtx" or "-sxm".

    Of a card sold with several sizes of memory it is the smallest, as the others are as fast and
    drivers call them all the same. Raises `UserError` with the nearest names.
    """
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    wanted = wanted.removeprefix("nvidia-").removeprefix("geforce-")
    wanted = _DRIVER_NAMES.get(wanted, wanted)
    for spelling in (wanted, f"rtx-{wanted}"):
        if spelling in CARDS:
            return CARDS[spelling]
    # Not just any longer name: a 4070 Ti is not a 4070 Ti Super.
    variants = re.compile(rf"(rtx-)?{re.escape(wanted)}-(sxm|\d+gb)")
    if found := [card for card in CARDS.values() if variants.fullmatch(card.name)]:
        return min(found, key=lambda card: card.memory_gib)
    longer = [card for card in CARDS if card.startswith((f"{wanted}-", f"rtx-{wanted}-"))]
    near = longer or difflib.get_close_matches(wanted, CARDS, n=4, cutoff=0.5)
    raise UserError(f"--card {name} is unknown: use {', '.join(near or CARDS)}")
