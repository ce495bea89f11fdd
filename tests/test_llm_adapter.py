"""The LLM adapter against golden vectors and against diffusers."""

import golden
import pytest
import torch
from tiny_dit import TINY_ADAPTER, adapter_weights, dit_weights, relative_error

from anima_fast.errors import UserError
from anima_fast.models.llm_adapter import (
    AdapterConfig,
    AdapterNorm,
    LLMAdapter,
    has_llm_adapter,
    load_llm_adapter,
)
from anima_fast.models.rope import sequence_angles


def make_inputs(batch=3, tokens=7, rows=9):
    """T5 ids and mask, source states and mask; the last sample has an empty source."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, TINY_ADAPTER.vocabulary, (batch, tokens), generator=generator)
    states = torch.randn(batch, rows, TINY_ADAPTER.source_width, generator=generator)
    t5_mask, source_mask = torch.ones_like(ids), torch.ones(batch, rows, dtype=torch.long)
    t5_mask[1, 3:] = 0
    source_mask[1, 4:] = 0
    source_mask[-1] = 0
    return ids, t5_mask, states, source_mask


def test_golden_output_and_gradients():
    tensors, _ = golden.load("adapter")
    adapter = load_llm_adapter(golden.weights(tensors), dtype=torch.float32).requires_grad_(True)
    source = tensors["source"].clone().requires_grad_()
    inputs = tensors["target_ids"], tensors["target_mask"], source, tensors["source_mask"]
    raw = []
    adapter.norm.register_forward_hook(lambda module, args, output: raw.append(output))
    out = adapter(*inputs)
    torch.testing.assert_close(out, tensors["out"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(raw[0], tensors["out_before_zeroing"], atol=2e-5, rtol=1e-4)
    assert (out[tensors["target_mask"] == 0] == 0).all()

    (out * tensors["grad_out"]).sum().backward()
    torch.testing.assert_close(source.grad, tensors["grad_source"], atol=2e-5, rtol=1e-4)
    parameters = dict(adapter.named_parameters())
    checked = [key for key in tensors if key.startswith("grad_w.")]
    assert len(checked) > 20
    for key in checked:
        expected = tensors[key]
        limit = 5e-3 if expected.dtype == torch.bfloat16 else 1e-4
        found = parameters[key.removeprefix("grad_w.")].grad
        assert relative_error(found, expected) < limit, key


def test_golden_row_without_masks():
    """A row without padding needs no masks: running it alone gives the same."""
    tensors, _ = golden.load("adapter")
    adapter = load_llm_adapter(golden.weights(tensors), dtype=torch.float32)
    ids, source = tensors["target_ids"][:1], tensors["source"][:1]
    out = adapter(ids, torch.ones_like(ids), source, torch.ones(source.shape[:2]))
    torch.testing.assert_close(out, tensors["out_row0_no_masks"], atol=2e-5, rtol=1e-4)


def test_golden_tables():
    tensors, _ = golden.load("tables")
    angles = sequence_angles(64, 40)
    torch.testing.assert_close(angles.cos(), tensors["adapter_rope_hd64.cos"], atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(angles.sin(), tensors["adapter_rope_hd64.sin"], atol=4e-6, rtol=1e-6)
    for dtype in ("f32", "bf16"):
        norm = AdapterNorm(64)
        norm.weight.data = tensors[f"rmsnorm_adapter.{dtype}.w"]
        found = norm(tensors[f"rmsnorm_adapter.{dtype}.x"])
        expected = tensors[f"rmsnorm_adapter.{dtype}.y"]
        assert found.dtype == expected.dtype
        if dtype == "f32":
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        else:
            step = torch.finfo(torch.bfloat16).eps * expected.float().abs()
            assert ((found.float() - expected.float()).abs() <= 1.01 * step).all()


def test_published_names_and_shapes():
    published = golden.load_json("keys_dit")
    own = {
        key.removeprefix("llm_adapter."): tuple(shape)
        for key, shape in published.items()
        if key.startswith("llm_adapter.")
    }
    config = AdapterConfig.from_shapes(own)
    with torch.device("meta"):
        adapter = LLMAdapter(config)
    assert {k: tuple(v.shape) for k, v in adapter.state_dict().items()} == own
    assert sum(p.numel() for p in adapter.parameters()) == 134_663_680


def test_padding_changes_nothing():
    """A padded sample equals the same sample without its padding."""
    ids, t5_mask, states, source_mask = make_inputs()
    adapter = load_llm_adapter(adapter_weights(), dtype=torch.float32)
    out = adapter(ids, t5_mask, states, source_mask)
    alone = adapter(ids[1:2, :3], t5_mask[1:2, :3], states[1:2, :4], source_mask[1:2, :4])
    torch.testing.assert_close(out[1:2, :3], alone, atol=3e-6, rtol=1e-5)
    assert (out[1, 3:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_source_is_finite_forward_and_backward(dtype):
    ids, t5_mask, states, source_mask = make_inputs()
    adapter = load_llm_adapter(adapter_weights(), dtype=dtype).requires_grad_(True)
    states = states.to(dtype).requires_grad_()
    out = adapter(ids, t5_mask, states, source_mask)
    assert out.dtype == dtype and out.isfinite().all()
    out.float().square().sum().backward()
    assert states.grad.isfinite().all() and (states.grad[-1] == 0).all()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    # Nothing of the hidden states reaches it.
    other = states.detach().clone()
    other[-1] += 1
    torch.testing.assert_close(adapter(ids, t5_mask, other, source_mask), out)


@pytest.mark.parametrize(
    "prefix", ["", "llm_adapter.", "net.llm_adapter.", "model.diffusion_model.llm_adapter."]
)
def test_prefixes(prefix):
    weights = {prefix + k: v for k, v in adapter_weights().items()}
    if prefix.startswith(("net.", "model.")):
        dit_prefix = prefix.removesuffix("llm_adapter.")
        weights |= {dit_prefix + k: v for k, v in dit_weights().items()}
    assert has_llm_adapter(weights)
    adapter = load_llm_adapter(weights, dtype=torch.float32)
    assert adapter.config == TINY_ADAPTER
    inputs = make_inputs()
    expected = load_llm_adapter(adapter_weights(), dtype=torch.float32)(*inputs)
    torch.testing.assert_close(adapter(*inputs), expected)
    assert not any(p.requires_grad for p in adapter.parameters()) and not adapter.training


def test_files_without_an_adapter():
    assert not has_llm_adapter(dit_weights())
    with pytest.raises(UserError, match="--llm_adapter_path"):
        load_llm_adapter(dit_weights())
    with pytest.raises(UserError, match="this is a Qwen-Image VAE"):
        load_llm_adapter({"encoder.conv1.weight": torch.zeros(1)})


def test_damaged_adapters():
    weights = adapter_weights()
    missing = dict(weights)
    del missing["blocks.1.mlp.0.bias"]
    with pytest.raises(UserError, match=r"1 tensors missing \(blocks.1.mlp.0.bias\)"):
        load_llm_adapter(missing)
    with pytest.raises(UserError, match=r"1 tensors unexpected \(extra\)"):
        load_llm_adapter({**weights, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match="impossible shape"):
        load_llm_adapter({**weights, "embed.weight": torch.zeros(0, 64)})
    del missing["blocks.0.mlp.0.weight"]
    with pytest.raises(UserError, match=r"blocks.0.mlp.0.weight is missing"):
        load_llm_adapter(missing)


def test_wrong_shapes():
    ids, t5_mask, states, source_mask = make_inputs()
    adapter = load_llm_adapter(adapter_weights())
    with pytest.raises(ValueError, match="source_states are"):
        adapter(ids, t5_mask, states[..., :-1], source_mask)
    with pytest.raises(ValueError, match="masks are"):
        adapter(ids, t5_mask[:, 1:], states, source_mask)


def test_parity_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    weights = adapter_weights(seed=9)
    config = TINY_ADAPTER
    theirs = diffusers.AnimaTextConditioner(
        source_dim=config.source_width,
        target_dim=config.context_dim,
        model_dim=config.width,
        num_layers=config.layers,
        num_attention_heads=config.width // config.head_dim,
        mlp_ratio=config.hidden / config.width,
        target_vocab_size=config.vocabulary,
        min_sequence_length=512,
    ).eval()
    theirs.load_state_dict(weights, strict=True)
    ids, t5_mask, states, source_mask = make_inputs()
    states.requires_grad_()
    out = load_llm_adapter(weights, dtype=torch.float32)(ids, t5_mask, states, source_mask)
    expected = theirs(states, ids, t5_mask, source_mask)
    # Theirs is padded with zero rows to 512; ours leaves them out.
    assert expected.shape[1] == 512 and (expected[:, out.shape[1] :] == 0).all()
    torch.testing.assert_close(out, expected[:, : out.shape[1]], atol=2e-5, rtol=1e-4)
    grads = [torch.autograd.grad(o.square().sum(), states)[0] for o in (out, expected)]
    assert relative_error(grads[0][:2], grads[1][:2]) < 1e-4
