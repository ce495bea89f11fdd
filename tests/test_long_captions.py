"""Captions over 512 tokens: numerics of mixed batches, what is encoded, which caches are reused."""

import pytest
import torch
from tiny_dit import TINY, dit_weights

from anima_fast.adapters.lora import add_lora
from anima_fast.data.batches import pad_contexts
from anima_fast.data.cache import TextEntry
from anima_fast.kernels import dispatch
from anima_fast.models.dit import DitConfig, load_dit
from anima_fast.models.fuse import fuse_blocks

LENGTHS = (600, 75, 560, 512)


def contexts(lengths=LENGTHS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        TextEntry(context=torch.randn(n, TINY.context_dim, generator=generator).to(dtype))
        for n in lengths
    ]


def make_dit(fused, attn_mode="torch", dtype=torch.float64, blocks=2):
    config = DitConfig(**{**TINY.__dict__, "num_blocks": blocks})
    dit = load_dit(dit_weights(config), dtype=dtype, attn_mode=attn_mode)
    network = add_lora(dit, rank=2, alpha=2.0, seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    for adapter in network.adapters:
        adapter.up.data.copy_(torch.randn(adapter.up.shape, generator=generator) * 0.3)
    if fused:
        fuse_blocks(dit, "none")
    return dit, network


def velocity(dit, entries, dtype=torch.float64, zero_keys=None):
    """Velocities [B, 16, 4, 6] of the same image and noise level beside each text."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, TINY.in_channels, 4, 6, generator=generator, dtype=dtype)
    text = pad_contexts(entries)
    batch = len(entries)
    sigma = torch.full((batch,), 0.5, dtype=dtype)
    context = text.context.to(dtype)
    zero_keys = text.zero_keys if zero_keys is None else zero_keys
    return dit(latents.expand(batch, -1, -1, -1), sigma, context, zero_keys=zero_keys)


@pytest.mark.parametrize("attn_mode", ["torch", "triton"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_text_gives_the_same_alone_and_in_a_mixed_batch(fused, attn_mode):
    entries = contexts()
    dit, _ = make_dit(fused, attn_mode)
    with dispatch.use("reference"), torch.no_grad():
        together = velocity(dit, entries)
        alone = torch.cat([velocity(dit, [entry]) for entry in entries])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=1e-9)
    # Without the counts a short text would see 525 zero rows instead of 437.
    with dispatch.use("reference"), torch.no_grad():
        assert (velocity(dit, entries, zero_keys=0)[1] - alone[1]).abs().max() > 1e-5


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_gradients_of_a_mixed_batch_are_those_of_its_samples(kernels):
    """Fused blocks, whose backward is their own, against eager ones a sample at a time."""
    dtype = torch.float32
    entries = contexts((530, 3))
    eager, plain = make_dit(False, dtype=dtype, blocks=1)
    for entry in entries:
        velocity(eager, [entry], dtype).square().sum().backward()
    fused, network = make_dit(True, dtype=dtype, blocks=1)
    with dispatch.use(kernels):
        velocity(fused, entries, dtype).square().sum().backward()
    wanted = plain.modules_by_name
    for name, adapter in network.modules_by_name.items():
        for kind in ("down", "up"):
            found, expected = getattr(adapter, kind).grad, getattr(wanted[name], kind).grad
            scale = expected.abs().max().clamp_min(1e-6)
            assert (found - expected).abs().max() / scale < 2e-4, f"{name}.{kind}"


def test_zero_rows_of_a_batch():
    """The counts are those of each text: 512 is a floor."""
    assert pad_contexts(contexts((75, 20))).zero_keys == 512 - 75
    assert pad_contexts(contexts((512, 20))).zero_keys == 0
    mixed = pad_contexts(contexts(LENGTHS))
    assert mixed.context.shape[1] == 600
    assert list(mixed.zero_keys) == [0, 512 - 600, 560 - 600, 512 - 600]
    assert pad_contexts(contexts((600, 600))).zero_keys == 0
