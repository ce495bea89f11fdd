"""The fused block of the 2B model as an op: its launches are other variants than the ops' own.

Inside the block norms add the residual's gradient, products or adapters carry GELU in their
epilogue, sums for frozen weights are left out and gradients go into packed buffers. `bench
resources` compiles these variants through this entry. It is no member of `OPS`: its definition is
the eager block, and tests/test_block.py compares the two. With short float16 sums its products are
further variants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anima_fast.kernels.op import Cost, Inputs, Op, Sizes, randn
from anima_fast.kernels.row_powers import TAIL, stored
from anima_fast.kernels.sums import CHAINS, use_sums
from anima_fast.models.block import GROUPS, BlockSettings, FusedBlockFunction

WIDTH, HIDDEN, CONTEXT, HEAD = 2048, 8192, 1024, 128
# Outputs and inputs of the layers of each group.
SHAPES = {
    "qkv": (WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "cross_q": (WIDTH, WIDTH),
    "cross_kv": (WIDTH, CONTEXT),
    "cross_out": (WIDTH, WIDTH),
    "up": (HIDDEN, WIDTH),
    "down": (WIDTH, HIDDEN),
}


def layer_names() -> list[tuple[str, str]]:
    """(group, `GROUP.i`) of the ten linear layers."""
    return [(g, f"{g}.{i}") for g, names in GROUPS.items() for i in range(len(names))]


def run_block(
    x0: Tensor,
    context: Tensor,
    modulation: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: list[Tensor],
    weights: list[Tensor],
    downs: list[Tensor],
    ups: list[Tensor],
    policy: str,
    products: str,
) -> Tensor:
    """The block's result [B, L, D]; arguments as `models.block.FusedBlockFunction` names them."""
    tensors: dict[str, Tensor] = {
        "x0": x0, "context": context, "modulation": modulation, "cos": cos, "sin": sin,
        "norm.self": norms[0], "norm.cross": norms[1],
    }  # fmt: skip
    for (_, name), weight, down, up in zip(layer_names(), weights, downs, ups, strict=True):
        tensors |= {f"weight.{name}": weight, f"down.{name}": down, f"up.{name}": up}
    linear: dict[str, dict[str, Any]] = {
        group: {"scales": [1.0] * len(names)} for group, names in GROUPS.items()
    }
    if context.dtype == torch.float16:
        counts = torch.zeros(1, dtype=torch.int32, device=context.device)
        for arguments in linear.values():
            arguments["counter"] = (counts, 0)
    settings = BlockSettings(
        policy=policy,
        attn_mode="triton",
        dtype=context.dtype,
        head_dim=HEAD,
        linear=linear,
        rows=None,
        products=products,
    )
    return FusedBlockFunction.apply(settings, list(tensors), *tensors.values())


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    length, rows, rank = sizes["L"], sizes["S"], sizes["R"]

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return randn(*shape, dtype=dtype, device=device)

    # As in the model: float16 keeps the modulation in float32, and rows with a power of two each.
    half = dtype == torch.float16
    stream = torch.float32 if half else dtype
    x0 = draw(1, length, WIDTH, dtype=stream)
    shapes = [SHAPES[group] for group, _ in layer_names()]
    return {
        "x0": stored(x0, x0.new_empty(0, WIDTH + TAIL, dtype=dtype)) if half else x0,
        "context": draw(1, rows, CONTEXT),
        # With adapters on the AdaLN layers the sums for their gradients are taken too.
        "modulation": draw(1, 9, WIDTH, dtype=stream).requires_grad_(bool(sizes["adaln"])),
        "cos": draw(length, HEAD // 2),
        "sin": draw(length, HEAD // 2),
        "norms": [draw(2, HEAD), draw(2, HEAD)],
        "weights": [draw(n, k) for n, k in shapes],
        "downs": [draw(rank, k, dtype=torch.float32) for _, k in shapes],
        "ups": [draw(n, rank, dtype=torch.float32) for n, _ in shapes],
        # Other policies launch the same variants again.
        "policy": "none",
        "products": "cublas" if sizes.get("cublas") else "triton",
    }


def _real_shapes(tokens: int) -> Mapping[str, Sizes]:
    even = {"L": tokens, "S": 96, "R": 32, "adaln": 0}
    # Sizes that 16 does not divide are other variants: texts have any number of rows.
    odd = {"L": tokens - 2, "S": 77, "R": 4, "adaln": 1}
    return {
        f"{label} {products}": {**sizes, "cublas": products == "cublas"}
        for label, sizes in (("even", even), ("odd", odd))
        for products in ("triton", "cublas")
    }


FUSED_BLOCK = Op(
    name="fused_block",
    function=run_block,
    reference=run_block,
    make_inputs=_inputs,
    grads=("x0", "downs", "ups"),
    shapes=(),
    real_shapes=_real_shapes,
    cost=lambda sizes, itemsize: Cost(0, 0),
    cost_note="see its ops",
)


def _run_short(chain: int, **inputs: Any) -> tuple[Tensor, ...]:
    """The gradients of x0 and the adapters, forward and backward in one setting as in a run."""
    wanted = [inputs["x0"], *inputs["downs"], *inputs["ups"]]
    for leaf in wanted:
        leaf.requires_grad_()
    with use_sums(chain):
        out = run_block(**inputs)
        return torch.autograd.grad(out, wanted, torch.empty_like(out))


def _short_shapes(tokens: int) -> Mapping[str, Sizes]:
    return {k: v for k, v in _real_shapes(tokens).items() if not v["cublas"]}


FUSED_BLOCK_SHORT = dataclasses.replace(
    FUSED_BLOCK,
    name="fused_block_short",
    function=partial(_run_short, max(CHAINS)),
    grads=(),
    real_shapes=_short_shapes,
    dtypes=(torch.float16,),
)


def in_chains_of(op: Op, chain: int) -> Op:
    """An op with short sums, a block too, whose sums have another length: for compile checks."""
    name = f"{op.name}_{chain}"
    if op is FUSED_BLOCK_SHORT:
        return dataclasses.replace(op, name=name, function=partial(_run_short, chain))

    def inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
        return op.make_inputs(sizes, dtype, device) | {"chain": chain}

    return dataclasses.replace(op, name=name, make_inputs=inputs)
