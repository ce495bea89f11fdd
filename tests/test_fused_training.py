"""Fused blocks in the trainer: with offloading and block swap, from the options to the file."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from stack import make_world, train_options
from tiny_dit import TINY, dit_weights

from anima_fast.adapters.lora import add_lora
from anima_fast.device import uses_fused_blocks
from anima_fast.errors import UserError
from anima_fast.kernels import dispatch
from anima_fast.memory.offload import SaverSettings, install_block_runner
from anima_fast.models import fuse
from anima_fast.models.attention import attention, check_attn_mode
from anima_fast.models.dit import load_dit
from anima_fast.options.declare import specs
from anima_fast.options.run import TrainOptions
from anima_fast.training.loop import train

CONFIG = dataclasses.replace(TINY, num_blocks=6)
MODES = {
    "plain": {},
    "mlp": {"recompute": "mlp"},
    "block": {"recompute": "block"},
    "two at block": {"recompute": 2},
    "cpu_offload": {"recompute": "block", "offload": "host"},
    "unsloth_offload": {"recompute": "block", "offload": "pinned"},
    "swap_3": {"blocks_to_swap": 3},
    "swap_4_mlp": {"blocks_to_swap": 4, "recompute": "mlp"},
    "swap_3_block": {"blocks_to_swap": 3, "recompute": "block"},
}


def gradients(attn_mode="torch", dropout=None, fused=False, **options):
    """Flat LoRA gradients of two steps under some way to run the blocks."""
    dit = load_dit(dit_weights(CONFIG), dtype=torch.float32, attn_mode=attn_mode)
    network = add_lora(
        dit, rank=4, seed=1, dropout=dropout, rank_dropout=dropout, module_dropout=dropout
    )
    with torch.no_grad():
        network.flat.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    install_block_runner(dit, SaverSettings(**options), fused=fused)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 16, 4, 6, generator=generator)
    context = torch.randn(2, 3, CONFIG.context_dim, generator=generator)
    torch.manual_seed(4)
    for _ in range(2):
        dit(latents, torch.tensor([0.2, 0.9]), context, zero_keys=9).square().mean().backward()
    return network.flat_grad


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_agrees_with_the_eager_path(mode, dropout, monkeypatch):
    eager = gradients(dropout=dropout)
    assert eager.abs().max() > 0
    calls = []
    real = fuse.FusedBlockFunction.apply
    monkeypatch.setattr(
        fuse.FusedBlockFunction, "apply", lambda *args: calls.append(1) or real(*args)
    )
    found = gradients(dropout=dropout, fused=True, **MODES[mode])
    # Swapped blocks run twice, the others once.
    swapped = MODES[mode].get("blocks_to_swap", 0)
    assert len(calls) == 2 * (6 + swapped)
    torch.testing.assert_close(found, eager, atol=1e-6, rtol=1e-3)


def test_swapped_weights_are_not_kept_by_the_fused_block(monkeypatch):
    """Between forward and backward nothing but the blocks' inputs holds on to a swapped block."""
    import gc
    import weakref

    dit = load_dit(dit_weights(CONFIG), dtype=torch.float32)
    add_lora(dit, rank=4, seed=1)
    install_block_runner(dit, SaverSettings(blocks_to_swap=3), fused=True)
    fetched = []
    real = dit.block_runner.swap.fetch

    def fetch(index, *, forward):
        weights = real(index, forward=forward)
        fetched.extend(weakref.ref(w) for n, w in weights.items() if n.endswith("proj.weight"))
        return weights

    monkeypatch.setattr(dit.block_runner.swap, "fetch", fetch)
    out = dit(torch.randn(1, 16, 4, 4), torch.tensor([0.5]), torch.randn(1, 3, CONFIG.context_dim))
    gc.collect()
    assert len(fetched) == 3 * 8 and all(ref() is None for ref in fetched)
    out.sum().backward()
    assert len(fetched) == 2 * 3 * 8


def test_attention_backends_agree_in_the_fused_block(monkeypatch):
    """xformers and flash run under autograd inside the fused block."""
    import math
    import sys
    import types

    def softmax_attention(q, k, v):
        weights = torch.einsum("blhk,bshk->bhls", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhls,bshk->blhk", weights.softmax(-1), v)

    flash = types.SimpleNamespace(flash_attn_func=softmax_attention)
    xformers = types.SimpleNamespace(memory_efficient_attention=softmax_attention)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=xformers))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    eager = gradients()
    for attn_mode in ("triton", "flash", "xformers"):
        for recompute in ("none", "block"):
            found = gradients(attn_mode=attn_mode, fused=True, recompute=recompute)
            torch.testing.assert_close(found, eager, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("zero_keys", [None, 5, [0, 500]])
def test_triton_attention_mode(kernels, zero_keys):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 3, 16, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 4, 3, 16, generator=generator, requires_grad=True) for _ in range(2))
    results = []
    for mode in ("torch", "triton"):
        with dispatch.use(kernels):
            out = attention(q, k, v, zero_keys=zero_keys, mode=mode)
            results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def options(**values):
    return TrainOptions(**{"dataset_config": "d.toml", **values})


def test_recompute_options():
    assert options().recompute is None
    for offload in ("gradient_", "cpu_offload_", "unsloth_offload_"):
        assert options(**{f"{offload}checkpointing": True}).recompute == "block"
    assert options(recompute="block").gradient_checkpointing
    assert options(recompute="7").recompute == "7"
    for bad in ("all", "-1", "1.5"):
        with pytest.raises(UserError, match="use none, mlp, block or a count"):
            options(recompute=bad)
    with pytest.raises(UserError, match="drop one of them"):
        options(recompute="mlp", gradient_checkpointing=True)
    with pytest.raises(UserError, match="exclude each other"):
        options(kernels="triton", compile=True)
    assert {"auto", "triton", "eager"} == set(specs(TrainOptions)["kernels"].choices)


def test_which_kernels_run(monkeypatch):
    card, cpu = torch.device("cuda"), torch.device("cpu")
    assert uses_fused_blocks("auto", card)
    assert not uses_fused_blocks("auto", cpu)
    assert not uses_fused_blocks("eager", card)
    assert not uses_fused_blocks("auto", card, compiled=True)
    monkeypatch.delenv("TRITON_INTERPRET")
    for refused in (
        lambda: uses_fused_blocks("triton", cpu),
        lambda: check_attn_mode("triton", training=True, device=cpu),
    ):
        with pytest.raises(UserError, match="needs a CUDA card"):
            refused()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("recompute, message", [("mlp", "fused block"), ("9", "from 0 to 2")])
def test_a_policy_that_cannot_be_had_is_refused_at_the_start(world, tmp_path, recompute, message):
    with pytest.raises(UserError, match=message):
        train(train_options(world, tmp_path, recompute=recompute))
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_fused_loss_is_the_plain_one():
    from anima_fast.models.flow import FlowSettings, flow_loss, fused_flow_loss, velocity_target

    generator = torch.Generator().manual_seed(0)
    prediction, latents, noise = torch.randn(3, 2, 16, 6, 4, generator=generator)
    masks, sigma = torch.rand(2, 1, 48, 32, generator=generator), torch.tensor([0.1, 0.8])
    for values in (
        {},
        {"loss_type": "huber", "huber_schedule": "exponential"},
        {"weighting_scheme": "cosmap", "masked_loss_normalize": True},
    ):
        settings = FlowSettings(**values)
        found = []
        for fused in (False, True):
            leaf = prediction.clone().requires_grad_()
            args = (latents, noise) if fused else (velocity_target(latents, noise),)
            function = fused_flow_loss if fused else flow_loss
            losses = function(leaf, *args, sigma, settings, masks=masks)
            found.append([losses, *torch.autograd.grad(losses.sum(), leaf)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_flat_adamw_is_adamw():
    """Steps, clipping, rates of groups and the state dict, both ways."""
    from anima_fast.training.optimizers.build import build_optimizer, clip_flat_grad
    from anima_fast.training.optimizers.flat_adamw import FlatAdamW, build_flat_adamw
    from anima_fast.training.state_checks import class_name

    chosen = TrainOptions(optimizer_type="AdamW", optimizer_args=("weight_decay=0.1",))

    def made(network, fused):
        own = build_flat_adamw(chosen, network) if fused else None
        return own or build_optimizer(chosen, network.param_groups)[0]

    results = []
    for order in ("plain", "fused", "plain then fused", "fused then plain"):
        dit = load_dit(dit_weights(TINY), dtype=torch.float32)
        network = add_lora(dit, rank=4, seed=1, loraplus_ratio=4.0)
        generator = torch.Generator().manual_seed(2)
        optimizer = made(network, order.startswith("fused"))
        assert isinstance(optimizer, FlatAdamW) == order.startswith("fused")
        assert class_name(optimizer) == "torch.optim.adamw.AdamW"
        for step in range(6):
            if step == 3 and "then" in order:
                state = optimizer.state_dict()
                optimizer = made(network, order.endswith("fused"))
                optimizer.load_state_dict(state)
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 0.9
            network.flat_grad.normal_(0, 1, generator=generator)
            if isinstance(optimizer, FlatAdamW):
                optimizer.clip_gradients(1.0)
            else:
                clip_flat_grad(network.flat_grad, 1.0)
            optimizer.step()
        results.append(network.flat.clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-7, rtol=1e-5)


def test_a_fused_run_resumes_to_the_same_file(world, tmp_path):
    values = {"kernels": "triton", "optimizer_type": "AdamW", "save_state": True,
              "save_every_n_epochs": 1, "max_train_epochs": 2}  # fmt: skip
    whole = train(train_options(world, tmp_path / "whole", **values))
    states = sorted((tmp_path / "whole").glob("*state*"))
    assert states
    again = train(train_options(world, tmp_path / "again", **values, resume=str(states[0])))
    left, right = load_file(whole.output), load_file(again.output)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_fused_norms_of_the_llm_adapter():
    """As kernels, interpreted: values and the gradients that reach the embedding."""
    from tiny_dit import adapter_weights

    from anima_fast.models.llm_adapter import load_llm_adapter

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (2, 5), generator=generator)
    states = torch.randn(2, 4, 40, generator=generator)
    found = []
    for fused in (False, True):
        adapter = load_llm_adapter(adapter_weights(), dtype=torch.float32).requires_grad_()
        if fused:
            adapter.fuse_norms()
        with dispatch.use("triton" if fused else "auto"):
            out = adapter(ids, torch.ones(2, 5), states, torch.ones(2, 4))
            out.square().mean().backward()
        found.append([out, *(p.grad for p in adapter.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_second_card_becomes_the_current_one(monkeypatch):
    """Triton launches on the current card."""
    from anima_fast.device import choose_device

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="2 cards"):
        choose_device("cuda:2")
