"""What a model file holds: DiT, LLM adapter, Qwen3 text encoder or VAE.

Every file but Qwen3's is handed to the loader of its kind with tensors on the meta device, which
have names, shapes and dtypes but no data. So what is said about loading is what loading does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from anima_fast.errors import UserError
from anima_fast.inspection.header import without_data
from anima_fast.models.checkpoint import (
    FOREIGN,
    PICKLES,
    Checkpoint,
    check_shapes,
    strip_prefix,
)
from anima_fast.models.dit import dit_tensors, load_dit
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.llm_adapter import AdapterConfig, adapter_tensors, load_llm_adapter
from anima_fast.models.text_encoder import Qwen3Shape, read_sizes
from anima_fast.models.vae_checkpoint import read_vae

# The sizes of Qwen3-0.6B (width, layers), and of the only DiT that sd-scripts takes (width, heads,
# blocks).
QWEN3_06B = (1024, 28)
SD_SCRIPTS_DIT = (2048, 16, 28)


def describe_dit(checkpoint: Checkpoint) -> dict:
    """Sizes of a DiT, its LLM adapter, and the prefix of its names."""
    prefix = strip_prefix(checkpoint.keys())
    own = dit_tensors(checkpoint)
    config = _sizes(DitConfig, own.shapes, checkpoint, "Anima DiT")
    adapter = adapter_tensors(checkpoint)
    inside = {key: key.removeprefix(prefix) for key in checkpoint.keys()}  # noqa: SIM118
    others = {
        key.split(".")[0]
        for key, name in inside.items()
        if not key.startswith(prefix) or FOREIGN.fullmatch(name)
    }
    refusals = [_refusal(load_dit, checkpoint)]
    facts = {
        "blocks": config.num_blocks,
        "width": config.model_channels,
        "heads": f"{config.num_heads} of {config.head_dim}",
        "context_width": config.context_dim,
        "mlp_width": config.mlp_hidden,
        "latent_channels": config.in_channels,
        "parameters": _parameters(own),
    }
    if adapter is None:
        facts["llm_adapter"] = "none: give its file with --llm_adapter_path"
    else:
        refusals.append(_refusal(load_llm_adapter, checkpoint))
        layers = len({n.split(".")[1] for n in adapter.shapes if n.startswith("blocks.")})
        facts["llm_adapter"] = f"bundled, {layers} layers, {_parameters(adapter):,} parameters"
    facts["prefix"] = prefix or "none"
    notes = [text for text in refusals if text]
    programs = {"anima-fast": "yes" if not notes else "no: see the note"}
    if not notes:
        programs |= _dit_programs(config, prefix, adapter is not None, bool(others))
    if others:
        notes.append(f"the file holds other models too, which are passed over: {_some(others)}")
    title = f"Anima DiT, {config.num_blocks} blocks of width {config.model_channels}"
    return {"title": title, "facts": facts, "programs": programs, "notes": notes}


def _dit_programs(
    config: DitConfig, prefix: str, bundled: bool, all_in_one: bool
) -> dict[str, str]:
    found = {}
    if bundled and prefix in ("net.", "model.diffusion_model."):
        found["ComfyUI"] = "yes"
    size = (config.model_channels, config.num_heads, config.num_blocks)
    if size != SD_SCRIPTS_DIT:
        found["sd-scripts"] = "no: it takes 28 blocks of width 2048 only"
    elif prefix not in ("net.", "") or all_in_one:
        found["sd-scripts"] = "no: it takes names with `net.` or without prefix only"
    elif not bundled:
        found["sd-scripts"] = "no: it needs the LLM adapter in the same file"
    else:
        found["sd-scripts"] = "yes"
    return found


def describe_adapter(checkpoint: Checkpoint) -> dict:
    """Sizes of an LLM adapter in a file of its own."""
    own = adapter_tensors(checkpoint)
    # An adapter is recognised by less than what loading needs.
    shapes = own.shapes if own else {}
    config = _sizes(AdapterConfig, shapes, checkpoint, "LLM adapter")
    refusal = _refusal(load_llm_adapter, checkpoint)
    facts = {
        "layers": config.layers,
        "width": config.width,
        "heads": f"{config.width // config.head_dim} of {config.head_dim}",
        "reads": f"Qwen3 states of width {config.source_width}",
        "gives": f"context of width {config.context_dim}",
        "vocabulary": config.vocabulary,
        "parameters": sum(map(prod, shapes.values())),
    }
    programs = {
        "anima-fast": "no: see the note" if refusal else "yes",
        "sd-scripts": "no: it takes the adapter inside the DiT file only",
    }
    notes = [refusal] if refusal else []
    return {"title": "LLM adapter of Anima", "facts": facts, "programs": programs, "notes": notes}


def describe_qwen3(path: Path) -> dict:
    """Sizes of a Qwen3 text encoder, a single file or a Hugging Face folder."""
    shape = read_sizes(path)
    files = qwen3_files(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= Checkpoint.open(file).shapes
    embedding = min((k for k in shapes if k.endswith("embed_tokens.weight")), key=len)
    prefix = embedding.removesuffix("embed_tokens.weight")
    refusal = _qwen3_refusal(shape, shapes, prefix)
    facts = {
        "form": f"Hugging Face folder, {len(files)} file{'s' * (len(files) > 1)}"
        if path.is_dir()
        else "single file",
        "layers": shape.num_hidden_layers,
        "width": shape.hidden_size,
        "heads": f"{shape.num_attention_heads} of {shape.head_dim}, "
        f"{shape.num_key_value_heads} for keys and values",
        "mlp_width": shape.intermediate_size,
        "vocabulary": shape.vocab_size,
        "parameters": sum(map(prod, shapes.values())),
        "prefix": prefix or "none",
    }
    fits = (shape.hidden_size, shape.num_hidden_layers) == QWEN3_06B
    programs = {"anima-fast": "no: see the note" if refusal else "yes"}
    if fits and not refusal:
        programs["sd-scripts"] = "yes"
        if path.suffix.lower() == ".safetensors":
            programs["ComfyUI"] = "yes"
    notes = [refusal] if refusal else []
    if not fits:
        notes.append(
            "the published Anima models need Qwen3-0.6B (28 layers of width 1024): this one goes "
            f"with an LLM adapter that reads states of width {shape.hidden_size} only"
        )
    title = "Qwen3-0.6B text encoder" if fits else "Qwen3 text encoder"
    return {"title": title, "facts": facts, "programs": programs, "notes": notes}


def qwen3_files(path: Path) -> list[Path]:
    """The weights files of a text encoder that `read_sizes` has accepted."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [path / name for name in sorted(set(names))]


def _qwen3_refusal(
    sizes: Qwen3Shape, shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> str | None:
    """Which tensors are missing or of another shape; transformers is not imported for it."""
    width, hidden, head_dim = sizes.hidden_size, sizes.intermediate_size, sizes.head_dim
    q, kv = sizes.num_attention_heads * head_dim, sizes.num_key_value_heads * head_dim
    layer = {
        "self_attn.q_proj": (q, width), "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, q),
        "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    expected = {"embed_tokens.weight": (sizes.vocab_size, width), "norm.weight": (width,)}
    for i in range(sizes.num_hidden_layers):
        expected |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    passed_over = ("lm_head.weight", "rotary_emb.inv_freq")
    own = {k.removeprefix(prefix): v for k, v in shapes.items() if not k.endswith(passed_over)}
    # Only shapes are compared: nothing is read.
    found = Checkpoint(own, lambda name: torch.empty(own[name], device="meta"))
    try:
        check_shapes(expected, found, "Qwen3")
    except UserError as error:
        return _of_file(error)
    return None


def describe_vae(checkpoint: Checkpoint) -> dict:
    """Latent channels, width and naming of a VAE; raises `UserError` when it is not Anima's."""
    try:
        config, _ = read_vae(without_data(checkpoint), device="meta", dtype=torch.float32)
    except UserError as error:
        raise UserError(str(error).replace("the state dict", checkpoint.name)) from error
    wan = any(key.endswith("encoder.conv1.weight") for key in checkpoint.shapes)
    facts = {
        "latent_channels": config.latent,
        "base_width": config.width,
        "naming": "Wan (original and ComfyUI)" if wan else "diffusers",
        "parameters": _parameters(checkpoint),
    }
    programs = {"anima-fast": "yes", "ComfyUI" if wan else "diffusers": "yes"}
    pickle = checkpoint.path is not None and checkpoint.path.suffix.lower() in PICKLES
    programs["sd-scripts"] = "no: it takes .safetensors only" if pickle else "yes"
    return {"title": "Qwen-Image VAE", "facts": facts, "programs": programs, "notes": []}


def _refusal(load: Callable[..., Any], checkpoint: Checkpoint) -> str | None:
    """Why a loader refuses a file; None when it takes it."""
    try:
        load(without_data(checkpoint), device="meta")
    except UserError as error:
        return _of_file(error)
    return None


def _of_file(error: UserError) -> str:
    return str(error).replace("the state dict", "the file")


def _sizes(config: Any, shapes: Mapping, checkpoint: Checkpoint, what: str) -> Any:
    try:
        return config.from_shapes(shapes)
    except UserError as error:
        raise UserError(
            f"{checkpoint.name} holds an incomplete {what}: {error}; download it again"
        ) from error


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(map(prod, checkpoint.shapes.values()))


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (", ..." if len(names) > 4 else "")
