"""Fields that only lora-scripts' files have: LyCORIS, one preview, and a choice of checkpointing.

lycoris_algo = "lokr"        ->  network_args = ["algo=lokr"]
positive_prompts = "1girl"   ->  sample_prompt = ["1girl --w 512"]
sample_width = 512
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.sd_scripts import PREVIEW_TIMES, Item
from anima_fast.migrate.values import is_off
from anima_fast.options.network_args import LYCORIS

LYCORIS_WORDS = {"lycoris_algo": "algo", "lokr_factor": "factor", "full_matrix": "full_matrix"}
PREVIEW_WORDS = {
    "negative_prompts": "--n", "sample_width": "--w", "sample_height": "--h", "sample_cfg": "--l",
    "sample_steps": "--s", "sample_seed": "--d",
}  # fmt: skip


# Value of anima_checkpoint_mode -> the option it stands for.
CHECKPOINTS = {
    "standard": "gradient_checkpointing", "cpu": "cpu_offload_checkpointing",
    "unsloth": "unsloth_offload_checkpointing",
}  # fmt: skip


def join_fields(items: list[Item], ledger: Ledger) -> list[Item]:
    """The items with such fields put together into options; files without them stay as they are."""
    items = [
        replace(item, name=CHECKPOINTS[item.value], value=True)
        if item.name == "anima_checkpoint_mode" and item.value in CHECKPOINTS
        else item
        for item in items
    ]
    given = {item.name: item for item in items}
    return _preview(_lycoris(items, given, ledger), given, ledger)


def _lycoris(items: list[Item], given: dict[str, Item], ledger: Ledger) -> list[Item]:
    fields = [item for item in items if item.name in LYCORIS_WORDS and not is_off(item.value)]
    if not fields or _value(given, "network_module") != LYCORIS:
        return items
    words = [f"{LYCORIS_WORDS[item.name]}={item.value}" for item in fields]
    args = _value(given, "network_args") or []
    words += [args] if isinstance(args, str) else args
    joined = [*fields, *(item for item in items if item.name == "network_args")]
    return _join(items, joined, Item("fields of LyCORIS", "network_args", words), ledger)


def _preview(items: list[Item], given: dict[str, Item], ledger: Ledger) -> list[Item]:
    fields = [item for item in items if item.name in (*PREVIEW_WORDS, "positive_prompts")]
    switch = given.get("enable_preview")
    if switch is not None and is_off(switch.value):
        fields += [item for item in items if item.name in PREVIEW_TIMES]
        for item in fields:
            ledger.drop(item.key, "previews are off")
        return [item for item in items if item not in fields]
    text = _value(given, "positive_prompts")
    if not text:
        return items
    words = [
        f"{PREVIEW_WORDS[item.name]} {item.value}"
        for item in fields
        if item.name in PREVIEW_WORDS and item.value not in ("", 0)
    ]
    prompt = Item("fields of the preview", "sample_prompt", [" ".join([str(text), *words])])
    if switch is not None:
        fields.append(switch)
    return _join(items, fields, prompt, ledger)


def _join(items: list[Item], joined: list[Item], one: Item, ledger: Ledger) -> list[Item]:
    for item in joined:
        ledger.take_elsewhere(item.key, one.name)
    ledger.extend({one.key: one.value})
    return [*(item for item in items if item not in joined), one]


def _value(given: dict[str, Item], name: str) -> Any:
    return given[name].value if name in given else None
