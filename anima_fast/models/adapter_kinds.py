"""The kinds of adapter, declared once: LoRA, LoHa and LoKr, each with or without DoRA's magnitudes.

Whatever names a kind reads it here: the command line (options/network_args.py), what recognises a
file (checkpoint.py), the networks and their formats (adapters/), the tools, and `inspect`. Imports
nothing, so that --help does not load torch.

To add a kind, write

- a row here, in `ADAPTER_KINDS`;
- a class in adapters/deltas.py, in `DELTAS`: Δ from the matrices that a file holds;
- a class in adapters/ that trains it, in `LAYERS` of adapters/lora.py: Δ(x) and initial values;
- its title in docs/methods.md and docs/lora-files.md, and docs/options.md made again.

A kind with settings of its own also needs them in options/network_args.py and in `add_lora`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class AdapterKind:
    """A row of the table.

    Attributes:
        word, title: as `add_lora` takes it, as users write it.
        module: its `network_module` in sd-scripts, and `ss_network_module` in files.
        algorithms: names that `algo` of lycoris.kohya has for it.
        mark: how the last part of its keys in a file begins.
        prefix: what precedes a matrix's name in its suffix; empty for LoRA, whose two suffixes
            differ between dialects (adapters/formats.py).
        products: suffixes of the pairs that are multiplied: left [.., R], right [R, ..].
        full: suffixes of the matrices that may replace these products, in the same order.
    """

    word: str
    title: str
    module: str
    algorithms: tuple[str, ...]
    mark: str
    prefix: str
    products: tuple[tuple[str, str], ...]
    full: tuple[str, ...] = ()

    def is_complete(self, suffixes: Collection[str]) -> bool:
        """Whether a module with tensors of these suffixes has all matrices of this kind."""
        return all(
            full in suffixes or (left in suffixes and right in suffixes)
            for (left, right), full in zip_longest(self.products, self.full)
        )


LORA = AdapterKind(
    "lora", "LoRA", "networks.lora_anima", ("lora", "locon"), "lora_", "", (("up", "down"),)
)
LOHA = AdapterKind(
    "loha", "LoHa", "networks.loha", ("loha",), "hada_", "hada_",
    (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
)  # fmt: skip
LOKR = AdapterKind(
    "lokr", "LoKr", "networks.lokr", ("lokr",), "lokr_", "lokr_",
    (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")), ("lokr_w1", "lokr_w2"),
)  # fmt: skip
ADAPTER_KINDS = (LORA, LOHA, LOKR)

# Any kind becomes a DoRA by magnitudes, a tensor of this suffix; only LyCORIS trains those.
DORA = "DoRA"
MAGNITUDES = "dora_scale"
LYCORIS = "lycoris.kohya"

# What the keys of a network file contain, whatever program wrote it.
MARKS = tuple(f".{kind.mark}" for kind in ADAPTER_KINDS)
# For help texts: "lora, loha or lokr", "LoRA, LoHa, LoKr or DoRA", "LoRA, LoHa or LoKr".
WORDS = f"{', '.join(kind.word for kind in ADAPTER_KINDS[:-1])} or {ADAPTER_KINDS[-1].word}"
TITLES = f"{', '.join(kind.title for kind in ADAPTER_KINDS)} or {DORA}"
KINDS = f"{', '.join(kind.title for kind in ADAPTER_KINDS[:-1])} or {ADAPTER_KINDS[-1].title}"


def kind_of(suffixes: Iterable[str]) -> AdapterKind:
    """The kind of a module from the suffixes of its tensors."""
    suffixes = list(suffixes)
    for kind in ADAPTER_KINDS:
        if kind.prefix and any(suffix.startswith(kind.prefix) for suffix in suffixes):
            return kind
    return LORA


def title_of(kind: AdapterKind, *, dora: bool) -> str:
    """What users call a network: LoRA, LoHa, LoKr, or DoRA when it has magnitudes."""
    return DORA if dora else kind.title


def module_of(kind: AdapterKind, *, dora: bool) -> str:
    """The `network_module` that trains and loads a network in sd-scripts."""
    return LYCORIS if dora else kind.module
