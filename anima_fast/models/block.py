"""The fused DiT block: one autograd Function whose backward is written by hand.

    h₁ = LN(x₀)·(1 + scale₁) + shift₁     qkv = linear(h₁)
    o₁, lse₁ = attend(norm and rope of q, k; v)
    x₁ = x₀ + gate₁·linear(o₁)            h₂ = LN(x₁)·(1 + scale₂) + shift₂
    q = linear(h₂)    kv = linear(text)   o₂, lse₂ = attend(norm of q, k; v, zero keys)
    x₂ = x₁ + gate₂·linear(o₂)            h₃ = LN(x₂)·(1 + scale₃) + shift₃
    a = linear(h₃)                        x₃ = x₂ + gate₃·linear(gelu(a))

Every `linear` is frozen and may carry an adapter. Kept between forward and backward, in units of
L·D values: x₀ 1, qkv 3, o₁ 1, x₁ 1, q 1, o₂ 1, x₂ 1, a 4, and the small change: text k and v, the
two lse, and x Aᵀ of every adapter. That is 13; norms, rotations, GELU and modulated inputs are
computed again from these, and no matrix product is. Policy `mlp` drops a (9 units) and repeats
that one product, `block` keeps x₀ alone and repeats the forward. With adapters on the AdaLN layers
the three sublayer results stay too, as the gradients of the gates need them.

Backward stops where nothing below needs a gradient, in the middle of a block too. Adapters are used
in the dtype of the activations; their gradients have the parameters' own. The eager `Block` is the
definition, and computes whatever this one does not support (fuse.py installs it and decides).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anima_fast.kernels.gate_residual import gate_residual_backward, gate_residual_forward
from anima_fast.kernels.gate_residual_layernorm_modulate import (
    gate_residual_layernorm_modulate_backward,
    gate_residual_layernorm_modulate_forward,
)
from anima_fast.kernels.layernorm_modulate import (
    layernorm_modulate_backward,
    layernorm_modulate_forward,
)
from anima_fast.kernels.lora_linear import lora_linear_backward, lora_linear_forward
from anima_fast.kernels.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward
from anima_fast.models import fused_attention as attend
from anima_fast.models.attention import ZeroRows
from anima_fast.models.dit_layers import Modulation

# Linear layers that read one input, in the order in which the eager block calls them.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.output_proj",),
    "cross_q": ("cross_attn.q_proj",),
    "cross_kv": ("cross_attn.k_proj", "cross_attn.v_proj"),
    "cross_out": ("cross_attn.output_proj",),
    "up": ("mlp.layer1",),
    "down": ("mlp.layer2",),
}
# Names of a group's tensors by kind, in the order of its layers: "down.qkv.0", ...
KINDS = ("weight", "down", "up", "factor")
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    group: {kind: tuple(f"{kind}.{group}.{i}" for i in range(len(layers))) for kind in KINDS}
    for group, layers in GROUPS.items()
}
# Those of all adapters.
ADAPTERS = [n for group in NAMES.values() for kind in ("down", "up") for n in group[kind]]


@dataclass(frozen=True)
class BlockSettings:
    """The Function's arguments besides tensors."""

    policy: str
    attn_mode: str
    dtype: torch.dtype
    head_dim: int
    # Of each group, what lora_linear.py takes besides its tensors.
    linear: dict[str, dict[str, Any]]
    rows: ZeroRows | None
    # The implementation of kernels/lora_linear.py.
    products: str = "auto"
    pack: Callable[[Tensor], Any] | None = None
    unpack: Callable[[Any], Tensor] | None = None


class BlockTensors:
    """The tensors of one block by name, and its arithmetic on them."""

    def __init__(self, settings: BlockSettings, tensors: dict[str, Tensor]) -> None:
        self.settings = settings
        self.t = tensors
        # Of the three sublayers, each vector [B, D].
        sublayers = tensors["modulation"].unflatten(1, (3, 3)).unbind(1)
        self.modulations = [Modulation(*vectors.unbind(1)) for vectors in sublayers]
        self.kept: dict[str, attend.KeptAttention] = {}
        self.cast = self.cast_adapters()

    def cast_adapters(self) -> dict[str, Tensor]:
        """All adapters of the block in the dtype of the activations: one launch, one buffer.

        Those of one group are adjacent, so that stacking them is a view.
        """
        given = {name: x for name in ADAPTERS if (x := self.t[name]).numel()}
        if all(x.dtype == self.settings.dtype for x in given.values()):
            return given
        sizes = [x.numel() for x in given.values()]
        parts = self.t["context"].new_empty(sum(sizes)).split(sizes)
        views = [part.view(x.shape) for part, x in zip(parts, given.values(), strict=True)]
        torch._foreach_copy_(views, list(given.values()))
        return dict(zip(given, views, strict=True))

    def layers(self, group: str) -> dict[str, Any]:
        """Arguments of a linear group."""
        names, t, cast = NAMES[group], self.t, self.cast
        return {
            "weights": [t[name] for name in names["weight"]],
            "downs": [cast.get(name, t[name]) for name in names["down"]],
            "ups": [cast.get(name, t[name]) for name in names["up"]],
            "implementation": self.settings.products,
            "factors": [t.get(name) for name in names["factor"]],
            **self.settings.linear[group],
        }

    def adapted(self, *groups: str) -> bool:
        """Whether any layer of these groups has an adapter."""
        return any(self.t[name].shape[0] for group in groups for name in NAMES[group]["down"])

    def linear(self, group: str, x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor | None]:
        """(y, gelu(y) or None) [B, L, N]; x Aᵀ is kept as `h.GROUP`."""
        flat = x.reshape(-1, x.shape[-1])
        y, h, act = lora_linear_forward(flat, **self.layers(group), gelu=gelu)
        if h is not None:
            self.t[f"h.{group}"] = h
        shape = (*x.shape[:-1], -1)
        return y.view(shape), None if act is None else act.view(shape)

    def modulated(self, x: Tensor, sublayer: int) -> Tensor:
        """h of a sublayer's input."""
        m = self.modulations[sublayer]
        return layernorm_modulate_forward(x, m.scale, m.shift, self.settings.dtype)

    def residual(self, x: Tensor, y: Tensor, sublayer: int) -> tuple[Tensor, Tensor]:
        """The next x and the h of the sublayer after it."""
        m, after = self.modulations[sublayer : sublayer + 2]
        return gate_residual_layernorm_modulate_forward(
            x, y, m.gate, after.scale, after.shift, self.settings.dtype
        )

    def heads(self, x: Tensor, parts: int) -> Tensor:
        """[B, L, parts·D] as [B, L, parts, H, K]."""
        return x.view(*x.shape[:2], parts, -1, self.settings.head_dim)

    def self_qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q and k, and v, of the packed projection."""
        packed = self.heads(self.t["qkv"], 3)
        qk = qk_norm_rope_forward(packed, self.t["norm.self"], self.t["cos"], self.t["sin"])
        return qk[:, :, 0], qk[:, :, 1], packed[:, :, 2]

    def cross_qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normed q and k, and v, of the image's and the text's projections."""
        kv = self.heads(self.t["kv"], 2)
        norm = self.t["norm.cross"]
        q = qk_norm_rope_forward(self.heads(self.t["q"], 1), norm[:1], None, None)
        k = qk_norm_rope_forward(kv, norm[1:], None, None)
        return q[:, :, 0], k[:, :, 0], kv[:, :, 1]

    def attention(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, D]; out and lse are kept."""
        settings = self.settings
        rows = settings.rows if name == "cross" else None
        self.kept[name] = attend.forward(q, k, v, rows, settings.attn_mode)
        return self.kept[name].out.flatten(2)

    def forward(self) -> Tensor:
        """x₃; afterwards `t` and `kept` hold everything that backward may need."""
        t = self.t
        t["qkv"], _ = self.linear("qkv", self.modulated(t["x0"], 0))
        t["y0"], _ = self.linear("out", self.attention("self", *self.self_qkv()))
        t["x1"], h = self.residual(t["x0"], t["y0"], 0)
        t["q"], _ = self.linear("cross_q", h)
        t["kv"], _ = self.linear("cross_kv", t["context"])
        t["y1"], _ = self.linear("cross_out", self.attention("cross", *self.cross_qkv()))
        t["x2"], h = self.residual(t["x1"], t["y1"], 1)
        t["a"], act = self.linear("up", h, gelu=True)
        t["y2"], _ = self.linear("down", act)
        return gate_residual_forward(t["x2"], t["y2"], self.modulations[2].gate)


# What `none` keeps besides inputs and the attentions' out and lse; `mlp` drops a.
KEPT = ("x1", "x2", "qkv", "q", "kv", "a", *(f"h.{group}" for group in GROUPS))
SUBLAYERS = ("y0", "y1", "y2")


class Backward:
    """The gradients of one block, from the last sublayer to the first."""

    def __init__(self, values: BlockTensors, needs: dict[str, bool]) -> None:
        self.v, self.t = values, values.t
        self.needs = needs
        self.grads: dict[str, Tensor] = {}
        v = values
        # Whether a gradient must go on below each sublayer.
        self.below_self = needs["x0"] or needs["modulation"]
        self.below_cross = self.below_self or v.adapted("qkv", "out")
        self.into_cross = v.adapted("cross_q", "cross_kv") or needs["context"]
        self.below_mlp = self.below_cross or self.into_cross or v.adapted("cross_out")

    def linear(self, group: str, dy: Tensor, x: Tensor | None, **options: Any) -> Tensor | None:
        """dx [B, L, K] of a linear group; the adapters' gradients go into `grads`."""
        shape, names = dy.shape[:-1], NAMES[group]
        # The gradients have the dtype of the adapters, from a layer that has one.
        downs = [self.t[name] for name in names["down"]]
        dtype = next((a.dtype for a in downs if a.shape[0]), downs[0].dtype)
        dx, d_downs, d_ups = lora_linear_backward(
            dy.reshape(-1, dy.shape[-1]),
            None if x is None else x.reshape(-1, x.shape[-1]),
            self.t.get(f"h.{group}"),
            **self.v.layers(group),
            dtype=dtype,
            **options,
        )
        self.grads.update(zip(names["down"], d_downs, strict=True))
        self.grads.update(zip(names["up"], d_ups, strict=True))
        return None if dx is None else dx.view(*shape, -1)

    def modulated(self, x: Tensor, sublayer: int, group: str) -> Tensor | None:
        """The input of a linear group, recomputed if its adapters need it."""
        return self.v.modulated(x, sublayer) if self.v.adapted(group) else None

    def run(self, dout: Tensor) -> dict[str, Tensor]:
        """Gradients by the names of the inputs."""
        t, v = self.t, self.v
        dtype = v.settings.dtype
        # The gradients of a gate need the sublayer's result; without it they are None.
        gates = t if self.needs["modulation"] else {}

        dy, dgate2 = gate_residual_backward(dout, gates.get("y2"), v.modulations[2].gate, dtype)
        dh = self.mlp(dy)
        if self.below_mlp:
            dx, dy, dgate1, dscale2, dshift2 = self.residual(dout, dh, 1, gates)
            dh = self.cross(dy)
        if self.below_cross:
            dx, dy, dgate0, dscale1, dshift1 = self.residual(dx, dh, 0, gates)
            dh = self.self_attention(dy)
        if self.below_self:
            needs = self.needs["modulation"]
            dx, dscale0, dshift0 = layernorm_modulate_backward(
                dh, t["x0"], v.modulations[0].scale, residual=dx, needs_modulation=needs
            )
            self.grads["x0"] = dx
            if needs:
                sublayers = [
                    dshift0, dscale0, dgate0, dshift1, dscale1, dgate1, dshift2, dscale2, dgate2,
                ]  # fmt: skip
                self.grads["modulation"] = torch.stack(sublayers, 1).to(t["modulation"].dtype)
        return self.grads

    def residual(
        self, dx: Tensor, dh: Tensor | None, sublayer: int, gates: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """(dx, dy, dgate, dscale, dshift) where one sublayer ends and the next begins."""
        v = self.v
        return gate_residual_layernorm_modulate_backward(
            dx,
            dh,
            self.t[f"x{sublayer + 1}"],
            gates.get(f"y{sublayer}"),
            v.modulations[sublayer].gate,
            v.modulations[sublayer + 1].scale,
            dtype=v.settings.dtype,
        )

    def mlp(self, dy: Tensor) -> Tensor | None:
        """dh₃ of dy, the gradient of the MLP's result."""
        t, v = self.t, self.v
        h = self.modulated(t["x2"], 2, "up")
        goes_on = self.below_mlp or v.adapted("up")
        # Policy `mlp` has dropped it.
        if "a" not in t:
            t["a"], _ = v.linear("up", v.modulated(t["x2"], 2) if h is None else h)
        a = t["a"].reshape(-1, t["a"].shape[-1])
        da = self.linear("down", dy, None, needs_x=goes_on, gelu_input=a)
        return self.linear("up", da, h, needs_x=self.below_mlp) if goes_on else None

    def cross(self, dy: Tensor) -> Tensor | None:
        """dh₂ of dy, the gradient of the cross attention's result."""
        t, v = self.t, self.v
        kept = v.kept["cross"]
        goes_on = self.below_cross or self.into_cross
        do = self.linear("cross_out", dy, kept.out.flatten(2), needs_x=goes_on)
        if do is None:
            return None
        q, k, value = v.cross_qkv()
        dq, dkv = torch.empty_like(v.heads(t["q"], 1)), torch.empty_like(v.heads(t["kv"], 2))
        into = (dq[:, :, 0], dkv[:, :, 0], dkv[:, :, 1])
        attend.backward(do.view(q.shape), q, k, value, kept, into=into, rows=v.settings.rows)
        norm = t["norm.cross"]
        if v.adapted("cross_kv") or self.needs["context"]:
            heads = v.heads(t["kv"], 2)
            qk_norm_rope_backward(dkv[:, :, :1], heads, norm[1:], None, None, out=dkv)
            dcontext = self.linear(
                "cross_kv", dkv.flatten(2), t["context"], needs_x=self.needs["context"]
            )
            if dcontext is not None:
                self.grads["context"] = dcontext
        if not (self.below_cross or v.adapted("cross_q")):
            return None
        qk_norm_rope_backward(dq, v.heads(t["q"], 1), norm[:1], None, None, out=dq)
        h = self.modulated(t["x1"], 1, "cross_q")
        return self.linear("cross_q", dq.flatten(2), h, needs_x=self.below_cross)

    def self_attention(self, dy: Tensor) -> Tensor | None:
        """dh₁ of dy, the gradient of the self attention's result."""
        t, v = self.t, self.v
        kept = v.kept["self"]
        goes_on = self.below_self or v.adapted("qkv")
        do = self.linear("out", dy, kept.out.flatten(2), needs_x=goes_on)
        if do is None:
            return None
        q, k, value = v.self_qkv()
        packed = v.heads(t["qkv"], 3)
        # Attention writes the packed gradient, and norm and rotation turn it in place.
        dpacked = torch.empty_like(packed)
        into = tuple(dpacked[:, :, i] for i in range(3))
        attend.backward(do.view(q.shape), q, k, value, kept, into=into)
        norm = t["norm.self"]
        qk_norm_rope_backward(dpacked[:, :, :2], packed, norm, t["cos"], t["sin"], out=dpacked)
        h = self.modulated(t["x0"], 0, "qkv")
        return self.linear("qkv", dpacked.flatten(2), h, needs_x=self.below_self)


class FusedBlockFunction(torch.autograd.Function):
    """x₃ of the named tensors; see the module docstring."""

    @staticmethod
    def forward(
        ctx, settings: BlockSettings, names: Sequence[str], *tensors: Tensor | None
    ) -> Tensor:
        inputs = {n: x for n, x in zip(names, tensors, strict=True) if x is not None}
        values = BlockTensors(settings, dict(inputs))
        out = values.forward()
        ctx.settings, ctx.inputs = settings, tuple(names)
        if not any(ctx.needs_input_grad):
            return out
        # Settings and names come before the tensors.
        needs_gates = ctx.needs_input_grad[2 + names.index("modulation")]
        keep = dict(inputs)
        ctx.packed, ctx.attentions = None, {}
        if settings.policy == "block":
            # x₀ leaves the saved tensors for where `pack` puts it, such as host memory.
            if settings.pack is not None:
                ctx.packed = settings.pack(keep.pop("x0"))
        else:
            wanted = (*KEPT, *SUBLAYERS) if needs_gates else KEPT
            dropped = ("a", "h.up") if settings.policy == "mlp" else ()
            for name in wanted:
                if name not in dropped and name in values.t:
                    keep[name] = values.t[name]
            for name, kept in values.kept.items():
                ctx.attentions[name] = (kept.by, kept.graph)
                keep[f"out.{name}"] = kept.out
                if kept.lse is not None:
                    keep[f"lse.{name}"] = kept.lse
                keep |= {f"rng{i}.{name}": x for i, x in enumerate(kept.rng)}
        ctx.names = tuple(keep)
        ctx.save_for_backward(*keep.values())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        settings = ctx.settings
        saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        values = BlockTensors(settings, saved)
        needs = dict(zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True))
        if settings.policy == "block":
            if settings.unpack is not None:
                saved["x0"] = settings.unpack(ctx.packed)
            # `saved` is what `values` reads, so this fills in all that the policy did not keep.
            values.forward()
        else:
            for name, others in ctx.attentions.items():
                rng = tuple(saved[f"rng{i}.{name}"] for i in range(2) if f"rng{i}.{name}" in saved)
                kept = attend.KeptAttention(
                    saved[f"out.{name}"], saved.get(f"lse.{name}"), rng, *others
                )
                values.kept[name] = kept
        grads = Backward(values, needs).run(dout)
        found = (grads.get(name) if needs[name] else None for name in ctx.inputs)
        return None, None, *found
