"""The Qwen3 text encoder: transformers' `Qwen3Model`, built and filled without `from_pretrained`.

The architecture is read from tensor shapes, so a single file needs no config; a directory's
`config.json` gives what shapes do not show (RoPE base, norm epsilon) and is compared with the rest.
Loading is strict: a wrong file is named and never accepted in part.

Captions are padded on the right and the encoder is causal, so real tokens never see padding and no
attention mask is needed; rows of padding are set to exact zeros afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint, detect_kind, load_into, wrong_kind

EXPECTED = "expected the Qwen3-0.6B text encoder (file or Hugging Face directory) for --qwen3"


@dataclass(frozen=True)
class Qwen3Shape:
    """Sizes of a Qwen3 encoder, under the names of Hugging Face configs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class TextEncoder(nn.Module):
    """`model` is transformers' Qwen3Model; the call returns its states with padding zeroed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return self.model.config.hidden_size

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States after the final norm, [B, N, C], exactly zero where mask is 0.

        ids, mask: [B, N] integers (mask also bool) on the encoder's device, padding on the right.
        """
        if ids.shape != mask.shape or ids.ndim != 2:
            raise ValueError(
                f"ids are {tuple(ids.shape)} and mask is {tuple(mask.shape)}, expected [B, N] both"
            )
        states = self.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, N, C]
        return states.masked_fill(~mask.bool()[..., None], 0)


def load_text_encoder(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> TextEncoder:
    """The text encoder of a Hugging Face directory or of a single weights file.

    Frozen, in eval mode. A directory needs config.json and model*.safetensors (sharded or not); in
    a single file names may start with `model.`; a tied `lm_head.weight` is ignored in both.
    Raises `UserError` for another kind of model, and for missing or unexpected tensors.
    """
    config, checkpoint, shape = _open_checked(Path(path))
    model = _empty_model(shape, config, device)
    load_into(model, checkpoint, what="Qwen3", device=device, dtype_of=lambda name: dtype)
    return TextEncoder(model).eval()


def read_sizes(path: str | Path) -> Qwen3Shape:
    """Sizes of a text encoder, from headers only; raises `UserError` as `load_text_encoder`."""
    return _open_checked(Path(path))[2]


def _open_checked(path: Path) -> tuple[dict, Checkpoint, Qwen3Shape]:
    if not path.exists():
        raise UserError(f"{path} does not exist: {EXPECTED}")
    config = _read_config(path) if path.is_dir() else {}
    checkpoint = _open(path)
    shape = _infer(checkpoint.shapes, path)
    for name, found in asdict(shape).items():
        if config.get(name, found) != found:
            raise UserError(
                f"{path}: config.json says {name} = {config[name]}, the weights have {found}; the "
                "files do not belong together or a shard is missing: download the directory again"
            )
    return config, checkpoint, shape


def _empty_model(shape: Qwen3Shape, config: Mapping, device: str | torch.device) -> nn.Module:
    """Qwen3Model without weights; its rotary table, which no file holds, on the target device."""
    from transformers import Qwen3Config, Qwen3Model

    rope = config.get("rope_parameters") or {}
    arguments = asdict(shape) | {
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": float(config.get("rope_theta") or rope.get("rope_theta") or 1e6),
        "max_position_embeddings": config.get("max_position_embeddings", 32768),
        "use_cache": False,
    }
    qwen3 = Qwen3Config(**arguments)
    qwen3._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = Qwen3Model(qwen3)
    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(config=qwen3)
    return model


def _read_config(folder: Path) -> dict:
    """config.json of a directory, checked to be a plain Qwen3 configuration."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no config.json: {EXPECTED}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "qwen3":
        raise UserError(f"{path} describes the model type {kind!r}, not 'qwen3': {EXPECTED}")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if scaled or config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
        raise UserError(
            f"{path} asks for scaled RoPE, a sliding window or another activation, which the text "
            f"encoder of Anima does not have: {EXPECTED}"
        )
    return config


def _open(path: Path) -> Checkpoint:
    """All weights of a file or directory, without name prefix; refuses files of another kind."""
    stored: dict[str, Checkpoint] = {}
    for file in weight_files(path):
        checkpoint = Checkpoint.open(file)
        stored |= dict.fromkeys(checkpoint.shapes, checkpoint)
    shapes = {key: checkpoint.shapes[key] for key, checkpoint in stored.items()}
    whole = Checkpoint(shapes, lambda key: stored[key].get(key), path=path)
    ends = [key for key in shapes if key.endswith("embed_tokens.weight")]
    if not ends:
        raise _refusal(whole)
    prefix = min(ends, key=len).removesuffix("embed_tokens.weight")
    ignored = re.compile(r"(.*\.)?(lm_head\.weight|rotary_emb\.inv_freq)")
    return whole.renamed({k.removeprefix(prefix): k for k in shapes if not ignored.fullmatch(k)})


def _refusal(checkpoint: Checkpoint) -> UserError:
    if any(key.startswith("encoder.block.") for key in checkpoint.shapes):
        return UserError(
            f"{checkpoint.name} is a T5 encoder; Anima needs only the tokenizer of T5: {EXPECTED}"
        )
    if detect_kind(checkpoint) == "qwen3":
        return UserError(f"{checkpoint.name} lacks embed_tokens.weight: {EXPECTED}")
    return wrong_kind(checkpoint, "the Qwen3 text encoder that --qwen3 needs")


def weight_files(path: Path) -> list[Path]:
    """The file itself, or the safetensors files of a directory: of its index when it has one."""
    if not path.is_dir():
        return [path]
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(
                f"{path} holds {len(files)} safetensors files and no {index.name}, expected one "
                f"model.safetensors: {EXPECTED}"
            )
        return files
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {index}: {error}; download it again") from error
    absent = sorted(name for name in names if not (path / name).exists())
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}, named by {index.name}: download it")
    return [path / name for name in sorted(names)]


def _infer(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Qwen3Shape:
    """Sizes from tensor shapes; raises `UserError` for a decoder that is not a Qwen3."""
    first = "layers.0.self_attn."
    if f"{first}q_proj.bias" in shapes or f"{first}q_norm.weight" not in shapes:
        raise UserError(
            f"{path} is a language model of another architecture (no q_norm, or biased attention: "
            f"Qwen2, Llama or the like): {EXPECTED}"
        )
    needed = [f"{first}q_proj.weight", f"{first}k_proj.weight", "layers.0.mlp.gate_proj.weight"]
    missing = [name for name in needed if len(shapes.get(name, ())) != 2]
    if missing or len(shapes["embed_tokens.weight"]) != 2:
        raise UserError(
            f"{path} lacks a matrix {', '.join(missing) or 'embed_tokens.weight'}: {EXPECTED}"
        )
    q, k, gate = (shapes[name][0] for name in needed)
    head_dim = prod(shapes[f"{first}q_norm.weight"])
    layers = {int(m[1]) for name in shapes if (m := re.match(r"layers\.(\d+)\.", name))}
    vocab, hidden = shapes["embed_tokens.weight"]
    if not (head_dim and layers and vocab and hidden):
        raise UserError(f"{path} holds empty tensors: {EXPECTED}")
    return Qwen3Shape(
        vocab, hidden, gate, max(layers) + 1, max(1, q // head_dim), max(1, k // head_dim), head_dim
    )
