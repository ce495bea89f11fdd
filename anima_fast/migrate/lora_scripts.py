"""Fields that only lora-scripts' files have: LyCORIS, one preview, and a choice of checkpointing.

lycoris_algo = "lokr"        ->  network_args = ["algo=lokr"]
positive_prompts = "1girl"   ->  sample_prompt = ["1girl --w 512"]
sample_width = 512
"""

from __future__ import annotations

from anima_fast.migrate.ledger import Ledger, is_off
from anima_fast.migrate.rows import Item
from anima_fast.options.network_args import LYCORIS

PREVIEW_TIMES = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
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
        item._replace(name=CHECKPOINTS[item.value], value=True)
        if item.name == "anima_checkpoint_mode" and item.value in CHECKPOINTS
        else item
        for item in items
    ]
    given = {item.name: item for item in items}
    return _preview(_lycoris(items, given, ledger), given, ledger)


def _lycoris(items: list[Item], given: dict[str, Item], ledger: Ledger) -> list[Item]:
    fields = [item for item in items if item.name in LYCORIS_WORDS and not is_off(item.value)]
    if not fields or "network_module" not in given or given["network_module"].value != LYCORIS:
        return items
    words = [f"{LYCORIS_WORDS[item.name]}={item.value}" for item in fields]
    if "network_args" in given:
        args = given["network_args"].value or []
        words += [args] if isinstance(args, str) else args
        fields.append(given["network_args"])
    return _join(items, fields, Item("fields of LyCORIS", "network_args", words), ledger)


def _preview(items: list[Item], given: dict[str, Item], ledger: Ledger) -> list[Item]:
    fields = [item for item in items if item.name in (*PREVIEW_WORDS, "positive_prompts")]
    switch = given.get("enable_preview")
    if switch is not None and is_off(switch.value):
        fields += [item for item in items if item.name in PREVIEW_TIMES]
        for item in fields:
            ledger.drop(item.key, "previews are off")
        return [item for item in items if item not in fields]
    if "positive_prompts" not in given or not given["positive_prompts"].value:
        return items
    words = [
        f"{PREVIEW_WORDS[item.name]} {item.value}"
        for item in fields
        if item.name in PREVIEW_WORDS and item.value not in ("", 0)
    ]
    text = " ".join([str(given["positive_prompts"].value), *words])
    fields += [switch] if switch is not None else []
    return _join(items, fields, Item("fields of the preview", "sample_prompt", [text]), ledger)


def _join(items: list[Item], joined: list[Item], one: Item, ledger: Ledger) -> list[Item]:
    for item in joined:
        ledger.place(item.key, one.name)
    ledger.extend({one.key: one.value})
    return [*(item for item in items if item not in joined), one]
