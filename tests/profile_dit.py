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
            0.0078, 0.0096, 0.022, 0.035, 0.046, 0.077, 0.16, 0.4, 1.1, 1.5, 3.6, 9.8, 12,
        ),
        "self_attn.output_proj": (
            0.011, 0.013, 0.016, 0.023, 0.029, 0.046, 0.082, 0.15, 0.27, 0.39, 1.1, 1.7, 1.8,
        ),
        "cross_attn.q_proj": (
            0.03, 0.033, 0.075, 0.14, 0.2, 0.34, 1.1, 3.4, 7.4, 11, 28, 54, 66,
        ),
        "cross_attn.output_proj": (
            0.00041, 0.00049, 0.00065, 0.00086, 0.001, 0.0013, 0.0018, 0.0026,
            0.0037, 0.0047, 0.0071, 0.008, 0.0087,
        ),
        "mlp.layer1": (
            0.0067, 0.0088, 0.014, 0.025, 0.035, 0.063, 0.12, 0.33, 2, 2.3, 2.9, 3.7, 6.5,
        ),
        "mlp.layer2": (
            0.14, 0.14, 0.16, 0.17, 0.18, 0.2, 0.23, 0.33, 0.45, 0.51, 0.72, 1.2, 1.7,
        ),
    },
    {
        "self_attn.qkv": (
            1.6, 2.3, 3.2, 4.5, 4.9, 5.4, 6.2, 7.7, 13, 16, 33, 39, 70,
        ),
        "self_attn.output_proj": (
            0.63, 0.65, 0.8, 1.1, 1.5, 2.3, 3.3, 5, 7.5, 10, 23, 33, 34,
        ),
        "cross_attn.q_proj": (
            0.67, 1.1, 1.6, 1.8, 1.9, 2, 2.4, 2.9, 3.8, 4.4, 6, 13, 14,
        ),
        "cross_attn.output_proj": (
            0.0046, 0.0066, 0.021, 0.065, 0.068, 0.097, 0.12, 0.15, 0.16, 0.2, 0.22, 0.32, 0.33,
        ),
        "mlp.layer1": (
            0.26, 0.27, 0.29, 0.32, 0.34, 0.38, 0.45, 0.6, 0.86, 1.2, 3, 6.8, 7.2,
        ),
        "mlp.layer2": (
            0.0087, 0.019, 0.044, 0.091, 0.1, 0.12, 0.14, 0.15, 0.16, 0.19, 0.93, 5, 6.1,
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
