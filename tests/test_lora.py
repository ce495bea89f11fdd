"""LoRA networks: targets, groups, initial values, the formula, the flat buffer, dropouts, files."""

import math
from itertools import pairwise

import golden
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_dit import (
    TINY_ADAPTER,
    adapter_weights,
    dit_weights,
    make_dit,
    make_inputs,
    relative_error,
)

from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import add_lora
from anima_fast.errors import UserError
from anima_fast.models.dit import AnimaDiT, DitConfig, load_dit
from anima_fast.models.llm_adapter import AdapterConfig, LLMAdapter, load_llm_adapter
from anima_fast.models.text_encoder import TextEncoder

LAYER = "blocks.0.mlp.layer1"


def empty_models(dit, adapter, layers, **qwen3):
    """A DiT, an LLM adapter and a text encoder without any weights."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(num_hidden_layers=layers, vocab_size=8, **qwen3)
    with torch.device("meta"):
        return AnimaDiT(dit), LLMAdapter(adapter), TextEncoder(Qwen3Model(config))


@pytest.fixture(scope="module")
def full_size():
    shapes = golden.load_json("keys_dit")
    own = {k: v for k, v in shapes.items() if not k.startswith("llm_adapter.")}
    adapter = {k.removeprefix("llm_adapter."): v for k, v in shapes.items() if k not in own}
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    return empty_models(DitConfig.from_shapes(own), AdapterConfig.from_shapes(adapter), 28, **sizes)


def randomize(network, seed=0, std=0.2):
    """Give every matrix random values, so that both sides count."""
    network.flat.copy_(
        std * torch.randn(network.flat.shape, generator=torch.Generator().manual_seed(seed))
    )
    return network


def make_network(**options):
    return randomize(add_lora(make_dit(), **{"rank": 4, "alpha": 2.0, "seed": 1} | options))


def matrices(network):
    return {n: (a.down.detach(), a.up.detach()) for n, a in network.modules_by_name.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert all(map(torch.equal, found[name], pair)), name


# Targets


def test_full_size_default_network(full_size):
    dit, _, _ = full_size
    network = add_lora(dit, rank=16, alpha=16)
    tensors = network.state_tensors()
    weights = {k: t for k, t in tensors.items() if not k.endswith(".alpha")}
    assert (len(network.modules_by_name), len(tensors)) == (280, 840)
    assert sum(t.numel() for t in weights.values()) == network.flat.numel() == 22_937_600
    assert tensors["lora_unet_blocks_27_mlp_layer2.lora_down.weight"].shape == (16, 8192)
    assert tensors["lora_unet_blocks_27_cross_attn_v_proj.lora_down.weight"].shape == (16, 1024)
    network.remove()


@pytest.mark.parametrize(
    ("with_adapter", "with_text_encoder", "options", "count"),
    [
        (False, False, {}, 280),
        (True, False, {}, 340),
        (False, True, {}, 476),
        (True, True, {}, 536),
        (False, True, {"train_dit": False}, 196),
        # Six AdaLN layers a block, the patch embedding, two and three at the ends.
        (False, False, {"include_patterns": [".*"]}, 28 * 16 + 6),
    ],
)
def test_full_size_module_counts(full_size, with_adapter, with_text_encoder, options, count):
    dit, adapter, text_encoder = full_size
    given = {"llm_adapter": adapter if with_adapter else None}
    given["text_encoder"] = text_encoder if with_text_encoder else None
    network = add_lora(dit, rank=1, **given, **options)
    assert len(network.modules_by_name) == count
    network.remove()


GOLDEN_CASES = {
    "default": {},
    "adapter": {"adapter": True},
    "text_encoder": {"text_encoder": True},
    "include_extra": {
        "include_patterns": [r".*adaln_modulation.*", r"[xt]_embedder\..*", r"final_layer\..*"]
    },
    "exclude_mlp": {"exclude_patterns": [r".*mlp.*"]},
    "reg_dims": {"reg_dims": {".*self_attn.*": 8, ".*cross_attn.*": 2, ".*mlp.*": 6}},
}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_saved_names_and_shapes(case):
    options = dict(GOLDEN_CASES[case])
    dit, adapter, text_encoder = empty_models(
        DitConfig(64, 2, 2, 32, 32, 16, 256),
        AdapterConfig(32, 32, 2, 16, 128, 8, 32),
        2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    network = add_lora(
        dit,
        llm_adapter=adapter if options.pop("adapter", False) else None,
        text_encoder=text_encoder if options.pop("text_encoder", False) else None,
        **options,
    )
    found = {key: list(tensor.shape) for key, tensor in network.state_tensors().items()}
    assert found == golden.load_json("lora_keys")["keys"][case]


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({}, LAYER, "final_layer.linear"),
        ({}, LAYER, "blocks.0.adaln_modulation_mlp.1"),
        ({}, LAYER, "t_embedder.1.linear_1"),
        ({"exclude_patterns": [r"blocks\.[01]\..*"]}, "blocks.2.mlp.layer1", LAYER),
        # Patterns match whole names.
        ({"exclude_patterns": ["mlp"], "include_patterns": ["final"]}, LAYER, "final_layer.linear"),
        ({"exclude_patterns": [".*"], "include_patterns": [LAYER]}, LAYER, "blocks.0.mlp.layer2"),
        ({"include_patterns": [r"t_embedder\..*"]}, "t_embedder.1.linear_2", "x_embedder.proj.1"),
    ],
)
def test_include_beats_exclude_beats_the_default(options, present, absent):
    names = make_network(**options).modules_by_name
    assert present in names and absent not in names


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"exclude_patterns": ["(("]}, "exclude_patterns: .* not a regular expression"),
        ({"include_patterns": ["*"]}, "include_patterns: .* not a regular expression"),
        ({"reg_dims": {"(": 1}}, "network_reg_dims: .* not a regular expression"),
        ({"reg_lrs": {"(": 1}}, "network_reg_lrs: .* not a regular expression"),
        ({"reg_dims": {".*": 0}}, "gets rank 0"),
        ({"exclude_patterns": [".*"]}, "no module is left"),
        ({"unet_lr": 0.0}, "every learning rate is 0"),
        ({"reg_lrs": {".*": 0}}, "every learning rate is 0"),
    ],
)
def test_refused_options(options, match):
    with pytest.raises(UserError, match=match):
        add_lora(make_dit(), **options)


def test_first_matching_rank_wins_and_alpha_stays():
    network = make_network(reg_dims={r".*\.0\.mlp.*": 3, ".*mlp.*": 5, ".*layer1": 7})
    ranks = {name: adapter.rank for name, adapter in network.modules_by_name.items()}
    assert ranks[LAYER] == 3 and ranks["blocks.1.mlp.layer1"] == 5
    assert ranks["blocks.1.self_attn.q_proj"] == 4
    assert {adapter.alpha for adapter in network.modules_by_name.values()} == {2.0}


@pytest.mark.parametrize(
    ("alpha", "scale"), [(0, 1.0), (None, 1.0), (0.0, 1.0), (1.0, 0.25), (8, 2.0)]
)
def test_alpha_zero_means_rank(alpha, scale):
    adapter = make_network(alpha=alpha).modules_by_name[LAYER]
    assert adapter.scale == scale and adapter.alpha == scale * 4


# Learning-rate groups


def groups_of(network):
    return {group["name"]: group["lr"] for group in network.param_groups()}


def test_one_group_per_part():
    _, _, text_encoder = tiny_text()
    assert groups_of(make_network(unet_lr=3e-4)) == {"unet": 3e-4}
    network = make_network(text_encoder=text_encoder, unet_lr=3e-4, text_encoder_lr=1e-5)
    assert groups_of(network) == {"unet": 3e-4, "textencoder": 1e-5}
    network = make_network(text_encoder=text_encoder, unet_lr=3e-4)
    assert groups_of(network) == {"unet": 3e-4, "textencoder": 3e-4}


@pytest.mark.parametrize(
    ("ratios", "unet", "text"),
    [
        ({"loraplus_ratio": 4}, 4, 4),
        ({"loraplus_ratio": 4, "loraplus_unet_ratio": 16}, 16, 4),
        ({"loraplus_ratio": 4, "loraplus_te_ratio": 2}, 4, 2),
        ({"loraplus_unet_ratio": 16}, 16, 1),
    ],
)
def test_loraplus_raises_the_rate_of_up(ratios, unet, text):
    _, _, text_encoder = tiny_text()
    network = make_network(text_encoder=text_encoder, unet_lr=1e-4, text_encoder_lr=1e-5, **ratios)
    rates = {id(p): g["lr"] for g in network.param_groups(flat=False) for p in g["params"]}
    for name, adapter in network.modules_by_name.items():
        rate, ratio = (1e-5, text) if name.startswith("text_encoder.") else (1e-4, unet)
        assert rates[id(adapter.down)] == rate
        assert rates[id(adapter.up)] == pytest.approx(rate * ratio)
    assert groups_of(network)["unet_plus"] == pytest.approx(1e-4 * unet)


def test_rates_by_pattern_first_match_wins_and_zero_freezes():
    network = make_network(reg_lrs={r"blocks\.0\..*": 0, ".*mlp.*": 1e-5, ".*": 2e-5}, unet_lr=1.0)
    assert groups_of(network) == {"unet_reg_1e-05": 1e-5, "unet_reg_2e-05": 2e-5}
    frozen = network.modules_by_name[LAYER]
    before = network.flat.clone()
    for name, adapter in network.modules_by_name.items():
        assert adapter.down.requires_grad == adapter.up.requires_grad
        assert adapter.up.requires_grad == (not name.startswith("blocks.0."))
    network.flat_grad.fill_(1.0)
    torch.optim.SGD(network.param_groups(), lr=1.0).step()
    trained = network.flat_grad.numel()
    assert trained == network.flat.numel() * 2 // 3
    assert torch.equal(network.flat[trained:], before[trained:]) and frozen.up.grad is None
    # What is frozen is still in the file.
    assert "lora_unet_blocks_0_mlp_layer1.lora_up.weight" in network.state_tensors()


# Initial values and the formula


def test_initial_values_are_kaiming_uniform_and_zero():
    network = add_lora(make_dit(), rank=64, seed=3)
    for adapter in network.modules_by_name.values():
        bound = 1 / math.sqrt(adapter.down.shape[1])
        assert 0.98 * bound < adapter.down.abs().max() <= bound
        assert adapter.down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert (adapter.up == 0).all()
    first, second = list(network.modules_by_name.values())[:2]
    assert not torch.equal(first.down, second.down)


def test_initial_values_come_from_seed_and_name():
    whole, again, other = (matrices(add_lora(make_dit(), seed=seed)) for seed in (3, 3, 4))
    assert_same(again, whole)
    assert not torch.equal(other[LAYER][0], whole[LAYER][0])
    part = matrices(add_lora(make_dit(), seed=3, exclude_patterns=[".*attn.*"]))
    assert_same(part, {name: whole[name] for name in part})
    unseeded = (add_lora(make_dit()).modules_by_name[LAYER].down for _ in range(2))
    assert not torch.equal(*unseeded)


def test_a_new_network_changes_nothing():
    dit, inputs = make_dit(), make_inputs()
    before, state = dit(*inputs), {k: v.clone() for k, v in dit.state_dict().items()}
    modules = [name for name, _ in dit.named_modules()]
    add_lora(dit)
    assert torch.equal(dit(*inputs), before)
    assert [name for name, _ in dit.named_modules()] == modules
    assert all(torch.equal(v, state[k]) for k, v in dit.state_dict().items())
    assert not any(p.requires_grad for p in dit.parameters())


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64), (2, 1, 3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_formula(shape, dtype):
    dit = make_dit(dtype=dtype)
    network = randomize(add_lora(dit, rank=4, alpha=6.0))
    network.multiplier = 0.5
    layer, adapter = dit.blocks[0].mlp.layer1, network.modules_by_name[LAYER]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    w, down, up = (m.detach().to(dtype).double() for m in (layer.weight, adapter.down, adapter.up))
    expected = x.double() @ w.T + 0.5 * 6 / 4 * (x.double() @ down.T @ up.T)
    found = layer(x).detach()
    assert found.dtype == dtype
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_golden_forward_and_gradients(tmp_path):
    tensors, metadata = golden.load("lora_forward")
    dit = load_dit(golden.weights(tensors), dtype=torch.float32)
    config = metadata["config"]
    network = add_lora(dit, rank=config["rank"], alpha=config["alpha"])
    saved = {k.removeprefix("lora."): v for k, v in tensors.items() if k.startswith("lora.")}
    assert saved.keys() == network.state_tensors().keys()
    save_file(saved, tmp_path / "lora.safetensors")
    assert network.load(tmp_path / "lora.safetensors") == []
    close = {"atol": 3e-5, "rtol": 1e-4}

    def run():
        mask = tensors["padding_mask"]
        return dit(tensors["x"], tensors["t"], tensors["context"], padding_mask=mask)

    network.multiplier = 0.5
    torch.testing.assert_close(run(), tensors["out_lora_mult0.5"], **close)
    network.multiplier = 1.0
    out = run()
    torch.testing.assert_close(out, tensors["out_lora"], **close)
    out.square().mean().backward()
    for name in (n for n in network.modules_by_name if n.startswith("blocks.0.")):
        adapter, flat = network.modules_by_name[name], f"lora_unet_{name.replace('.', '_')}"
        for side, matrix in (("down", adapter.down), ("up", adapter.up)):
            expected = tensors[f"grad.{flat}.lora_{side}.weight"]
            assert relative_error(matrix.grad, expected) < 2e-3, (name, side)
    network.remove()
    torch.testing.assert_close(run(), tensors["out_base"], **close)


def tiny_text():
    """T5 ids, an LLM adapter and a text encoder that fit each other."""
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=TINY_ADAPTER.source_width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    adapter = load_llm_adapter(adapter_weights(), dtype=torch.float32)
    encoder = TextEncoder(Qwen3Model(config)).requires_grad_(False).eval()
    return torch.arange(12).view(2, 6), adapter, encoder


def test_gradients_flow_through_text_encoder_and_adapter():
    ids, adapter, encoder = tiny_text()
    network = add_lora(
        None, train_dit=False, llm_adapter=adapter, text_encoder=encoder, rank=2, seed=1
    )
    assert len(network.modules_by_name) == 2 * 10 + 2 * 7
    randomize(network)
    mask = torch.ones_like(ids)
    adapter(ids, mask, encoder(ids, mask), mask).square().sum().backward()
    for name, layer in network.modules_by_name.items():
        assert layer.down.grad.abs().max() > 0 and layer.up.grad.abs().max() > 0, name


# The flat buffer


def is_view(tensor, buffer):
    return tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def run_backward(network, dit):
    network.zero_grad_flat()
    dit(*make_inputs()).square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_gradients_are_views_of_one_buffer(dtype):
    dit = make_dit()
    # Rank 3 gives matrices that do not fill a multiple of the alignment.
    network = randomize(add_lora(dit, rank=3, loraplus_ratio=2.0, dtype=dtype))
    pointers = []
    for _ in range(2):
        run_backward(network, dit)
        for param in network.parameters():
            assert param.dtype == param.grad.dtype == dtype
            assert is_view(param, network.flat) and is_view(param.grad, network.flat_grad)
        pointers.append([param.grad.data_ptr() for param in network.parameters()])
    assert pointers[0] == pointers[1] and len(set(pointers[0])) == len(pointers[0])
    starts = sorted((p.data_ptr(), p.numel() * p.element_size()) for p in network.parameters())
    assert all(a + size <= b for (a, size), (b, _) in pairwise(starts))
    assert all(start % 64 == network.flat.data_ptr() % 64 for start, _ in starts)


def test_groups_are_contiguous_slices_in_order():
    network = make_network(loraplus_ratio=4.0, reg_lrs={".*mlp.*": 1e-5, r".*\.k_proj": 0})
    slices, wholes = network.param_groups(), network.param_groups(flat=False)
    assert [g["name"] for g in slices] == [g["name"] for g in wholes]
    position, size = network.flat.data_ptr(), network.flat.element_size()
    for one, whole in zip(slices, wholes, strict=True):
        (part,) = one["params"]
        assert part.data_ptr() == position and is_view(part.grad, network.flat_grad)
        position += part.numel() * size
        for param in whole["params"]:
            offset = (param.data_ptr() - part.data_ptr()) // size
            assert torch.equal(part[offset : offset + param.numel()], param.flatten())
            assert param.grad.data_ptr() == part.grad[offset:].data_ptr()
    assert position == network.flat.data_ptr() + network.flat_grad.numel() * size
    # An optimizer keeps its state by parameter, so the slices are made once.
    assert all(
        a["params"][0] is b["params"][0]
        for a, b in zip(slices, network.param_groups(), strict=True)
    )


def test_backward_fills_and_zero_grad_clears_the_flat_gradient():
    dit = make_dit()
    network = randomize(add_lora(dit, rank=4, seed=1))
    params = list(network.parameters())
    loss = dit(*make_inputs()).square().mean()
    expected = torch.autograd.grad(loss, params)
    assert (network.flat_grad == 0).all()
    run_backward(network, dit)
    for param, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, grad)
    total = sum(grad.square().sum() for grad in expected)
    torch.testing.assert_close(network.flat_grad.square().sum(), total)
    # Micro-steps add up.
    dit(*make_inputs()).square().mean().backward()
    torch.testing.assert_close(params[0].grad, 2 * expected[0])
    network.zero_grad_flat()
    assert all((param.grad == 0).all() for param in params)


@pytest.mark.parametrize("flat", [True, False])
def test_an_optimizer_step_moves_the_matrices(flat):
    dit = make_dit()
    network = randomize(add_lora(dit, rank=4, unet_lr=0.1, loraplus_ratio=4.0))
    run_backward(network, dit)
    before, out = matrices(network), dit(*make_inputs())
    before = {name: [m.clone() for m in pair] for name, pair in before.items()}
    torch.optim.SGD(network.param_groups(flat=flat)).step()
    for name, adapter in network.modules_by_name.items():
        down, up = before[name]
        torch.testing.assert_close(adapter.down.detach(), down - 0.1 * adapter.down.grad)
        torch.testing.assert_close(adapter.up.detach(), up - 0.4 * adapter.up.grad)
    assert (dit(*make_inputs()) - out).abs().max() > 0


def test_moving_keeps_values_and_views():
    network = make_network(reg_lrs={r"blocks\.0\..*": 0})
    before = {name: [m.clone() for m in pair] for name, pair in matrices(network).items()}
    old = network.flat
    assert network.to("cpu") is network and not is_view(network.flat, old)
    assert_same(matrices(network), before)
    assert all(is_view(param, network.flat) for param in network.parameters())


# Dropouts


def branch(shape=(200, 3, 64), **dropouts):
    """A network and a call that gives down(x) after dropout, and down(x) itself."""
    dit = make_dit()
    network = add_lora(dit, rank=4, alpha=4.0, seed=1, exclude_patterns=[".*attn.*"], **dropouts)
    adapter, layer = network.modules_by_name[LAYER], dit.blocks[0].mlp.layer1
    layer.weight.data.zero_()
    adapter.up.data.copy_(torch.eye(*adapter.up.shape))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.5
    adapter.down.data.abs_()
    return network, lambda: layer(x)[..., :4].detach(), (x @ adapter.down.T).detach()


def is_one_of(ratio, values):
    return all(min(abs(v - value) for value in values) < 1e-4 for v in ratio.unique().tolist())


def test_dropout_zeroes_elements():
    _, call, h = branch(dropout=0.25)
    torch.manual_seed(0)
    ratio = call() / h
    assert is_one_of(ratio, (0, 4 / 3)) and ratio.mean() == pytest.approx(1, abs=0.05)
    # Elements of one sample and component differ, unlike with rank_dropout.
    assert (ratio.amin(1) != ratio.amax(1)).any()


@pytest.mark.parametrize("shape", [(2000, 64), (2000, 3, 64), (2000, 1, 2, 64)])
def test_rank_dropout_has_one_mask_per_sample_and_component(shape):
    _, call, h = branch(shape, rank_dropout=0.25)
    torch.manual_seed(0)
    ratio = (call() / h).reshape(2000, -1, 4)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert is_one_of(ratio, (0, 4 / 3)) and ratio.mean() == pytest.approx(1, abs=0.03)
    kept = (ratio[:, 0] > 0).float()
    assert kept.mean(0).tolist() == pytest.approx([0.75] * 4, abs=0.05)
    # Components are drawn independently of each other.
    assert (kept[:, 0] * kept[:, 1]).mean() == pytest.approx(0.5625, abs=0.05)


def test_module_dropout_leaves_out_whole_calls():
    _, call, h = branch((2, 64), module_dropout=0.25)
    torch.manual_seed(0)
    skipped = 0
    for _ in range(400):
        found = call()
        skipped += (whole := bool((found == 0).all()))
        if not whole:
            torch.testing.assert_close(found, h)
    assert skipped / 400 == pytest.approx(0.25, abs=0.07)


@pytest.mark.parametrize("kind", ["dropout", "rank_dropout", "module_dropout"])
def test_dropouts_act_in_training_only(kind):
    network, call, h = branch(**{kind: 0.9})
    assert network.training
    torch.manual_seed(0)
    assert any(not torch.allclose(call(), h) for _ in range(5))
    network.eval()
    torch.testing.assert_close(call(), h)


# Weight norms


def test_scale_weight_norms_shrinks_large_pairs_only():
    network = make_network(alpha=6.0, reg_dims={".*q_proj": 2})

    def products():
        return {n: (a.up @ a.down * a.scale).detach() for n, a in network.modules_by_name.items()}

    before = products()
    # Between two norms, so that no pair sits on the limit.
    limit = torch.stack([p.norm() for p in before.values()]).sort().values[14:16].mean().item()
    count, mean, largest = network.scale_weight_norms(limit)
    norms = [after.norm().item() for after in products().values()]
    for name, after in products().items():
        factor = min(1.0, limit / before[name].norm().item())
        torch.testing.assert_close(after, before[name] * factor, atol=1e-5, rtol=1e-4)
    assert count == sum(p.norm() > limit for p in before.values()) == 15
    assert mean == pytest.approx(sum(norms) / len(norms), rel=1e-4)
    assert largest == pytest.approx(max(norms), rel=1e-4) == pytest.approx(limit, rel=1e-4)
    assert all(is_view(param, network.flat) for param in network.parameters())


def test_scale_weight_norms_of_a_new_network_changes_nothing():
    network = add_lora(make_dit(), seed=1)
    before = network.flat.clone()
    assert network.scale_weight_norms(1.0) == (0, 0.0, 0.0)
    assert torch.equal(network.flat, before)


# Files


@pytest.mark.parametrize(
    ("dialect", "dtype"),
    [
        *((dialect, None) for dialect in ("kohya", "comfyui", "diffusers")),
        *((dialect, torch.bfloat16) for dialect in ("kohya", "comfyui", "diffusers")),
        # Not diffusers: folding can push numbers of float16 below its normal range.
        *((dialect, torch.float16) for dialect in ("kohya", "comfyui")),
    ],
)
def test_save_and_load_bit_for_bit(tmp_path, dialect, dtype):
    _, adapter, _ = tiny_text()
    # alpha / rank is a power of two, so that folding it is exact.
    options = {"llm_adapter": adapter, "include_patterns": [".*"]}
    network = make_network(**options, alpha=1.0)
    path = tmp_path / "lora.safetensors"
    network.save(path, dialect, dtype, metadata={"ss_steps": "5"})
    fresh = make_network(**options, alpha=1.0)
    randomize(fresh, seed=9)
    assert fresh.load(path) == []
    rounded = dtype or torch.float32
    expected = {n: [m.to(rounded).float() for m in p] for n, p in matrices(network).items()}
    assert_same(matrices(fresh), expected)
    kept = {t.dtype for k, t in load_file(path).items() if not k.endswith(".alpha")}
    assert kept == {rounded}
    assert read_lora(path)[2]["ss_steps"] == "5"


def test_loading_keeps_the_product_when_alpha_differs(tmp_path):
    network, other = make_network(alpha=2.0), make_network(alpha=8.0)
    network.save(tmp_path / "lora.safetensors")
    other.load(tmp_path / "lora.safetensors")
    for name, adapter in network.modules_by_name.items():
        mine = other.modules_by_name[name]
        torch.testing.assert_close(mine.scale * mine.up, adapter.scale * adapter.up)


def test_loading_reports_modules_that_do_not_exist_here(tmp_path):
    network = make_network(include_patterns=["final_layer.linear"])
    network.save(tmp_path / "lora.safetensors")
    smaller = make_network(exclude_patterns=[".*attn.*"], include_patterns=["x_embedder.*"])
    before = smaller.modules_by_name["x_embedder.proj.1"].up.clone()
    ignored = smaller.load(tmp_path / "lora.safetensors")
    assert set(ignored) == network.modules_by_name.keys() - smaller.modules_by_name.keys()
    assert "final_layer.linear" in ignored and len(ignored) == 3 * 8 + 1
    # A module that the file does not have keeps its values.
    assert torch.equal(smaller.modules_by_name["x_embedder.proj.1"].up, before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reg_dims": {"blocks.2.mlp.layer2": 5}}, "--dim_from_weights"),
        ({"exclude_patterns": [".*"], "include_patterns": ["x_emb.*"]}, "none of the 30"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, options, match):
    make_network(**options).save(tmp_path / "lora.safetensors")
    network = make_network()
    before = network.flat.clone()
    with pytest.raises(UserError, match=match):
        network.load(tmp_path / "lora.safetensors")
    assert torch.equal(network.flat, before)


@pytest.mark.parametrize("fold_alpha", [False, True])
def test_modules_from_takes_modules_ranks_and_alphas(tmp_path, fold_alpha):
    path, dit = tmp_path / "lora.safetensors", make_dit()
    options = {"exclude_patterns": [".*mlp.*"], "include_patterns": ["t_embedder.*", "final.*"]}
    network = randomize(
        add_lora(dit, rank=4, alpha=3.0, reg_dims={".*q_proj": 2, "t_emb.*": 7}, **options)
    )
    network.save(path, fold_alpha=fold_alpha)
    expected = dit(*make_inputs())
    network.remove()
    parts = read_lora(path)[0]
    again = add_lora(dit, rank=99, alpha=99.0, modules_from=parts)
    assert again.modules_by_name.keys() == network.modules_by_name.keys()
    for name, adapter in again.modules_by_name.items():
        own = network.modules_by_name[name]
        assert adapter.rank == own.rank
        assert adapter.alpha == (own.rank if fold_alpha else 3.0)
    assert again.load(path) == []
    torch.testing.assert_close(dit(*make_inputs()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dialect", ["kohya", "comfyui", "diffusers"])
def test_numbers_that_are_not_finite_are_never_saved(tmp_path, value, dialect):
    path, network = tmp_path / "lora.safetensors", make_network()
    network.save(path, dialect)
    before = path.read_bytes()
    network.modules_by_name[LAYER].up.data[3, 1] = value
    assert not network.flat.isfinite().all()
    with pytest.raises(UserError, match="not finite"):
        network.save(path, dialect)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_overflow_of_the_saved_dtype_is_not_saved(tmp_path):
    network = make_network()
    network.modules_by_name[LAYER].down.data[0, 0] = 1e6
    assert network.flat.isfinite().all()
    with pytest.raises(UserError, match="not finite"):
        network.save(tmp_path / "lora.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


# Detaching


def test_remove_gives_the_layers_their_forward_back():
    dit = make_dit()
    plain = dit(*make_inputs())
    network = randomize(add_lora(dit, include_patterns=[".*"]))
    assert (dit(*make_inputs()) - plain).abs().max() > 1e-3
    network.remove()
    assert torch.equal(dit(*make_inputs()), plain)
    assert not any("forward" in vars(module) for module in dit.modules())
    assert dit.state_dict().keys() == dit_weights().keys()


def test_removing_a_second_network_leaves_the_first():
    dit = make_dit()
    plain = dit(*make_inputs())
    first = randomize(add_lora(dit))
    expected = dit(*make_inputs())
    second = randomize(add_lora(dit), seed=5)
    assert (dit(*make_inputs()) - expected).abs().max() > 1e-3
    second.remove()
    assert torch.equal(dit(*make_inputs()), expected)
    first.remove()
    assert torch.equal(dit(*make_inputs()), plain)


def test_networks_can_be_removed_in_any_order():
    dit = make_dit()
    plain = dit(*make_inputs())
    first = randomize(add_lora(dit))
    second = randomize(add_lora(dit), seed=5)
    first.remove()
    only_second = dit(*make_inputs())
    second.remove()
    assert torch.equal(dit(*make_inputs()), plain)
    again = randomize(add_lora(dit), seed=5)
    torch.testing.assert_close(dit(*make_inputs()), only_second)
    again.remove()


def test_a_refused_network_leaves_the_model_alone():
    dit = make_dit()
    with pytest.raises(UserError, match="every learning rate is 0"):
        add_lora(dit, unet_lr=0.0)
    assert not any("forward" in vars(module) for module in dit.modules())


def test_loading_ignores_keys_of_no_module_and_reports_them(tmp_path):
    network = randomize(add_lora(make_dit()))
    network.save(tmp_path / "lora.safetensors")
    key = "lora_unet_input_blocks_1_proj.lora_down.weight"
    tensors = load_file(tmp_path / "lora.safetensors") | {key: torch.zeros(4, 4)}
    save_file(tensors, tmp_path / "more.safetensors")
    other = add_lora(make_dit())
    assert other.load(tmp_path / "more.safetensors") == [key]
    assert torch.equal(other.flat, network.flat)


def test_modules_from_leaves_parts_of_models_that_are_not_given(tmp_path):
    """A file with a text encoder trains on without it; a layer that does not fit is refused."""
    parts = make_network().deltas()
    foreign = {"text_encoder.layers.0.mlp.up_proj": next(iter(parts.values()))}
    again = add_lora(make_dit(), modules_from=parts | foreign)
    assert again.modules_by_name.keys() == parts.keys()
    with pytest.raises(UserError, match="does not fit this model"):
        add_lora(make_dit(), modules_from=parts | {"blocks.99.mlp.layer1": parts[LAYER]})
    wrong = {LAYER: parts["blocks.0.self_attn.q_proj"]}
    with pytest.raises(UserError, match="does not fit this model"):
        add_lora(make_dit(), modules_from=wrong)
