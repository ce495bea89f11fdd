"""Length, saving, types of numbers and memory of OneTrainer as our options."""

from __future__ import annotations

from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.onetrainer_tables import DEFAULTS, DTYPES

# Of the 2B model, for fractions of it.
BLOCKS = 28
KERNELS = "the blocks run through kernels of their own, which --compile would turn off"


def convert_length(ledger: Ledger) -> None:
    """Epochs, batches, and how often is saved. Comes after the concepts, which may set epochs."""
    key = "epochs"
    if "max_train_epochs" in ledger.options:
        pass
    elif ledger.has(key):
        why = "a batch that is not full ends an epoch here, and is left out there"
        ledger.change(key, "max_train_epochs", int(ledger.number(key, 1)), why)
    else:
        ledger.add("max_train_epochs", DEFAULTS["epochs"], "OneTrainer's default")
    key = "gradient_accumulation_steps"
    if ledger.has(key):
        ledger.take(key, value=int(ledger.number(key, 1)))
    _every(ledger, "save_every", "save_every_unit")
    _every(ledger, "save_after", "save_after_unit")
    key, unit = "backup_after", str(ledger.get("backup_after_unit", "MINUTE"))
    minutes = {"SECOND": 1 / 60, "MINUTE": 1.0, "HOUR": 60.0}.get(unit)
    if ledger.has(key) and minutes:
        ledger.take(key, "autosave_minutes", ledger.number(key) * minutes)
    elif ledger.has(key):
        ledger.drop(key, "it is off" if unit == "NEVER" else "states are saved every few minutes")
    if ledger.has("backup_after_unit"):
        ledger.drop("backup_after_unit", "minutes are the unit here")


def _every(ledger: Ledger, key: str, unit_key: str) -> None:
    """How often a file is saved: a number and its unit are one option each here."""
    if not ledger.has(key):
        return
    unit, number = str(ledger.get(unit_key, "NEVER")), int(ledger.number(key))
    option = {"EPOCH": "save_every_n_epochs", "STEP": "save_every_n_steps"}.get(unit)
    if option and number > 0:
        ledger.take(key, option, number)
    else:
        why = "it is off" if unit == "NEVER" or not number else "files are saved by epochs or steps"
        ledger.drop(key, why)
    if ledger.has(unit_key):
        ledger.drop(unit_key, "the unit is part of the option's name here")


def convert_memory(ledger: Ledger, command: str) -> None:
    """Types of numbers, checkpointing, offloading, compilation, attention."""
    _precision(ledger, command)
    checkpointing = _checkpointing(ledger)
    offload, fraction = _offloading(ledger)
    if fraction > 0:
        ledger.options["blocks_to_swap"] = min(BLOCKS - 2, round(fraction * BLOCKS))
    if offload and checkpointing and fraction <= 0:
        ledger.options["unsloth_offload_checkpointing"] = True
    elif checkpointing:
        ledger.options["gradient_checkpointing"] = True
    key = "compile"
    if ledger.has(key) and ledger.get(key) and command == "finetune":
        ledger.take(key)
    elif ledger.has(key):
        ledger.drop(key, KERNELS if ledger.get(key) else "it is off")
    key = "attention_mechanism"
    modes = {"FLASH": "flash", "XFORMERS": "xformers", "FLASH_ATTENTION": "flash"}
    if ledger.has(key):
        ledger.take(key, "attn_mode", modes.get(str(ledger.get(key)), "torch"))


def _precision(ledger: Ledger, command: str) -> None:
    key = "train_dtype"
    name = str(ledger.get(key, DEFAULTS[key]))
    ours = DTYPES.get(name, "bf16")
    if not ledger.has(key):
        ledger.add("mixed_precision", ours, "OneTrainer's default")
    elif name in DTYPES:
        ledger.take(key, "mixed_precision", ours)
    else:
        ledger.change(key, "mixed_precision", ours, "this type does not exist here")
    if name == "TFLOAT_32":
        ledger.add("cuda_allow_tf32", True, "train_dtype is TFLOAT_32")
    key = "transformer.weight_dtype"
    if not ledger.has(key):
        return
    weights = str(ledger.get(key))
    if command == "finetune" and weights == "BFLOAT_16":
        ledger.take(key, "full_bf16", True)
    elif weights in DTYPES or weights == "NONE":
        ledger.drop(key, "frozen weights have the type of mixed_precision")
    else:
        ledger.drop(key, "8-bit base weights are not supported: blocks_to_swap saves memory")


def _checkpointing(ledger: Ledger) -> bool:
    """Whether blocks are computed again; older files say it once for all parts."""
    on = bool(DEFAULTS["gradient_checkpointing"])
    for key in ("gradient_checkpointing", "transformer.gradient_checkpointing"):
        if ledger.has(key):
            on = str(ledger.get(key)).upper() not in ("OFF", "FALSE", "NONE")
            if on:
                ledger.take_elsewhere(key, "gradient_checkpointing")
            else:
                ledger.drop(key, "it is off")
    return on


def _offloading(ledger: Ledger) -> tuple[bool, float]:
    """Whether activations wait in host memory, and the fraction of the layers that do."""
    whole = str(ledger.get("gradient_checkpointing", "")).upper() == "CPU_OFFLOADED"
    key, old = "transformer.activation_offloading", "enable_activation_offloading"
    activations = bool(ledger.get(key)) or (whole and bool(ledger.get(old, True)))
    if ledger.has(key):
        ledger.take_elsewhere(key, "unsloth_offload_checkpointing or blocks_to_swap")
    fraction = 0.0
    for name in ("transformer.offload_fraction", "layer_offload_fraction"):
        if ledger.has(name):
            counts = name.startswith("transformer") or whole
            fraction = max(fraction, ledger.number(name) if counts else 0.0)
            swap = f"{min(BLOCKS - 2, round(fraction * BLOCKS))} of {BLOCKS} blocks"
            if fraction > 0:
                ledger.change(name, None, None, f"blocks_to_swap: {swap}, which are counted here")
            else:
                ledger.drop(name, "it is off")
    return activations, fraction
