"""A DiT of full width whose products meet activations as those of anima-base-v1.0 are.

Its weights are random (Student-t with eight degrees of freedom, as bf16 holds them). Modulations,
value projections and layer1 are scaled so that the channels that enter the large products spread as
published, and gates so that each sublayer's update is a fixed share of the residual stream. PROFILE
has quantiles of a channel's mean |x| in blocks 1 and 27, from the channel statistics of anima_lora
(MIT, commit 0acdb05, networks/calibration/channel_stats.safetensors).
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anima_fast.models.dit import AnimaDiT, load_dit, modulation
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.dit_layers import Mlp, layernorm_modulate, timestep_features

QUANTILES = (0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1)
PROFILE = (
    {
        "self_attn.qkv": (
            0.00779, 0.00957, 0.0224, 0.0345, 0.046, 0.0766, 0.156, 0.396, 1.09, 1.53, 3.62, 9.81, 11.9,
        ),
        "self_attn.output_proj": (
            0.0109, 0.0125, 0.0159, 0.0233, 0.0287, 0.0465, 0.0818, 0.149, 0.267, 0.385, 1.1, 1.67, 1.84,
        ),
        "cross_attn.q_proj": (
            0.0305, 0.0331, 0.0751, 0.144, 0.203, 0.342, 1.08, 3.42, 7.44, 10.8, 27.7, 54.3, 65.8,
        ),
        "cross_attn.output_proj": (
            0.000406, 0.000489, 0.000649, 0.000858, 0.00101, 0.0013, 0.00182, 0.00258, 0.00369, 0.00468, 0.00708, 0.00796, 0.00867,
        ),
        "mlp.layer1": (
            0.00668, 0.00876, 0.0143, 0.025, 0.0354, 0.0632, 0.12, 0.334, 2.03, 2.28, 2.92, 3.67, 6.46,
        ),
        "mlp.layer2": (
            0.138, 0.145, 0.158, 0.171, 0.18, 0.199, 0.235, 0.333, 0.448, 0.509, 0.721, 1.17, 1.66,
        ),
    },
    {
        "self_attn.qkv": (
            1.65, 2.33, 3.22, 4.53, 4.91, 5.43, 6.18, 7.7, 13.2, 16.4, 32.7, 38.9, 70.2,
        ),
        "self_attn.output_proj": (
            0.634, 0.65, 0.804, 1.07, 1.48, 2.27, 3.34, 4.95, 7.52, 10.5, 23.1, 33.3, 33.8,
        ),
        "cross_attn.q_proj": (
            0.667, 1.08, 1.55, 1.75, 1.86, 2.04, 2.36, 2.93, 3.84, 4.38, 6.02, 12.7, 14.2,
        ),
        "cross_attn.output_proj": (
            0.00459, 0.00662, 0.0214, 0.0649, 0.0684, 0.097, 0.125, 0.146, 0.161, 0.198, 0.217, 0.316, 0.329,
        ),
        "mlp.layer1": (
            0.256, 0.269, 0.291, 0.317, 0.337, 0.378, 0.454, 0.597, 0.865, 1.2, 3.02, 6.75, 7.19,
        ),
        "mlp.layer2": (
            0.0087, 0.0192, 0.0444, 0.0912, 0.102, 0.121, 0.14, 0.15, 0.159, 0.194, 0.929, 4.97, 6.13,
        ),
    },
)  # fmt: skip
WIDE = DitConfig(
    model_channels=2048, num_blocks=2, num_heads=16, head_dim=128, context_dim=1024,
    adaln_rank=16, mlp_hidden=8192,
)  # fmt: skip
# Of a sublayer, relative to the residual stream.
UPDATE = 0.08
# Of normed queries and keys: logits have a deviation of about 9.
QK_SCALE = 3.0
# mean |x| of a normal number of deviation 1.
MEAN = (2 / np.pi) ** 0.5
# What a sublayer's products read: its first layers, and its last with the layer that makes it.
BRANCHES = {
    "self_attn": ("qkv", "output_proj"),
    "cross_attn": ("q_proj", "output_proj"),
    "mlp": ("layer1", "layer2"),
}


class Channels:
    """Random numbers and profiles, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def weight(self, rows: int, columns: int) -> Tensor:
        """Student-t of deviation 1/√columns, made of normal numbers by Wallace's approximation."""
        z = torch.randn(rows, columns, generator=self.generator)
        t = z.square().mul_(6.5 / 49).expm1_().mul_(8).sqrt_().copysign_(z)
        return t.mul_((6 / 8 / columns) ** 0.5)

    def profile(self, block: int, name: str, count: int) -> Tensor:
        """The mean |x| of channels in any order."""
        places = (np.arange(count) + 0.5) / count
        found = np.interp(places, QUANTILES, PROFILE[block][name])
        return torch.from_numpy(self.rng.permutation(found).astype(np.float32))


@torch.no_grad()
def profile_weights(inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The state dict in bf16 of a DiT of `WIDE` that has the profile at `inputs`, of one sample."""
    draw = Channels(seed)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AnimaDiT(WIDE).state_dict().items()}
    weights = {n: torch.ones(s) if len(s) == 1 else draw.weight(*s) for n, s in shapes.items()}
    # AdaLN alone makes the modulation, by its first component.
    weights["t_embedder.1.linear_2.weight"].zero_()
    features = timestep_features(inputs["sigma"], WIDE.model_channels)
    e = F.silu(features * features.square().mean().rsqrt())[0]
    for index in range(WIDE.num_blocks):
        for name, (first, _) in BRANCHES.items():
            adaln = f"blocks.{index}.adaln_modulation_{name}"
            weights[f"{adaln}.1.weight"].zero_()[0] = e / e.square().sum()
            scale = draw.profile(index, f"{name}.{first}", len(e)) / MEAN - 1
            vectors = torch.cat([torch.zeros_like(e), scale, torch.ones_like(e)])
            weights[f"{adaln}.2.weight"].zero_()[:, 0] = vectors
        for norm in ("self_attn.q_norm", "self_attn.k_norm", "cross_attn.q_norm"):
            weights[f"blocks.{index}.{norm}.weight"].fill_(QK_SCALE)
    dit = load_dit(weights, dtype=torch.float32)
    dit.block_runner = lambda index, block, x, shared: _fit(draw, index, block, x, shared)
    dit(**inputs)
    return {name: w.bfloat16() for name, w in dit.state_dict().items()}


def _fit(draw: Channels, index: int, block, x: Tensor, shared) -> Tensor:
    """Scale a block's weights for the profile and the update; returns its output."""
    for name, (_, last) in BRANCHES.items():
        adaln, layer = getattr(block, f"adaln_modulation_{name}"), getattr(block, name)
        m = modulation(adaln, shared)
        h = layernorm_modulate(x, m, torch.float32)
        wanted = draw.profile(index, f"{name}.{last}", getattr(layer, last).in_features)
        before = layer.layer1 if isinstance(layer, Mlp) else layer.v_proj
        given = (h,) if isinstance(layer, Mlp) else (h, shared)
        seen: list[Tensor] = []
        hook = getattr(layer, last).register_forward_pre_hook(partial(_keep, seen))
        # A few rounds, as GELU is not linear.
        for _ in range(4):
            layer(*given)
            before.weight *= (wanted / seen.pop().abs().mean((0, 1)))[:, None]
        hook.remove()
        y = layer(*given)
        gate = UPDATE * x.norm() / y.norm()
        adaln[2].weight[-x.shape[-1] :] *= gate
        x = x + gate * y
    return x


def _keep(seen: list[Tensor], _layer, inputs: tuple[Tensor, ...]) -> None:
    seen.append(inputs[0])
