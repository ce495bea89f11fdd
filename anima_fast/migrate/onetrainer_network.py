"""The adapter of OneTrainer, the layers that it sits on, and the running mean."""

from __future__ import annotations

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.onetrainer_tables import DEFAULTS
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.values import is_off

MODULES = {"LORA": "networks.lora_anima", "LOHA": "networks.loha", "LOKR": "networks.lokr"}
# What a comma-separated part of layer_filter finds in diffusers' names -> layers here.
FILTERS = {
    "attn1": r"blocks\.\d+\.self_attn\..*", "attn2": r"blocks\.\d+\.cross_attn\..*",
    "ff": r"blocks\.\d+\.mlp\..*", "attn": r"blocks\.\d+\.(self|cross)_attn\..*",
    "transformer_block": r"blocks\.\d+\..*",
}  # fmt: skip
# The layers that a LoRA has here by default.
DEFAULT_LAYERS = ("attn1", "attn2", "ff")


def convert_network(ledger: Ledger, paths: Paths) -> None:
    """peft_type, ranks, alpha, dropout, DoRA and what the network starts from."""
    kind = str(ledger.get("peft_type", "LORA"))
    if kind not in MODULES:
        raise UserError(f"peft_type {kind} does not exist here: use LORA, LOHA or LOKR")
    if ledger.has("peft_type"):
        ledger.take("peft_type", "network_module", MODULES[kind])
    rank = "lokr_dim" if kind == "LOKR" else "lora_rank"
    for key, option in ((rank, "network_dim"), ("lora_alpha", "network_alpha")):
        value = ledger.number(key, DEFAULTS[key])
        value = int(value) if option == "network_dim" else value
        if ledger.has(key):
            ledger.take(key, option, value)
        else:
            ledger.add(option, value, "OneTrainer's default")
    if kind == "LOKR" and ledger.has("lora_rank"):
        ledger.drop("lora_rank", "a LoKr has lokr_dim")
    _dropout(ledger, kind)
    key = "lora_model_name"
    if not is_off(ledger.get(key)):
        path, _ = paths.resolve(str(ledger.get(key)))
        ledger.take(key, "network_weights", path)
    elif ledger.has(key):
        ledger.drop(key, "it is not set")
    words = _words(ledger, kind)
    if words:
        ledger.put("network_args", words, "the settings above, as words")


def _dropout(ledger: Ledger, kind: str) -> None:
    key = "dropout_probability"
    if not ledger.has(key):
        return
    if is_off(ledger.get(key)):
        ledger.drop(key, "it is off")
    elif kind == "LORA":
        ledger.take(key, "network_dropout", ledger.number(key))
    else:
        ledger.drop(key, "only a LoRA has one; rank_dropout in network_args is for all")


def _words(ledger: Ledger, kind: str) -> list[str]:
    """network_args: DoRA, and what a LoKr has."""
    dora, outputs = "lora_decompose", "lora_decompose_output_axis"
    if kind == "LOKR":
        dora, outputs = "lokr_weight_decompose", "lokr_dora_on_output"
    words = []
    on = bool(ledger.get(dora))
    # On the rows of the weight in a LoKr unless it says otherwise, on its columns in a LoRA.
    axis = bool(ledger.get(outputs, kind == "LOKR"))
    if on:
        words += ["dora_wd=True", f"wd_on_output={axis}"]
    for key in (dora, outputs):
        if ledger.has(key) and on:
            ledger.take_elsewhere(key, "network_args dora_wd")
        elif ledger.has(key):
            ledger.drop(key, "DoRA is off")
    for key in ("lora_decompose", "lora_decompose_output_axis"):
        if ledger.has(key):
            ledger.drop(key, "it is about LoRA and LoHa")
    if kind == "LOKR":
        for key, word in (
            ("lokr_decompose_factor", "factor"), ("lokr_decompose_both", "decompose_both"),
            ("lokr_full_matrix", "full_matrix"),
        ):  # fmt: skip
            value = ledger.get(key)
            if ledger.has(key) and (is_off(value) or value == -1):
                ledger.drop(key, "as here by default")
            elif ledger.has(key):
                words.append(f"{word}={value}")
                ledger.take_elsewhere(key, f"network_args {word}")
    return words


def convert_layers(ledger: Ledger) -> None:
    """layer_filter: parts of diffusers' names, or nothing for all layers."""
    text = str(ledger.get("layer_filter", "") or "")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in parts if part not in FILTERS]
    regex = bool(ledger.get("layer_filter_regex"))
    if ledger.has("layer_filter_regex"):
        ledger.drop("layer_filter_regex", "it says how layer_filter is read")
    if regex or unknown:
        if ledger.has("layer_filter"):
            ledger.drop("layer_filter", "it is about names of diffusers, which are others here")
        ledger.todo.append(
            f"layer_filter {text!r}: choose layers with include_patterns and exclude_patterns in "
            "network_args; attention and MLP of all blocks are trained"
        )
        return
    words, what = _patterns(parts)
    if ledger.has("layer_filter"):
        ledger.change("layer_filter", None, None, what)
    if words:
        given = ledger.options.get("network_args", [])
        ledger.put("network_args", [*given, *words], what)


def _patterns(parts: list[str]) -> tuple[list[str], str]:
    """network_args for the layers of a filter, and the sentence about it."""
    if not parts or "transformer_block" in parts:
        what = "all layers of the blocks, AdaLN modulation included"
        if not parts:
            what += "; layers outside the blocks get no adapters here"
        return [r"include_patterns=blocks[.]\d+[.]adaln_modulation_.*"], what
    chosen = {"attn1", "attn2"} & set(parts) | {"ff"} & set(parts)
    if "attn" in parts:
        chosen |= {"attn1", "attn2"}
    left_out = [FILTERS[part] for part in DEFAULT_LAYERS if part not in chosen]
    if not left_out:
        return [], "attention and MLP of all blocks, as here by default"
    return [f"exclude_patterns={left_out}"], "the same layers under their names here"


def freeze_parts(ledger: Ledger) -> None:
    """Full fine-tuning: layer_filter chooses what is trained, and the LLM adapter never is."""
    ledger.add("llm_adapter_lr", 0.0, "OneTrainer does not train the LLM adapter")
    text = str(ledger.get("layer_filter", "") or "")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if "attn" in parts:
        parts += ["attn1", "attn2"]
    whole = not parts or "transformer_block" in parts
    rates = {"attn1": "self_attn_lr", "attn2": "cross_attn_lr", "ff": "mlp_lr"}
    if ledger.has("layer_filter_regex"):
        ledger.drop("layer_filter_regex", "it says how layer_filter is read")
    if whole:
        why = "layers outside the blocks are trained too here" if parts else "all layers"
    elif set(parts) <= {*FILTERS} and not ledger.get("layer_filter_regex"):
        why = "rates of 0 freeze the other parts; layers outside the blocks are trained too here"
        for part, option in rates.items():
            if part not in parts:
                ledger.add(option, 0.0, "not in layer_filter")
        ledger.add("mod_lr", 0.0, "not in layer_filter")
    else:
        why = "its names are others here: all parts are trained"
        ledger.todo.append(f"layer_filter {text!r}: freeze parts with rates such as mlp_lr = 0")
    if ledger.has("layer_filter"):
        ledger.change("layer_filter", None, None, why)


def convert_ema(ledger: Ledger) -> None:
    """The running mean of the adapter."""
    if not ledger.has("ema"):
        return
    if str(ledger.get("ema")) == "OFF":
        ledger.drop("ema", "it is off")
        return
    decay = ledger.number("ema_decay", 0.999)
    interval = max(1, int(ledger.number("ema_update_step_interval", 5)))
    value = round(decay ** (1 / interval), 6)
    why = f"{decay:g} every {interval} steps; the mean is saved beside the LoRA as NAME-ema"
    ledger.change("ema", "ema_decay", value, why)
    for key in ("ema_decay", "ema_update_step_interval"):
        if ledger.has(key):
            ledger.take_elsewhere(key, "ema_decay")
