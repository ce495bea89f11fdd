"""Names of adapted modules in the dialects that programs read.

A module's own name is dotted: `blocks.0.self_attn.q_proj` (DiT), `llm_adapter.blocks.0.mlp.0`,
`text_encoder.layers.0.mlp.up_proj`. Underscores are part of names, so a flat name cannot be turned
back by replacing them: it is looked up among the modules that exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from anima_fast.models.adapter_kinds import MARKS

DIALECTS = ("kohya", "comfyui", "diffusers")
# Names that are read here but not by image programs, so never written.
OTHER = "other"
TEXT_ENCODER = "text_encoder."
ADAPTER = "llm_adapter."

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
BLOCK_MODULES = (
    *(f"{attn}.{proj}" for attn in ("self_attn", "cross_attn") for proj in ATTENTION),
    "mlp.layer1",
    "mlp.layer2",
    *(
        f"adaln_modulation_{branch}.{n}"
        for branch in ("self_attn", "cross_attn", "mlp")
        for n in (1, 2)
    ),
)
TOP_MODULES = (
    "x_embedder.proj.1",
    "t_embedder.1.linear_1",
    "t_embedder.1.linear_2",
    "final_layer.linear",
    "final_layer.adaln_modulation.1",
    "final_layer.adaln_modulation.2",
    # Not adapted by default, but files of other trainers may have them.
    f"{ADAPTER}in_proj",
    f"{ADAPTER}out_proj",
)
ADAPTER_MODULES = (
    *(f"{a}.{p}_proj" for a in ("self_attn", "cross_attn") for p in "qkvo"),
    "mlp.0",
    "mlp.2",
)
TEXT_ENCODER_MODULES = (
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
)
# (prefix of the dotted name, prefix of the flat name, modules of one layer)
LAYERED = (
    ("blocks", "lora_unet_blocks", BLOCK_MODULES),
    (f"{ADAPTER}blocks", "lora_unet_llm_adapter_blocks", ADAPTER_MODULES),
    (f"{TEXT_ENCODER}layers", "lora_te_layers", TEXT_ENCODER_MODULES),
)

COMFYUI_PREFIXES = (
    (TEXT_ENCODER, "text_encoders.qwen3_06b.transformer.model."),
    ("", "diffusion_model."),
)

# Module names of diffusers' CosmosTransformer3DModel.
DIFFUSERS_BLOCK = {
    **{
        f"{ours}.{a}": f"{theirs}.{b}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in zip(ATTENTION, ("to_q", "to_k", "to_v", "to_out.0"), strict=True)
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{branch}.{n}": f"norm{i}.linear_{n}"
        for i, branch in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for n in (1, 2)
    },
}
DIFFUSERS_TOP = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}
DIFFUSERS_TEXT = "text_conditioner."
DIFFUSERS_DIT = "transformer."

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


def from_flat(flat: str) -> str | None:
    """Flat → dotted, for any number of layers; None when no such module exists."""
    for dotted_prefix, flat_prefix, modules in LAYERED:
        if match := re.fullmatch(rf"{flat_prefix}_(\d+)_(.+)", flat):
            by_flat = {m.replace(".", "_"): m for m in modules}
            module = by_flat.get(match[2])
            return f"{dotted_prefix}.{match[1]}.{module}" if module else None
    return {flat_name(m): m for m in TOP_MODULES}.get(flat)


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
    if name.startswith(TEXT_ENCODER):
        return None
    if name.startswith(ADAPTER):
        return DIFFUSERS_TEXT + name[len(ADAPTER) :]
    if name in DIFFUSERS_TOP:
        return DIFFUSERS_DIT + DIFFUSERS_TOP[name]
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        module = DIFFUSERS_BLOCK.get(match[2])
        return f"{DIFFUSERS_DIT}transformer_blocks.{match[1]}.{module}" if module else None
    return None


def from_diffusers(name: str) -> str | None:
    """diffusers' name → dotted; None when no such module exists."""
    if name.startswith(DIFFUSERS_TEXT):
        return ADAPTER + name[len(DIFFUSERS_TEXT) :]
    if not name.startswith(DIFFUSERS_DIT):
        return None
    name = name[len(DIFFUSERS_DIT) :]
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", name):
        module = {v: k for k, v in DIFFUSERS_BLOCK.items()}.get(match[2])
        return f"blocks.{match[1]}.{module}" if module else None
    return {v: k for k, v in DIFFUSERS_TOP.items()}.get(name)


def from_other(name: str) -> str | None:
    """A name of LyCORIS' wrapper or of PEFT, or with a checkpoint's prefix or none → dotted."""
    if name.startswith(LYCORIS):
        flat = name[len(LYCORIS) :]
        return from_flat(f"lora_unet_{flat}") or _from_flat_diffusers(flat)
    name = name.removeprefix(PEFT)
    for prefix in OTHER_PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            return from_diffusers(DIFFUSERS_DIT + name) or name
    return None


def _from_flat_diffusers(flat: str) -> str | None:
    if match := re.fullmatch(r"transformer_blocks_(\d+)_(.+)", flat):
        module = {v.replace(".", "_"): k for k, v in DIFFUSERS_BLOCK.items()}.get(match[2])
        return f"blocks.{match[1]}.{module}" if module else None
    return {v.replace(".", "_"): k for k, v in DIFFUSERS_TOP.items()}.get(flat)


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
    reverse = {
        "kohya": from_flat,
        "comfyui": from_comfyui,
        "diffusers": from_diffusers,
        OTHER: from_other,
    }[dialect]
    dotted = reverse(name)
    # Other models use the same prefixes: only names in the table of modules are accepted.
    return dotted if dotted and from_flat(flat_name(dotted)) == dotted else None
