"""Model files: opening, detecting their kind, prefixes, strict loading with readable errors.

A file is mapped, not read: only the requested tensors are copied, one by one, in the requested
dtype, so that loading never holds a model twice.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anima_fast.errors import UserError
from anima_fast.files import read_safetensors_header
from anima_fast.models.adapter_kinds import MARKS

DIT_PREFIXES = ("net.", "model.diffusion_model.", "diffusion_model.", "model.", "")
# A file with two of these under one prefix is meant to be an Anima DiT, even when it is damaged.
DIT_MARKERS = (
    "x_embedder.proj.1.weight",
    "t_embedding_norm.weight",
    "final_layer.linear.weight",
    "blocks.0.adaln_modulation_self_attn.1.weight",
)
# Buffers that other trainers and merge tools write and no model reads.
LEFTOVERS = re.compile(
    r"pos_embedder\..*|(.*\.)?rotary_emb\.inv_freq|accum_.*|(.*\.)?_extra_state|model_sampling\..*"
)
# Other models of an all-in-one file.
FOREIGN = re.compile(r"(first_stage_model|cond_stage_model|conditioner|text_encoders?|vae)\..*")
PICKLES = (".pth", ".pt", ".ckpt", ".bin")
KIND_NAMES = {
    "dit": "this is an Anima DiT; give it to --pretrained_model_name_or_path or --dit",
    "llm_adapter": "this is an LLM adapter; give it to --llm_adapter_path",
    "qwen3": "this is a Qwen3 text encoder; give it to --qwen3",
    "vae": "this is a Qwen-Image VAE; give it to --vae",
    "lora": "this is a LoRA; give it to --network_weights, --base_weights or --lora",
    "latent_cache": "this is a latent cache of this program, not a model",
    "text_cache": "this is a text cache of this program, not a model",
    "unknown": "this is not a model that this program knows",
}
# A tensor that no other kind has; the DiT has several markers, and networks their own (`MARKS`).
KIND_MARKS = {
    "qwen3": re.compile(r".*layers\.\d+\.self_attn\.q_norm\.weight"),
    "vae": re.compile(r".*(encoder\.conv(1|_in)\.weight|decoder\.middle\.0\.residual\.0\.gamma)"),
    "llm_adapter": re.compile(r"(.*llm_adapter\.)?(out_proj|blocks\.0\.norm_cross_attn)\.weight"),
}

Config = TypeVar("Config")


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
        # One tensor by name, on the CPU unless a state dict has it elsewhere.
        self.get = get
        self.metadata = dict(metadata or {})
        self.path = path
        # In messages.
        self.name = str(path) if path else "the state dict"

    @classmethod
    def open(cls, source: str | os.PathLike | Mapping[str, Tensor]) -> Checkpoint:
        """Map a `.safetensors` file, or a pickle of plain tensors (weights_only); or a state dict.

        Raises `UserError` when it is missing, a folder, cut off or not a model file.
        """
        if isinstance(source, Mapping):
            return cls.from_state_dict(source)
        path = Path(source)
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected one model file")
        if not path.exists():
            raise UserError(f"{path} does not exist: check the path, or see `anima-fast download`")
        if path.suffix.lower() == ".npz":
            raise UserError(f"{path} is a cache of encoded images or captions, not a model file")
        if path.suffix.lower() in PICKLES:
            return cls._open_pickle(path)
        from safetensors import SafetensorError, safe_open

        header = read_safetensors_header(path)
        metadata = header.pop("__metadata__", {})
        try:
            file = safe_open(path, framework="pt")
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): download it again") from error
        return cls(shapes, file.get_tensor, metadata=metadata, path=path)

    @classmethod
    def _open_pickle(cls, path: Path) -> Checkpoint:
        try:
            # Only the zip format of PyTorch 1.6 and later can be mapped.
            mapped = zipfile.is_zipfile(path)
            with warnings.catch_warnings():
                # Warnings about pickle protocols; a real problem becomes the error below.
                warnings.simplefilter("ignore")
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            raise UserError(
                f"{path} is not a PyTorch file of plain tensors, or is cut off: download it again, "
                "or convert it to .safetensors"
            ) from error
        loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
        tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
        if not tensors:
            raise UserError(f"{path} holds no tensors: it is not a model file")
        return cls.from_state_dict(tensors, path)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], path: Path | None = None) -> Checkpoint:
        """A checkpoint over tensors that are in memory."""
        tensors = dict(tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(shapes, tensors.__getitem__, path=path)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """A view with other names, {new: old}; tensors not named are left out."""
        shapes = {new: self.shapes[old] for new, old in names.items()}
        return Checkpoint(
            shapes, lambda new: self.get(names[new]), metadata=self.metadata, path=self.path
        )


def strip_prefix(
    keys: Iterable[str],
    prefixes: Sequence[str] = DIT_PREFIXES,
    markers: Sequence[str] = DIT_MARKERS,
    *,
    at_least: int = 2,
) -> str | None:
    """The first prefix under which at least `at_least` of the markers are found, or None."""
    names = set(keys)
    for prefix in prefixes:
        if sum(prefix + marker in names for marker in markers) >= at_least:
            return prefix
    return None


def size_of(shapes: Mapping[str, Sequence[int]], name: str) -> Sequence[int]:
    """Shape of a tensor from which sizes are read: a norm's weight is [N], others are [N, K].

    Raises `UserError` when it is missing or impossible.
    """
    if name not in shapes:
        raise UserError(f"the tensor {name} is missing")
    shape = shapes[name]
    if len(shape) != (1 if name.endswith("norm.weight") else 2) or min(shape) < 1:
        raise UserError(f"the tensor {name} has the impossible shape {list(shape)}")
    return shape


def count_blocks(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many blocks a state dict has."""
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})


def detect_kind(checkpoint: Checkpoint) -> str:
    """What a file holds: a key of `KIND_NAMES`, from tensor names and the file's metadata."""
    keys = checkpoint.shapes
    caches = {"anima_fast.latents": "latent_cache", "anima_fast.text": "text_cache"}
    if checkpoint.metadata.get("format") in caches:
        return caches[checkpoint.metadata["format"]]
    if any(mark in key for key in keys for mark in MARKS):
        return "lora"
    if strip_prefix(keys) is not None:
        return "dit"
    found = (kind for kind, mark in KIND_MARKS.items() if any(map(mark.fullmatch, keys)))
    return next(found, "unknown")


def wrong_kind(checkpoint: Checkpoint, expected: str) -> UserError:
    """The error for a file of another kind."""
    kind = KIND_NAMES[detect_kind(checkpoint)]
    return UserError(f"{checkpoint.name} is not {expected}: {kind}")


def load_network(
    checkpoint: Checkpoint,
    from_shapes: Callable[[Mapping[str, tuple[int, ...]]], Config],
    build: Callable[[Config], nn.Module],
    *,
    what: str,
    device: torch.device | str,
    dtype_of: Callable[[str], torch.dtype],
) -> Any:
    """A network whose sizes are read from its file: built without values, then `load_into`.

    Raises `UserError` for sizes that cannot be read, or tensors that do not fit.
    """
    try:
        config = from_shapes(checkpoint.shapes)
    except UserError as error:
        raise UserError(
            f"{checkpoint.name} holds an incomplete {what}: {error}; download it again"
        ) from error
    with torch.device("meta"):
        network = build(config)
    load_into(network, checkpoint, what=f"the {what}", device=device, dtype_of=dtype_of)
    return network


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    what: str,
    device: torch.device | str = "cpu",
    dtype_of: Callable[[str], torch.dtype],
) -> None:
    """Fill a module on the meta device, strictly and tensor by tensor; it is frozen, in eval mode.

    Args:
        checkpoint: tensors under the module's own names; those that already have the right dtype
            and device are shared, not copied.
        what: the model's name in messages.
        dtype_of: the dtype of each parameter by name.

    Raises `UserError` for missing, unexpected or integer tensors, or some of a wrong shape.
    """
    expected = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    check_shapes(expected, checkpoint, what)
    tensors = {}
    for name in expected:
        tensor = checkpoint.get(name)
        if not tensor.is_floating_point():
            raise UserError(
                f"{checkpoint.name}: {name} is {tensor.dtype}, expected floating point; give the "
                "unquantised file"
            )
        owner, dtype = module.get_submodule(name.rpartition(".")[0]), dtype_of(name)
        # Some layers store their weight in a form of their own.
        hold = getattr(owner, "hold", Tensor.to)
        tensors[name] = hold(tensor.detach().to(device), dtype)
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False).eval()


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, what: str
) -> None:
    """Raise one `UserError` that names the first tensors that do not fit, and how many."""
    if problems := shape_problems(expected, checkpoint.shapes):
        raise UserError(
            f"{checkpoint.name} does not fit {what}: {problems}; download it again, or give the "
            "file of a plain Anima model"
        )


def shape_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """How many tensors are missing, unexpected or of another shape, and the first of them."""
    groups = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    return "; ".join(
        f"{len(names)} tensors {how} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for how, names in groups.items()
        if names
    )
