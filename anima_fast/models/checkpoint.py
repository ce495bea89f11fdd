"""Model files: opening, telling their kind, prefixes, and strict loading with readable errors.

A file is mapped, not read: only the tensors asked for are copied, one by one, in the dtype asked
for, so that loading never holds a model twice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from anima_fast.errors import UserError
from anima_fast.files import read_safetensors_header

DIT_PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "model.", "")
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
# Buffers that other trainers and merge tools write and no model reads.
LEFTOVERS = re.compile(
    r"pos_embedder\..*|.*rotary_emb\.inv_freq|accum_.*|(.*\.)?_extra_state|model_sampling\..*"
)
KIND_NAMES = {
    "dit": "an Anima DiT: give it to --pretrained_model_name_or_path",
    "llm_adapter": "an LLM adapter: give it to --llm_adapter_path",
    "qwen3": "a Qwen3 text encoder: give it to --qwen3",
    "vae": "a Qwen-Image VAE: give it to --vae",
    "lora": "a LoRA: give it to --network_weights or --base_weights",
    "latent_cache": "a latent cache of this program",
    "text_cache": "a text cache of this program",
    "unknown": "no model that this program knows",
}


class Checkpoint:
    """The tensors of a model file (or of a state dict), read when they are asked for."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        get: Callable[[str], Tensor],
        *,
        metadata: Mapping[str, str] | None = None,
        path: Path | None = None,
    ) -> None:
        self.shapes = dict(shapes)
        self._get = get
        self.metadata = dict(metadata or {})
        self.path = path

    @classmethod
    def open(cls, path: str | os.PathLike) -> Checkpoint:
        """Map a `.safetensors` file, or a pickle of plain tensors (weights_only).

        Raises `UserError` when it is missing, a folder, cut off or no model file.
        """
        path = Path(path)
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected one model file")
        if not path.exists():
            raise UserError(f"{path} does not exist: check the path, or see `anima-fast download`")
        if path.suffix.lower() in PICKLES:
            return cls._open_pickle(path)
        from safetensors import SafetensorError, safe_open

        header = read_safetensors_header(path)
        metadata = header.pop("__metadata__", {})
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): download it again") from error
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        return cls(shapes, file.get_tensor, metadata=metadata, path=path)

    @classmethod
    def _open_pickle(cls, path: Path) -> Checkpoint:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"{path} is no PyTorch file of plain tensors, or is cut off: download it again, "
                "or convert it to .safetensors"
            ) from error
        loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
        tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
        if not tensors:
            raise UserError(f"{path} holds no tensors: it is no model file")
        return cls._of_tensors(tensors, path)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """A checkpoint over tensors that are in memory."""
        return cls._of_tensors(dict(tensors), None)

    @classmethod
    def _of_tensors(cls, tensors: dict[str, Tensor], path: Path | None) -> Checkpoint:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(shapes, tensors.__getitem__, path=path)

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path) if self.path else "the state dict"

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self.shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self.shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of one tensor."""
        return self.get(key).dtype

    def get(self, key: str) -> Tensor:
        """One tensor on the CPU."""
        return self._get(key)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """A view with other names: {new: old}; tensors that are not named are left out."""
        shapes = {new: self.shapes[old] for new, old in names.items()}
        return Checkpoint(
            shapes, lambda new: self._get(names[new]), metadata=self.metadata, path=self.path
        )


def open_checkpoint(source: str | os.PathLike | Mapping[str, Tensor]) -> Checkpoint:
    """`source` as a checkpoint, whether it is a path or a state dict."""
    if isinstance(source, Mapping):
        return Checkpoint.from_state_dict(source)
    return Checkpoint.open(source)


def strip_prefix(keys: Iterable[str], marker: str, prefixes: Iterable[str]) -> str | None:
    """The prefix under which `marker` stands among the keys; None when it stands nowhere."""
    names = set(keys)
    return next((prefix for prefix in prefixes if prefix + marker in names), None)


def detect_kind(checkpoint: Checkpoint) -> str:
    """What a file holds: a key of `KIND_NAMES`, told from names alone."""
    keys = checkpoint.keys()
    if checkpoint.metadata.get("format") in ("anima_fast.latents", "anima_fast.text"):
        return "latent_cache" if checkpoint.metadata["format"].endswith("latents") else "text_cache"
    if any(".lora_" in key or ".hada_" in key or ".lokr_" in key for key in keys):
        return "lora"
    if strip_prefix(keys, "x_embedder.proj.1.weight", DIT_PREFIXES) is not None:
        return "dit"
    if any(key.endswith("self_attn.q_norm.weight") and "layers." in key for key in keys):
        return "qwen3"
    if {"conv1.bias", "encoder.conv1.weight"} <= set(keys) or "quant_conv.weight" in keys:
        return "vae"
    if any(key.endswith("out_proj.weight") for key in keys) and any(
        "embed.weight" in k for k in keys
    ):
        return "llm_adapter"
    return "unknown"


def wrong_kind(checkpoint: Checkpoint, expected: str) -> UserError:
    """The error for a file of another kind."""
    kind = detect_kind(checkpoint)
    return UserError(f"{checkpoint.name} is not {expected}: it is {KIND_NAMES[kind]}")


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    what: str,
    device: torch.device | str,
    dtype_of: Callable[[str], torch.dtype],
) -> None:
    """Fill a module built on the meta device, strictly.

    Args:
        module: parameters on `meta`.
        checkpoint: tensors under the module's own names.
        what: how messages call the model.
        device: where the parameters go.
        dtype_of: the dtype of each parameter by name.

    Raises:
        UserError: missing or unexpected tensors, or one of the wrong shape.
    """
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    missing = sorted(expected.keys() - checkpoint.shapes.keys())
    unexpected = sorted(checkpoint.shapes.keys() - expected.keys())
    if missing or unexpected:
        raise UserError(
            f"{checkpoint.name} does not fit as {what}: "
            + "; ".join(
                _listed(t, n) for t, n in (("missing", missing), ("unexpected", unexpected)) if n
            )
        )
    for name, shape in expected.items():
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"{checkpoint.name}: {name} is {list(checkpoint.shape(name))}, "
                f"expected {list(shape)}"
            )
    tensors = {n: checkpoint.get(n).to(device, dtype_of(n)) for n in expected}
    module.load_state_dict(tensors, strict=True, assign=True)


def _listed(title: str, names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{title} {', '.join(names[:4])}{more}"
