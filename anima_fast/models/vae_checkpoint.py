"""Published names and shapes of the VAE, and their reduction to the 2-D network.

Two namings of the same 194 tensors are in use: the Wan names (original and ComfyUI files) and the
diffusers names. `module_names` is the one table of both. Reading keeps the last temporal slice of
each 3x3x3 weight, drops the temporal resampling (`time_conv`), which no still image runs, and
compares every remaining tensor with the network before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import (
    Checkpoint,
    detect_kind,
    open_checkpoint,
    shape_problems,
    wrong_kind,
)
from anima_fast.models.vae import LATENT_CHANNELS, VAE, VaeConfig

PREFIXES = ("first_stage_model.", "vae.")
EXPECTED = "expected the Qwen-Image VAE (qwen_image_vae.safetensors) for --vae"
# Names of the image VAEs of SD, SDXL and FLUX: original and diffusers style.
FOREIGN = ("encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.")


class Names(NamedTuple):
    """The published names of one module."""

    wan: str
    diffusers: str


def module_names() -> dict[str, Names]:
    """Our dotted name of every module with tensors, with its two published names."""
    table = {
        "to_moments": Names("conv1", "quant_conv"),
        "from_latents": Names("conv2", "post_quant_conv"),
    }
    for side in ("encoder", "decoder"):
        table[f"{side}.conv_in"] = Names(f"{side}.conv1", f"{side}.conv_in")
        table[f"{side}.head.norm"] = Names(f"{side}.head.0", f"{side}.norm_out")
        table[f"{side}.head.conv"] = Names(f"{side}.head.2", f"{side}.conv_out")
        table |= _middle(side)
    for level in range(4):
        table |= _encoder_level(level) | _decoder_level(level)
    return table


def _middle(side: str) -> dict[str, Names]:
    ours, wan, theirs = f"{side}.middle", f"{side}.middle", f"{side}.mid_block"
    table = _resblock(f"{ours}.res_in", f"{wan}.0", f"{theirs}.resnets.0")
    table |= _resblock(f"{ours}.res_out", f"{wan}.2", f"{theirs}.resnets.1")
    for mine, part in (("norm", "norm"), ("qkv", "to_qkv"), ("out", "proj")):
        table[f"{ours}.attention.{mine}"] = Names(
            f"{wan}.1.{part}", f"{theirs}.attentions.0.{part}"
        )
    return table


def _encoder_level(level: int) -> dict[str, Names]:
    table: dict[str, Names] = {}
    for i in range(2):
        n = 3 * level + i
        table |= _resblock(
            f"encoder.levels.{level}.blocks.{i}",
            f"encoder.downsamples.{n}",
            f"encoder.down_blocks.{n}",
        )
    n = 3 * level + 2
    table[f"encoder.levels.{level}.resample.conv"] = Names(
        f"encoder.downsamples.{n}.resample.1", f"encoder.down_blocks.{n}.resample.1"
    )
    return table


def _decoder_level(level: int) -> dict[str, Names]:
    table: dict[str, Names] = {}
    for i in range(3):
        table |= _resblock(
            f"decoder.levels.{level}.blocks.{i}",
            f"decoder.upsamples.{4 * level + i}",
            f"decoder.up_blocks.{level}.resnets.{i}",
        )
    table[f"decoder.levels.{level}.resample.conv"] = Names(
        f"decoder.upsamples.{4 * level + 3}.resample.1",
        f"decoder.up_blocks.{level}.upsamplers.0.resample.1",
    )
    return table


def _resblock(ours: str, wan: str, theirs: str) -> dict[str, Names]:
    parts = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3"}
    parts["conv2"] = "residual.6"
    table = {f"{ours}.{k}": Names(f"{wan}.{v}", f"{theirs}.{k}") for k, v in parts.items()}
    table[f"{ours}.shortcut"] = Names(f"{wan}.shortcut", f"{theirs}.conv_shortcut")
    return table


def published_names(config: VaeConfig, naming: str) -> dict[str, str]:
    """Our parameter name to the published one; naming is "wan" or "diffusers"."""
    table = module_names()
    with torch.device("meta"):
        names = list(VAE(config).state_dict())
    modules = {name: name.rpartition(".") for name in names}
    return {
        name: f"{getattr(table[module], naming)}.{leaf}"
        for name, (module, _, leaf) in modules.items()
    }


def read_vae(
    source: str | Path | Mapping[str, Tensor], *, device: str | torch.device, dtype: torch.dtype
) -> tuple[VaeConfig, dict[str, Tensor]]:
    """Configuration and 2-D tensors under our names; raises `UserError` (see `load_vae`)."""
    checkpoint = open_checkpoint(source)
    label = checkpoint.name
    stored = _stored_names(checkpoint, label)
    naming = "wan" if "conv1.bias" in stored else "diffusers"
    config = _read_config(checkpoint, stored, naming, label)
    names = published_names(config, naming)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in VAE(config).state_dict().items()}
    found = {k: image_shape(k, checkpoint.shape(full)) for k, full in stored.items()}
    _compare({names[name]: shape for name, shape in shapes.items()}, found, label)
    tensors = {
        name: _place(checkpoint.get(stored[names[name]]), shape, device, dtype)
        for name, shape in shapes.items()
    }
    return config, tensors


def _stored_names(checkpoint: Checkpoint, label: str) -> dict[str, str]:
    """Published name to the key in the file; raises `UserError` when the file is not a VAE."""
    keys = checkpoint.keys()
    for prefix in PREFIXES:
        inside = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix + "encoder.")}
        if inside:
            stored = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
            break
    else:
        stored = {key: key for key in keys}
    entry = {"encoder.conv1.weight", "encoder.conv_in.weight"} & stored.keys()
    if not entry and detect_kind(checkpoint) != "vae":
        raise wrong_kind(checkpoint, "the Qwen-Image VAE that --vae needs")
    if any(key.startswith(FOREIGN) for key in stored):
        raise UserError(f"{label} is the VAE of another model (SD, SDXL or FLUX): {EXPECTED}")
    return {k: full for k, full in stored.items() if ".time_conv." not in k}


def _read_config(
    checkpoint: Checkpoint, stored: Mapping[str, str], naming: str, label: str
) -> VaeConfig:
    first = "encoder.conv1.weight" if naming == "wan" else "encoder.conv_in.weight"
    last = "conv2.weight" if naming == "wan" else "post_quant_conv.weight"
    missing = [name for name in (first, last) if name not in stored]
    if missing:
        raise UserError(f"{label} lacks the VAE tensor {missing[0]}: {EXPECTED}")
    width, latent = (checkpoint.shape(stored[name])[0] for name in (first, last))
    if latent != LATENT_CHANNELS:
        raise UserError(
            f"{label} is a VAE with {latent} latent channels, Anima needs {LATENT_CHANNELS}: "
            f"{EXPECTED}"
        )
    return VaeConfig(width=width, latent=latent)


def image_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a published tensor once it is reduced to 2-D."""
    if name.endswith(".gamma"):
        return (shape[0], *(n for n in shape[1:] if n != 1))
    return (*shape[:2], *shape[3:]) if len(shape) == 5 else tuple(shape)


def _compare(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], label: str
) -> None:
    if problems := shape_problems(expected, found):
        raise UserError(f"{label} does not fit the VAE: {problems}; {EXPECTED}")


def _place(
    tensor: Tensor, shape: tuple[int, ...], device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """A fresh copy of what the 2-D network uses; convolution weights channels-last."""
    kernel = tensor.ndim == 5 and len(shape) == 4
    source = tensor[:, :, -1] if kernel else tensor.reshape(shape)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    target = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
    return target.copy_(source)


def load_vae(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VAE:
    """The VAE of a file (.safetensors, .pth) or state dict, under Wan or diffusers names.

    Base width and latent channels are read from the tensors. Frozen, in eval mode.
    Raises `UserError` when the file is another kind of model, or lacks or exceeds tensors.
    """
    config, tensors = read_vae(path_or_state_dict, device=device, dtype=dtype)
    with torch.device("meta"):
        vae = VAE(config)
    vae.load_state_dict(tensors, strict=True, assign=True)
    return vae.requires_grad_(False).eval()
