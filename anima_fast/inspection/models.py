"""What a model file holds: DiT, LLM adapter, Qwen3 text encoder or VAE.

Every file but Qwen3's is handed to the loader of its kind with tensors on the meta device, which
have names, shapes and dtypes but no data. So what is said about loading is what loading does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from anima_fast.errors import UserError
from anima_fast.inspection.description import SEE_NOTE, Description, plural, without_data
from anima_fast.models.checkpoint import FOREIGN, PICKLES, Checkpoint, check_shapes, strip_prefix
from anima_fast.models.dit import dit_tensors, load_dit
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.llm_adapter import AdapterConfig, adapter_tensors, load_llm_adapter
from anima_fast.models.text_encoder import Qwen3Shape, read_sizes, weight_files
from anima_fast.models.vae_checkpoint import load_vae

# The sizes of Qwen3-0.6B (width, layers), and of the only DiT that sd-scripts takes (width, heads,
# blocks).
QWEN3_06B = (1024, 28)
SD_SCRIPTS_DIT = (2048, 16, 28)


def describe_dit(checkpoint: Checkpoint) -> Description:
    """Sizes of a DiT, its LLM adapter, and the prefix of its names."""
    prefix = strip_prefix(checkpoint.shapes) or ""
    own, adapter = dit_tensors(checkpoint), adapter_tensors(checkpoint)
    config = _sizes(DitConfig, own.shapes, checkpoint, "Anima DiT")
    others = {
        key.split(".")[0]
        for key in checkpoint.shapes
        if not key.startswith(prefix) or FOREIGN.fullmatch(key.removeprefix(prefix))
    }
    notes = _refusals(lambda: load_dit(without_data(checkpoint), device="meta"))
    bundled = "none: give its file with --llm_adapter_path"
    if adapter is not None:
        notes += _refusals(lambda: load_llm_adapter(without_data(checkpoint), device="meta"))
        layers = len({n.split(".")[1] for n in adapter.shapes if n.startswith("blocks.")})
        bundled = f"bundled, {layers} layers, {_parameters(adapter.shapes):,} parameters"
    programs = _usable(notes)
    if not notes:
        programs |= _dit_programs(config, prefix, adapter is not None, bool(others))
    if others:
        notes.append(f"the file holds other models too, which are passed over: {_some(others)}")
    return Description(
        f"Anima DiT, {config.num_blocks} blocks of width {config.model_channels}",
        {
            "blocks": config.num_blocks,
            "width": config.model_channels,
            "heads": f"{config.num_heads} of {config.head_dim}",
            "context_width": config.context_dim,
            "mlp_width": config.mlp_hidden,
            "latent_channels": config.in_channels,
            "parameters": _parameters(own.shapes),
            "llm_adapter": bundled,
            "prefix": prefix or "none",
        },
        programs,
        notes,
        "train --pretrained_model_name_or_path, sample --dit",
    )


def _dit_programs(
    config: DitConfig, prefix: str, bundled: bool, all_in_one: bool
) -> dict[str, str]:
    size = (config.model_channels, config.num_heads, config.num_blocks)
    found = {"sd-scripts": "yes"}
    if size != SD_SCRIPTS_DIT:
        found["sd-scripts"] = "no: it takes 28 blocks of width 2048 only"
    elif prefix not in ("net.", "") or all_in_one:
        found["sd-scripts"] = "no: it takes names with `net.` or without prefix only"
    elif not bundled:
        found["sd-scripts"] = "no: it needs the LLM adapter in the same file"
    if bundled and prefix in ("net.", "model.diffusion_model."):
        found["ComfyUI"] = "yes"
    return found


def describe_adapter(checkpoint: Checkpoint) -> Description:
    """Sizes of an LLM adapter in a file of its own."""
    own = adapter_tensors(checkpoint)
    # Fewer names identify an adapter than loading needs.
    shapes = own.shapes if own else {}
    config = _sizes(AdapterConfig, shapes, checkpoint, "LLM adapter")
    notes = _refusals(lambda: load_llm_adapter(without_data(checkpoint), device="meta"))
    return Description(
        "LLM adapter of Anima",
        {
            "layers": config.layers,
            "width": config.width,
            "heads": f"{config.width // config.head_dim} of {config.head_dim}",
            "reads": f"Qwen3 states of width {config.source_width}",
            "gives": f"context of width {config.context_dim}",
            "vocabulary": config.vocabulary,
            "parameters": _parameters(shapes),
        },
        _usable(notes) | {"sd-scripts": "no: it takes the adapter inside the DiT file only"},
        notes,
        "--llm_adapter_path",
    )


def describe_qwen3(path: Path) -> Description:
    """Sizes of a Qwen3 text encoder, a single file or a Hugging Face folder."""
    sizes, files = read_sizes(path), weight_files(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= Checkpoint.open(file).shapes
    embedding = min((k for k in shapes if k.endswith("embed_tokens.weight")), key=len)
    prefix = embedding.removesuffix("embed_tokens.weight")
    notes = _refusals(lambda: _check_qwen3(sizes, shapes, prefix))
    programs = _usable(notes)
    fits = (sizes.hidden_size, sizes.num_hidden_layers) == QWEN3_06B
    if fits and not notes:
        programs["sd-scripts"] = "yes"
        if path.suffix.lower() == ".safetensors":
            programs["ComfyUI"] = "yes"
    if not fits:
        notes.append(
            "the published Anima models need Qwen3-0.6B (28 layers of width 1024): this one goes "
            f"with an LLM adapter that reads states of width {sizes.hidden_size} only"
        )
    folder = f"Hugging Face folder, {plural(len(files), 'file')}"
    return Description(
        "Qwen3-0.6B text encoder" if fits else "Qwen3 text encoder",
        {
            "form": folder if path.is_dir() else "single file",
            "layers": sizes.num_hidden_layers,
            "width": sizes.hidden_size,
            "heads": f"{sizes.num_attention_heads} of {sizes.head_dim}, "
            f"{sizes.num_key_value_heads} for keys and values",
            "mlp_width": sizes.intermediate_size,
            "vocabulary": sizes.vocab_size,
            "parameters": _parameters(shapes),
            "prefix": prefix or "none",
        },
        programs,
        notes,
        "--qwen3",
    )


def _check_qwen3(sizes: Qwen3Shape, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    """Refuse missing tensors and other shapes as loading does, without importing transformers."""
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
    check_shapes(expected, found, "Qwen3")


def describe_vae(checkpoint: Checkpoint) -> Description:
    """Latent channels, width and naming of a VAE; raises `UserError` when it is not Anima's."""
    try:
        config = load_vae(without_data(checkpoint), device="meta").config
    except UserError as error:
        raise UserError(str(error).replace("the state dict", checkpoint.name)) from error
    wan = any(key.endswith("encoder.conv1.weight") for key in checkpoint.shapes)
    pickle = Path(checkpoint.name).suffix.lower() in PICKLES
    return Description(
        "Qwen-Image VAE",
        {
            "latent_channels": config.latent,
            "base_width": config.width,
            "naming": "Wan (original and ComfyUI)" if wan else "diffusers",
            "parameters": _parameters(checkpoint.shapes),
        },
        {
            "anima-fast": "yes",
            "ComfyUI" if wan else "diffusers": "yes",
            "sd-scripts": "no: it takes .safetensors only" if pickle else "yes",
        },
        option="--vae",
    )


def _refusals(load: Callable[[], Any]) -> list[str]:
    """Why a file cannot be loaded; empty when it can."""
    try:
        load()
    except UserError as error:
        return [str(error).replace("the state dict", "the file")]
    return []


def _usable(notes: list[str]) -> dict[str, str]:
    return {"anima-fast": SEE_NOTE if notes else "yes"}


def _sizes(config: Any, shapes: Mapping, checkpoint: Checkpoint, what: str) -> Any:
    try:
        return config.from_shapes(shapes)
    except UserError as error:
        raise UserError(
            f"{checkpoint.name} is not a complete {what}: {error}; download it again"
        ) from error


def _parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(map(prod, shapes.values()))


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (", ..." if len(names) > 4 else "")
