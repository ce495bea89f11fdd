"""The launches of a block by provider, and with errors planted, as JSON; not interpreted."""

import json
import sys
from dataclasses import asdict, replace

import torch
from tiny_dit import TINY
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from anima_fast.bench.launches import PROVIDERS, BlockSizes, block_launches
from anima_fast.bench.pretend import Card
from anima_fast.models import block, fused_attention

SMALL = BlockSizes(tokens=64, text=24, model=replace(TINY, num_blocks=1))
TRITON = "own none triton-attention"


def rows(provider, sizes=None, card=None):
    """Value and parts by metric and mode."""
    measured = block_launches(provider, sizes, card).measurements()
    return {f"{m.metric} {m.mode}".strip(): asdict(m) for m in measured}


def twice(gate_residual):
    def launched(*args):
        gate_residual(*args)
        return gate_residual(*args)

    return launched


def planted(name, value):
    before = getattr(block, name)
    setattr(block, name, value)
    try:
        return rows("own none", SMALL)
    finally:
        setattr(block, name, before)


def patched():
    """Everything that a count replaces for its time."""
    names = [
        (torch.Tensor, "is_cuda"),
        (torch.cuda, "get_device_capability"),
        (torch.backends.cuda, "is_flash_attention_available"),
        (torch, "_fused_sdp_choice"),
        (torch.nn.functional, "scaled_dot_product_attention"),
        (JITFunction, "run"),
        (driver, "_active"),
    ]
    return [(name, name in vars(owner), getattr(owner, name)) for owner, name in names]


def failing():
    """A count that ends with an error in the middle of the block."""
    try:
        planted("gate_residual_forward", None)
    except TypeError:
        return fused_attention._capability.cache_info().currsize == 0
    return False


before = patched()
found = {
    "block": {provider: rows(provider) for provider in PROVIDERS},
    "cards": {
        "hopper": rows("own none", SMALL, Card(90)),
        "windows": rows("own none", SMALL, Card(89, flash=False)),
    },
    "small": {p: rows(f"own {p} triton-attention", SMALL) for p in ("none", "mlp", "block")},
    "plain": rows("own none", SMALL),
    "planted launch": planted("gate_residual_forward", twice(block.gate_residual_forward)),
    "planted kept": planted("KEPT", (*block.KEPT, "y0")),
    "restored": failing() and [entry[:2] for entry in before] == [e[:2] for e in patched()]
    and all(a[2] is b[2] or a[2] == b[2] for a, b in zip(before, patched(), strict=True)),
}  # fmt: skip
json.dump(found, sys.stdout)
