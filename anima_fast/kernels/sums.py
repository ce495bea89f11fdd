"""How products on tensor cores are summed: in float32, or in short chains of float16.

    float32 sums   acc ← acc + a b, every addition in float32
    short sums     acc ← acc + float32(a b), a b of one step along K in float16, at most 64 terms

A GeForce runs float16 products with float16 sums at twice the rate of those with float32 sums
(data sheets), and bfloat16 knows the latter alone. A chain of n terms in float16 has a rounding
every 16 terms; ended after 64 terms and added up in float32, y has an error of 4·10⁻⁴ against
2·10⁻⁴ with float32 sums and 1.6·10⁻³ of bfloat16. A whole row of K = 8192 would have 4·10⁻³.

Which products of a kernel are short is to be seen in the kernel: `dot_into` with its constexpr
SHORT_SUMS (the terms of a chain, 0 for float32 sums) is short where that is asked for, and a plain
`tl.dot` never is. Logits of attention, and the products of adapters that are narrow in two of three
sizes (bound by memory), stay plain.

`use_sums` says it for a process: forward and backward of a step belong inside one block, whatever
thread runs them. Only float16 has short sums; other types go on in float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima_fast.kernels.op import Inputs, Op, Sizes

# Terms of a chain: none, those of the numbers above, and half of them, for a card that rounds
# float16 sums worse than to the nearest.
CHAINS = (0, 64, 32)
LONGEST = tl.constexpr(max(CHAINS))

_chain = 0


@contextlib.contextmanager
def use_sums(chain: int) -> Iterator[None]:
    """Inside the block products of float16 are summed in chains of so many terms; 0: in float32.

    Raises `ValueError` for a length that is not in `CHAINS`.
    """
    before = _chain
    set_sums(chain)
    try:
        yield
    finally:
        set_sums(before)


def set_sums(chain: int) -> None:
    """`use_sums` from here on: of a whole run, whose steps lie in no one block."""
    global _chain
    _chain = checked(chain)


def checked(chain: int) -> int:
    """`chain` itself. Raises `ValueError` when it is not in `CHAINS`."""
    if chain not in CHAINS:
        raise ValueError(f"chain is {chain}, expected one of {', '.join(map(str, CHAINS))} terms")
    return chain


def chain_of(x: Tensor, chain: int | None = None) -> int:
    """Terms that products of `x` add in float16, 0 for none; `chain` overrides `use_sums`."""
    if x.dtype != torch.float16:
        return 0
    return _chain if chain is None else checked(chain)


@triton.jit
def dot_into(
    acc, a, b, SHORT_SUMS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """acc + a b, of type ACC: a b in one chain of float16, or added term by term."""
    if SHORT_SUMS:
        tl.static_assert(a.shape[1] <= LONGEST, "a step along K is one chain")
        acc += tl.dot(a, b, out_dtype=tl.float16).to(ACC)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.constexpr_function
def part_of(width: int, chain: int) -> int:
    """The widest part of a row of `width` that is one chain; all of it with float32 sums."""
    return min(width, chain) if chain else width


def with_short_sums(op: Op, shapes: tuple[Sizes, ...], model_shapes: tuple[Sizes, ...]) -> Op:
    """The float16 variant of an op with a `chain`, for the registry, at a few shapes."""

    def inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Inputs:
        return op.make_inputs(sizes, dtype, device) | {"chain": max(CHAINS)}

    return dataclasses.replace(
        op,
        name=f"{op.name}_short",
        make_inputs=inputs,
        shapes=shapes,
        model_shapes=model_shapes,
        dtypes=(torch.float16,),
        yardstick=torch.bfloat16,
        cost_note=f"as {op.name}",
    )
