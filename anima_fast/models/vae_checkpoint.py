"""Published names and shapes of the VAE, and their reduction to the 2-D network.

Two namings of the same 194 tensors are in use: the Wan names (original and ComfyUI files) and the
diffusers names. `module_names` is the one table of both. Reading keeps the last temporal slice of
each 3x3x3 weight, drops the temporal resampling (`time_conv`), which no still image runs, and
compares every remaining tensor with the network before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from anima_fast.errors import UserError
from anima_fast.models.checkpoint import Checkpoint, detect_kind, shape_problems, wrong_kind
from anima_fast.models.vae import LATENT_CHANNELS, VAE, VaeConfig

PREFIXES = ("first_stage_model.", "vae.")
NAMINGS = ("wan", "diffusers")
EXPECTED = "expected the Qwen-Image VAE (qwen_image_vae.safetensors) for --vae"
# Names of the image VAEs of SD, SDXL and FLUX: original and diffusers style.
FOREIGN = ("encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.")


# Our name of each part of a residual block, its Wan and its diffusers name.
RESIDUAL = (
    ("norm1", "residual.0", "norm1"),
    ("conv1", "residual.2", "conv1"),
    ("norm2", "residual.3", "norm2"),
    ("conv2", "residual.6", "conv2"),
    ("shortcut", "shortcut", "conv_shortcut"),
)


def module_names() -> dict[str, tuple[str, str]]:
    """Our dotted name of every module with tensors → its Wan and its diffusers name."""
    table = {"to_moments": ("conv1", "quant_conv"), "from_latents": ("conv2", "post_quant_conv")}
    # Of residual blocks.
    blocks: dict[str, tuple[str, str]] = {}
    for side in ("encoder", "decoder"):
        ours, theirs = f"{side}.middle", f"{side}.mid_block"
        table[f"{side}.conv_in"] = (f"{side}.conv1", f"{side}.conv_in")
        table[f"{side}.head.norm"] = (f"{side}.head.0", f"{side}.norm_out")
        table[f"{side}.head.conv"] = (f"{side}.head.2", f"{side}.conv_out")
        for mine, part in (("norm", "norm"), ("qkv", "to_qkv"), ("out", "proj")):
            table[f"{ours}.attention.{mine}"] = (
                f"{ours}.1.{part}",
                f"{theirs}.attentions.0.{part}",
            )
        blocks[f"{ours}.res_in"] = (f"{ours}.0", f"{theirs}.resnets.0")
        blocks[f"{ours}.res_out"] = (f"{ours}.2", f"{theirs}.resnets.1")
    for level in range(4):
        down, up = f"encoder.levels.{level}", f"decoder.levels.{level}"
        for i in range(2):
            n = 3 * level + i
            blocks[f"{down}.blocks.{i}"] = (f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}")
        n = 3 * level + 2
        table[f"{down}.resample"] = (
            f"encoder.downsamples.{n}.resample.1",
            f"encoder.down_blocks.{n}.resample.1",
        )
        theirs = f"decoder.up_blocks.{level}"
        for i in range(3):
            wan = f"decoder.upsamples.{4 * level + i}"
            blocks[f"{up}.blocks.{i}"] = (wan, f"{theirs}.resnets.{i}")
        table[f"{up}.resample.conv"] = (
            f"decoder.upsamples.{4 * level + 3}.resample.1",
            f"{theirs}.upsamplers.0.resample.1",
        )
    for ours, (wan, theirs) in blocks.items():
        for part, in_wan, in_theirs in RESIDUAL:
            table[f"{ours}.{part}"] = (f"{wan}.{in_wan}", f"{theirs}.{in_theirs}")
    return table


def published_names(config: VaeConfig, naming: str) -> dict[str, str]:
    """Our parameter name to the published one; naming is "wan" or "diffusers"."""
    table, column = module_names(), NAMINGS.index(naming)
    with torch.device("meta"):
        names = VAE(config).state_dict()
    parts = {name: name.rpartition(".") for name in names}
    return {name: f"{table[module][column]}.{leaf}" for name, (module, _, leaf) in parts.items()}


def load_vae(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VAE:
    """The VAE of a file (.safetensors, .pth) or state dict, frozen and in eval mode.

    Raises `UserError` when it is another kind of model, or lacks or exceeds tensors.
    """
    checkpoint = Checkpoint.open(path_or_state_dict)
    stored = _stored_names(checkpoint)
    naming = "wan" if "conv1.bias" in stored else "diffusers"
    with torch.device("meta"):
        vae = VAE(_read_config(checkpoint, stored, naming))
    names = published_names(vae.config, naming)
    shapes = {name: tuple(t.shape) for name, t in vae.state_dict().items()}
    expected = {names[name]: shape for name, shape in shapes.items()}
    found = {k: image_shape(k, checkpoint.shapes[full]) for k, full in stored.items()}
    if problems := shape_problems(expected, found):
        raise UserError(f"{checkpoint.name} does not fit the VAE: {problems}; {EXPECTED}")
    tensors = {
        name: _place(checkpoint.get(stored[names[name]]), shape, device, dtype)
        for name, shape in shapes.items()
    }
    vae.load_state_dict(tensors, strict=True, assign=True)
    return vae.requires_grad_(False).eval()


def _stored_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Published name to the key in the file; raises `UserError` when the file is not a VAE."""
    keys = checkpoint.shapes
    inside = (p for p in PREFIXES if any(key.startswith(f"{p}encoder.") for key in keys))
    prefix = next(inside, "")
    stored = {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}
    entry = {"encoder.conv1.weight", "encoder.conv_in.weight"} & stored.keys()
    if not entry and detect_kind(checkpoint) != "vae":
        raise wrong_kind(checkpoint, "the Qwen-Image VAE that --vae needs")
    if any(key.startswith(FOREIGN) for key in stored):
        raise UserError(
            f"{checkpoint.name} is the VAE of another model (SD, SDXL or FLUX): {EXPECTED}"
        )
    return {k: full for k, full in stored.items() if ".time_conv." not in k}


def _read_config(checkpoint: Checkpoint, stored: Mapping[str, str], naming: str) -> VaeConfig:
    table, column = module_names(), NAMINGS.index(naming)
    sizes = []
    for module in ("encoder.conv_in", "from_latents"):
        name = f"{table[module][column]}.weight"
        if name not in stored:
            raise UserError(f"{checkpoint.name} lacks the VAE tensor {name}: {EXPECTED}")
        sizes.append(checkpoint.shapes[stored[name]][0])
    width, latent = sizes
    if latent != LATENT_CHANNELS:
        raise UserError(
            f"{checkpoint.name} is a VAE with {latent} latent channels, Anima needs "
            f"{LATENT_CHANNELS}: {EXPECTED}"
        )
    return VaeConfig(width=width, latent=latent)


def image_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a published tensor once it is reduced to 2-D."""
    if name.endswith(".gamma"):
        return (shape[0], *(n for n in shape[1:] if n != 1))
    return (*shape[:2], *shape[3:]) if len(shape) == 5 else tuple(shape)


def _place(
    tensor: Tensor, shape: tuple[int, ...], device: str | torch.device, dtype: torch.dtype
) -> Tensor:
    """A fresh copy of what the 2-D network uses; convolution weights channels-last."""
    kernel = tensor.ndim == 5 and len(shape) == 4
    source = tensor[:, :, -1] if kernel else tensor.reshape(shape)
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    target = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
    return target.copy_(source)
