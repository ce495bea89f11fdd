"""What a block keeps between forward and backward, and its peak: eager, and fused at each policy.

    python -m pytest benchmarks/test_memory.py --tokens 4096

Kept bytes are counted from outside: every storage that autograd saves, once, without weights and
without the block's result, which is the next block's input. On a card the allocator is asked too,
which also sees what a Function keeps past autograd, and for the peak of one forward and backward.
Without a card the real width runs with few tokens; the allocator's figures do not exist there. The
peak of a whole step is in test_step.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_models import DEVICE, POLICIES, Bench
from torch import Tensor

from anima_fast.measure.timer import on_card
from anima_fast.models.dit_config import PUBLISHED
from benchmarks.rows import Row

DTYPE = torch.bfloat16
TOKENS = (1024, 4096) if on_card() else (256,)
TEXT_ROWS, PADDED_ROWS = 96, 512
ONE_BLOCK = dataclasses.replace(PUBLISHED, num_blocks=1)
RANK = 32
MIB = 2**20
PROVIDERS = ("eager", *(f"ours {policy}" for policy in POLICIES))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tokens" in metafunc.fixturenames:
        metafunc.parametrize("tokens", metafunc.config.getoption("--tokens") or TOKENS)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(ONE_BLOCK, rank=RANK, dtype=DTYPE)


def block_inputs(bench: Bench, tokens: int) -> tuple[Tensor, Any]:
    """x₀ [1, L, D] with a gradient, and what blocks share."""
    side = round(tokens**0.5)
    text = torch.randn(1, TEXT_ROWS, ONE_BLOCK.context_dim, device=DEVICE, dtype=DTYPE)
    sigma = torch.rand(1, device=DEVICE)
    shared = bench.dit._shared(sigma, text, side, tokens // side, PADDED_ROWS - TEXT_ROWS)
    x = torch.randn(1, tokens, ONE_BLOCK.model_channels, device=DEVICE, dtype=DTYPE)
    return x.requires_grad_(), shared


def kept_bytes(bench: Bench, x: Tensor, shared: Any) -> int:
    """Bytes that autograd saves in one forward of block 0, each storage once."""
    block = bench.dit.blocks[0]
    weights = [*bench.dit.parameters(), *bench.network.parameters()]
    own = {p.untyped_storage().data_ptr() for p in weights}
    alive: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = block(x, shared)
    alive.pop(out.untyped_storage().data_ptr(), None)
    out.sum().backward()
    return sum(alive.values())


def allocated(bench: Bench, x: Tensor, shared: Any) -> tuple[int, int]:
    """Bytes that the allocator holds more after a forward, and its peak over both directions."""
    for _ in range(2):
        # Once to warm up: libraries take their workspaces.
        x.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = bench.dit.blocks[0](x, shared)
        kept = torch.cuda.memory_allocated() - before - out.untyped_storage().nbytes()
        out.backward(torch.ones_like(out))
        peak = torch.cuda.max_memory_allocated() - before
        del out
    return kept, peak


@pytest.mark.parametrize("provider", PROVIDERS)
def test_block(tokens: int, provider: str, bench: Bench, record: Callable[[Row], Row]) -> None:
    unit = tokens * ONE_BLOCK.model_channels * DTYPE.itemsize
    shape = f"B=1 L={tokens} S={TEXT_ROWS} D={ONE_BLOCK.model_channels} R={RANK}"
    row = Row("block", provider, "saved", shape, "bfloat16", tokens=tokens, batch=1)
    bench.switch(provider)
    x, shared = block_inputs(bench, tokens)
    found = kept_bytes(bench, x, shared)
    record(dataclasses.replace(row, p50=found / MIB, unit="MiB"))
    note = "of one [B, L, D] tensor of 16 bit"
    record(dataclasses.replace(row, p50=found / unit, unit="units", note=note))
    if on_card():
        held, peak = allocated(bench, x, shared)
        record(dataclasses.replace(row, mode="allocated", p50=held / MIB, unit="MiB"))
        record(dataclasses.replace(row, mode="block peak", p50=peak / MIB, unit="MiB"))
    # x₀ at least; without gradients nothing would be kept.
    assert found >= unit
