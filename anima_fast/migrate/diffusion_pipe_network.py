"""[adapter] of diffusion-pipe, and the rates of parts, as our network options.

Adapters sit there on every linear layer of the DiT's blocks, those of AdaLN modulation included,
and on those of the LLM adapter unless its rate is 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.diffusion_pipe_tables import FORK_PARTS, PART_PATTERNS
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.values import is_off

MODULES = {"lora": "networks.lora_anima", "lokr": "networks.lokr"}
# A rank above this stands for whole matrices in a LoKr.
LARGEST_RANK = 4096
ADALN_LAYERS = [
    f"adaln_modulation_{part}.{i}" for part in ("self_attn", "cross_attn", "mlp") for i in (1, 2)
]


@dataclass
class _Layers:
    """What goes into network_args: single words, and patterns."""

    words: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    rates: list[str] = field(default_factory=list)


def convert_adapter(ledger: Ledger, paths: Paths, config: Mapping[str, Any]) -> None:
    """Settle [adapter] and the rates of parts of a LoRA or LoKr."""
    kind = str(ledger.get("adapter.type", "lora"))
    if kind not in MODULES:
        raise UserError(f"[adapter] type {kind!r} is unknown: lora and lokr can be converted")
    if ledger.has("adapter.type"):
        ledger.take("adapter.type", "network_module", MODULES[kind])
    layers = _Layers()
    _rank(ledger, layers)
    _dropouts(ledger, layers, kind)
    _start(ledger, paths, config["adapter"])
    _llm_adapter(ledger, config, layers)
    _parts(ledger, layers)
    _exclusions(ledger, layers)
    _write(ledger, layers)


def convert_part_rates(ledger: Ledger) -> None:
    """Settle the rates of parts of a full fine-tuning, which have the same names here."""
    for part in PART_PATTERNS:
        if ledger.has(f"model.{part}_lr"):
            ledger.take(f"model.{part}_lr", f"{part}_lr", ledger.number(f"model.{part}_lr"))


def _rank(ledger: Ledger, layers: _Layers) -> None:
    if not ledger.has("adapter.rank"):
        return
    rank = int(ledger.number("adapter.rank"))
    if rank > LARGEST_RANK:
        layers.words.append("full_matrix=True")
        why = "a rank this high stands for whole matrices: full_matrix=True in network_args"
        rank = LARGEST_RANK
        ledger.change("adapter.rank", "network_dim", rank, why)
    else:
        ledger.take("adapter.rank", "network_dim", rank)
    ledger.add("network_alpha", float(rank), "there alpha is always the rank")


def _dropouts(ledger: Ledger, layers: _Layers, kind: str) -> None:
    key = "adapter.dropout"
    if not is_off(ledger.get(key)) and kind == "lora":
        why = "on the output of the down projection here, on its input there"
        ledger.change(key, "network_dropout", ledger.number(key), why)
    elif ledger.has(key):
        ledger.drop(key, "it is off" if is_off(ledger.get(key)) else "a LoKr has none")
    for name, word in (
        ("decompose_factor", "factor"), ("factor", "factor"), ("rank_dropout", "rank_dropout"),
    ):  # fmt: skip
        key = f"adapter.{name}"
        if ledger.has(key) and (is_off(ledger.get(key)) or (word == "factor" and kind == "lora")):
            ledger.drop(key, "it has no effect")
        elif ledger.has(key):
            layers.words.append(f"{word}={ledger.get(key)}")
            ledger.take_elsewhere(key, f"network_args {word}")


def _start(ledger: Ledger, paths: Paths, adapter: Mapping[str, Any]) -> None:
    key = "adapter.init_from_existing"
    if not is_off(ledger.get(key)):
        path, _ = paths.resolve(str(ledger.get(key)))
        file = path if path.endswith(".safetensors") else f"{path}/adapter_model.safetensors"
        ledger.change(key, "network_weights", file, "the file in that folder")
    fused = adapter.get("fuse_adapters") or []
    if all(isinstance(entry, Mapping) and entry.get("path") for entry in fused) and fused:
        files = [paths.resolve(str(entry["path"]))[0] for entry in fused]
        ledger.put("base_weights", files, "the files of adapter.fuse_adapters")
        weights = [
            ledger.number(f"adapter.fuse_adapters[{i}].weight", 1.0) for i in range(len(fused))
        ]
        ledger.put("base_weights_multiplier", weights, "their weights")
        for name in ledger.open_keys("adapter.fuse_adapters"):
            ledger.take_elsewhere(name, "base_weights")


def _llm_adapter(ledger: Ledger, config: Mapping[str, Any], layers: _Layers) -> None:
    """It is trained there unless its rate is 0, or a fork's switch says otherwise."""
    switch = config["model"].get("train_llm_adapter", config.get("train_llm_adapter"))
    rate = config["model"].get("llm_adapter_lr")
    trained = bool(switch) if switch is not None else ledger.number("model.llm_adapter_lr", 1) > 0
    for key in ("model.train_llm_adapter", "train_llm_adapter"):
        if ledger.has(key):
            ledger.take_elsewhere(key, "network_args train_llm_adapter")
    if trained:
        layers.words.append("train_llm_adapter=True")
    if trained and rate is None and switch is None:
        ledger.todo.append(
            "there the LLM adapter is trained when llm_adapter_lr is left out, which the model's "
            "authors advise against: take train_llm_adapter=True out of network_args if you did "
            "not mean it"
        )
    if not trained and ledger.has("model.llm_adapter_lr"):
        ledger.take_elsewhere("model.llm_adapter_lr", "no modules for the LLM adapter")


def _parts(ledger: Ledger, layers: _Layers) -> None:
    for part, pattern in PART_PATTERNS.items():
        key = f"model.{part}_lr"
        if ledger.has(key):
            layers.rates.append(f"{pattern}={ledger.number(key):g}")
            ledger.take_elsewhere(key, f"network_args network_reg_lrs {pattern}")
    for name, pattern in FORK_PARTS.items():
        if ledger.has(f"model.{name}"):
            if not ledger.get(f"model.{name}"):
                layers.excluded.append(pattern)
            ledger.take_elsewhere(f"model.{name}", "network_args")


def _exclusions(ledger: Ledger, layers: _Layers) -> None:
    """peft's exclude_modules: a regular expression, or names that match as endings."""
    key = "adapter.exclude_modules"
    value = ledger.get(key)
    if not ledger.has(key):
        return
    if isinstance(value, str):
        layers.excluded.append(value)
    else:
        layers.excluded += [rf"(.*\.)?{re.escape(str(name))}" for name in value or []]
    try:
        re.compile("|".join(layers.excluded))
    except re.error as error:
        raise UserError(f"{key}: {value!r} is no regular expression ({error})") from None
    ledger.take_elsewhere(key, "network_args exclude_patterns")


def _write(ledger: Ledger, layers: _Layers) -> None:
    words, why = layers.words, "the layers that it trains"
    # Here an include pattern beats every exclude pattern.
    modulation = [
        layer
        for layer in ADALN_LAYERS
        if not any(re.fullmatch(p, f"blocks.0.{layer}") for p in layers.excluded)
    ]
    if modulation:
        whole = len(modulation) == len(ADALN_LAYERS)
        names = ["adaln_modulation_.*"] if whole else [re.escape(name) for name in modulation]
        words.append(f"include_patterns={[f'blocks[.][0-9]+[.]{name}' for name in names]}")
        why += "; AdaLN modulation gets adapters there too"
    if layers.excluded:
        words.append(f"exclude_patterns={layers.excluded}")
    if layers.rates:
        words.append(f"network_reg_lrs={','.join(layers.rates)}")
    if words:
        ledger.put("network_args", words, why)
