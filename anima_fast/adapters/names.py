"""Names of adapted modules in the dialects that programs read.

A module's own name is dotted: `blocks.0.self_attn.q_proj` (DiT), `llm_adapter.blocks.0.mlp.0`,
`text_encoder.layers.0.mlp.up_proj`. Underscores are part of names, so a flat name cannot be turned
back by replacing them: it is looked up among the modules that exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from anima_fast.models.adapter_kinds import MARKS

DIALECTS = ("kohya", "comfyui", "diffusers")
# Names that are read here but not by image programs, so never written.
OTHER = "other"
TEXT_ENCODER = "text_encoder."
ADAPTER = "llm_adapter."

# Every module of the DiT, with its name in diffusers' CosmosTransformer3DModel; "#" stands for the
# number of a block.
DIFFUSERS = {
    **{
        f"blocks.#.{ours}.{a}": f"transformer_blocks.#.{theirs}.{b}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (
            ("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("output_proj", "to_out.0"),
        )
    },
    "blocks.#.mlp.layer1": "transformer_blocks.#.ff.net.0.proj",
    "blocks.#.mlp.layer2": "transformer_blocks.#.ff.net.2",
    **{
        f"blocks.#.adaln_modulation_{branch}.{n}": f"transformer_blocks.#.norm{i}.linear_{n}"
        for i, branch in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for n in (1, 2)
    },
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}  # fmt: skip
DIFFUSERS_TEXT = "text_conditioner."
DIFFUSERS_DIT = "transformer."
ADAPTER_MODULES = (
    *(f"{a}.{p}_proj" for a in ("self_attn", "cross_attn") for p in "qkvo"), "mlp.0", "mlp.2",
)  # fmt: skip
TEXT_ENCODER_MODULES = (
    *(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
)  # fmt: skip
MODULES = (
    *DIFFUSERS,
    *(f"{ADAPTER}blocks.#.{module}" for module in ADAPTER_MODULES),
    # Not adapted by default, but files of other trainers may have them.
    f"{ADAPTER}in_proj",
    f"{ADAPTER}out_proj",
    *(f"{TEXT_ENCODER}layers.#.{module}" for module in TEXT_ENCODER_MODULES),
)
NUMBER = re.compile(r"(?:(?<=blocks[._])|(?<=layers[._]))\d+(?=[._])")

COMFYUI_PREFIXES = (
    (TEXT_ENCODER, "text_encoders.qwen3_06b.transformer.model."),
    ("", "diffusion_model."),
)

# LyCORIS' own wrapper, on our modules or (SimpleTuner) on those of diffusers.
LYCORIS = "lycoris_"
PEFT = "base_model.model."
# Prefixes that other tools leave on a module's own name.
OTHER_PREFIXES = ("diffusion_model.", DIFFUSERS_DIT, "net.", "")


def flat_name(name: str) -> str:
    """Dotted → the flat name of sd-scripts (`lora_unet_...`, `lora_te_...`)."""
    if name.startswith(TEXT_ENCODER):
        return "lora_te_" + name[len(TEXT_ENCODER) :].replace(".", "_")
    return "lora_unet_" + name.replace(".", "_")


FROM_FLAT = {flat_name(module): module for module in MODULES}
FROM_DIFFUSERS = {theirs: ours for ours, theirs in DIFFUSERS.items()}
FROM_FLAT_DIFFUSERS = {theirs.replace(".", "_"): ours for theirs, ours in FROM_DIFFUSERS.items()}


def _looked_up(name: str, table: Mapping[str, str]) -> str | None:
    """The result of a table, for any number of layers; None when it has no such module."""
    number = NUMBER.search(name)
    found = table.get(NUMBER.sub("#", name, count=1))
    if found is None or "#" not in found:
        return found
    return found.replace("#", number[0]) if number else None


def from_flat(flat: str) -> str | None:
    """Flat → dotted, for any number of layers; None when no such module exists."""
    return _looked_up(flat, FROM_FLAT)


def comfyui_name(name: str) -> str:
    """Dotted → ComfyUI's name."""
    prefix, theirs = next(p for p in COMFYUI_PREFIXES if name.startswith(p[0]))
    return theirs + name[len(prefix) :]


def from_comfyui(name: str) -> str | None:
    """ComfyUI's name → dotted; None when it has none of its prefixes."""
    for ours, theirs in COMFYUI_PREFIXES:
        if name.startswith(theirs):
            dotted = ours + name[len(theirs) :]
            # ComfyUI has the text encoder under its own prefix only.
            return None if dotted.startswith(TEXT_ENCODER) and not ours else dotted
    return None


def diffusers_name(name: str) -> str | None:
    """Dotted → diffusers' name; None for the text encoder, which diffusers loads no LoRA for."""
    if name.startswith(ADAPTER):
        return DIFFUSERS_TEXT + name[len(ADAPTER) :]
    theirs = _looked_up(name, DIFFUSERS)
    return theirs and DIFFUSERS_DIT + theirs


def from_diffusers(name: str) -> str | None:
    """diffusers' name → dotted; None when no such module exists."""
    if name.startswith(DIFFUSERS_TEXT):
        return ADAPTER + name[len(DIFFUSERS_TEXT) :]
    if not name.startswith(DIFFUSERS_DIT):
        return None
    return _looked_up(name[len(DIFFUSERS_DIT) :], FROM_DIFFUSERS)


def from_other(name: str) -> str | None:
    """A name of LyCORIS' wrapper or of PEFT, or with a checkpoint's prefix or none → dotted."""
    if name.startswith(LYCORIS):
        flat = name[len(LYCORIS) :]
        return from_flat(f"lora_unet_{flat}") or _looked_up(flat, FROM_FLAT_DIFFUSERS)
    name = name.removeprefix(PEFT)
    for prefix in OTHER_PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            return from_diffusers(DIFFUSERS_DIT + name) or name
    return None


def to_dialect(name: str, dialect: str) -> str | None:
    """A dotted name in a dialect; None when the dialect has no name for it."""
    return {"kohya": flat_name, "comfyui": comfyui_name, "diffusers": diffusers_name}[dialect](name)


def detect_dialect(keys: Iterable[str]) -> str | None:
    """The dialect of a file's keys, or `OTHER`; None when it has no LoRA of this model."""
    keys = list(keys)
    # diffusers has no `transformer.blocks.`, whatever the other keys are.
    if any(key.startswith(f"{DIFFUSERS_DIT}blocks.") for key in keys):
        return OTHER
    for dialect, prefixes in (
        ("kohya", ("lora_unet_", "lora_te_")),
        ("comfyui", tuple(theirs for _, theirs in COMFYUI_PREFIXES)),
        ("diffusers", (DIFFUSERS_DIT, DIFFUSERS_TEXT)),
    ):
        if any(key.startswith(prefixes) for key in keys):
            return dialect
    others = (LYCORIS, PEFT, "net.blocks.", "blocks.")
    # A checkpoint has such names too, but no matrices of a network.
    own = (k for k in keys if any(mark in k for mark in MARKS))
    return OTHER if any(key.startswith(others) for key in own) else None


def from_dialect(name: str, dialect: str) -> str | None:
    """The dotted name of a module of a dialect; None when Anima has no such module."""
    readers = {"kohya": from_flat, "comfyui": from_comfyui, "diffusers": from_diffusers}
    dotted = (readers | {OTHER: from_other})[dialect](name)
    # Other models use the same prefixes: only names in the table of modules are accepted.
    return dotted if dotted and from_flat(flat_name(dotted)) == dotted else None
