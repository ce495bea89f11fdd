"""Checkpointing, offloading, block swap and compilation give what the plain blocks give."""

import dataclasses

import pytest
import torch
from tiny_dit import TINY, make_dit, make_inputs
from torch import nn

from anima_fast.adapters.lora import add_lora
from anima_fast.errors import UserError
from anima_fast.memory import offload
from anima_fast.memory.offload import SaverSettings, compile_blocks, install_block_runner
from anima_fast.memory.swap import BlockSwap, swapped_indices
from anima_fast.options.run import TrainOptions

CONFIG = dataclasses.replace(TINY, num_blocks=6)
MODES = {
    "checkpointing": {"recompute": "block"},
    "cpu_offload": {"recompute": "block", "offload": "host"},
    "unsloth_offload": {"recompute": "block", "offload": "pinned"},
    "swap_1": {"blocks_to_swap": 1},
    "swap_3": {"blocks_to_swap": 3},
    "swap_4": {"blocks_to_swap": 4},
    "swap_3_checkpointing": {"blocks_to_swap": 3, "recompute": "block"},
}


class Adapter(nn.Module):
    """A LoRA that takes the place of a linear layer's forward, with dropout."""

    def __init__(self, linear, dropout):
        super().__init__()
        generator = torch.Generator().manual_seed(linear.in_features + linear.out_features)
        self.down = nn.Parameter(0.1 * torch.randn(4, linear.in_features, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(linear.out_features, 4, generator=generator))
        self.plain, self.dropout = linear.forward, dropout
        linear.forward = self.forward

    def forward(self, x):
        h = nn.functional.dropout(x @ self.down.T, self.dropout)
        return self.plain(x) + h @ self.up.T


def adapted_dit(dropout=0.0):
    """A DiT with an adapter on every linear layer of its blocks, and the adapters."""
    dit = make_dit(CONFIG)
    linears = [m for m in dit.blocks.modules() if isinstance(m, nn.Linear)]
    return dit, nn.ModuleList(Adapter(linear, dropout) for linear in linears)


def train_step(dit, adapters, *, seed=0):
    """Output, and gradients of the adapters, the latents and the context."""
    latents, sigma, context = make_inputs(CONFIG)
    latents.requires_grad_(), context.requires_grad_()
    adapters.zero_grad()
    torch.manual_seed(seed)
    out = dit(latents, sigma, context, zero_keys=[20, 3])
    out.square().mean().backward()
    return [out.detach(), latents.grad, context.grad, *(p.grad for p in adapters.parameters())]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_every_mode_equals_the_plain_path(mode, dropout):
    expected = train_step(*adapted_dit(dropout))
    assert all(grad.abs().max() > 0 for grad in expected)
    dit, adapters = adapted_dit(dropout)
    install_block_runner(dit, SaverSettings(**MODES[mode]))
    # Twice: the second step starts from what the first one left behind.
    assert_same(train_step(dit, adapters), expected)
    assert_same(train_step(dit, adapters), expected)
    assert all(p.grad is None for p in dit.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_inference_between_steps(mode):
    dit, adapters = adapted_dit()
    expected = train_step(dit, adapters)
    inputs = make_inputs(CONFIG)
    with torch.no_grad():
        plain = dit(*inputs, zero_keys=4)
    install_block_runner(dit, SaverSettings(**MODES[mode]))
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(dit(*inputs, zero_keys=4), plain)
        assert_same(train_step(dit, adapters), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_lora_network_trains_alike(mode):
    """The project's own adapters with every dropout, whose random numbers must be replayed."""
    gradients = []
    for options in ({}, MODES[mode]):
        dit = make_dit(CONFIG)
        network = add_lora(dit, rank=4, dropout=0.3, rank_dropout=0.3, module_dropout=0.3, seed=1)
        with torch.no_grad():
            network.flat.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        network.train()
        install_block_runner(dit, SaverSettings(**options))
        torch.manual_seed(4)
        dit(*make_inputs(CONFIG), zero_keys=9).square().mean().backward()
        gradients.append(network.flat_grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_the_norms_of_magnitudes_are_of_the_weights_on_the_device(kind, monkeypatch):
    """Backward computes them again when a swapped block's parameters are in host memory again.

    Here host and device are one, so weights are doubled on their way between them.
    """

    def copy_doubled(swap, index, weights):
        with torch.no_grad():
            for name, host in swap.parameters[index].items():
                weights[name].copy_(2 * host)

    monkeypatch.setattr(BlockSwap, "_copy", copy_doubled)
    gradients = []
    for swapped in (True, False):
        dit = make_dit(CONFIG)
        network = add_lora(dit, kind=kind, rank=4, dora="outputs", seed=1)
        with torch.no_grad():
            network.flat.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
        if swapped:
            install_block_runner(dit, SaverSettings(blocks_to_swap=3))
        else:
            for index in swapped_indices(CONFIG.num_blocks, 3):
                for parameter in dit.blocks[index].parameters():
                    parameter.data.mul_(2)
        dit(*make_inputs(CONFIG), zero_keys=9).square().mean().backward()
        gradients.append(network.flat_grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_gradients_reach_what_is_shared_by_the_blocks():
    """An adapter on the timestep embedding, as include patterns allow."""
    results = []
    for options in ({}, {"recompute": "block"}, {"blocks_to_swap": 4}):
        dit = make_dit(CONFIG)
        adapter = Adapter(dit.t_embedder[1].linear_2, 0.0)
        install_block_runner(dit, SaverSettings(**options))
        results.append(train_step(dit, adapter))
    assert results[0][-1].abs().max() > 0
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_trained_weights_stay_resident_and_get_gradients():
    """Some weights of swapped blocks are trained: only the frozen ones move."""
    results = []
    for count in (0, 4):
        dit = make_dit(CONFIG)
        trained = [block.self_attn.q_norm.weight.requires_grad_() for block in dit.blocks]
        install_block_runner(dit, SaverSettings(blocks_to_swap=count))
        pointers = [p.data_ptr() for p in trained]
        dit(*make_inputs(CONFIG)).square().mean().backward()
        assert [p.data_ptr() for p in trained] == pointers
        results.append([p.grad for p in trained])
    assert_same(*results)


def test_checkpointing_keeps_only_block_inputs():
    """What autograd saves per block is a small part of what the plain path saves."""

    def saved_bytes(**options):
        dit, _ = adapted_dit()
        install_block_runner(dit, SaverSettings(**options))
        own = {p.untyped_storage().data_ptr() for p in dit.parameters()}
        sizes = {}

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = dit(*make_inputs(CONFIG))
        del out
        return sum(sizes.values())

    assert saved_bytes(recompute="block") < 0.2 * saved_bytes()


@pytest.mark.parametrize("place", ["host", "pinned"])
def test_offloading_moves_one_tensor_per_block(place, monkeypatch):
    name = f"to_{place}"
    packed, unpacked = [], []
    pack, unpack = getattr(offload, name), offload.to_device

    def spy_pack(x):
        packed.append(tuple(x.shape))
        return pack(x)

    def spy_unpack(stored):
        unpacked.append(tuple(stored[1].shape))
        return unpack(stored)

    monkeypatch.setattr(offload, name, spy_pack)
    monkeypatch.setattr(offload, "to_device", spy_unpack)
    dit, adapters = adapted_dit()
    install_block_runner(dit, SaverSettings("block", place))
    train_step(dit, adapters)
    # Checkpointing of PyTorch 2.11 keeps an empty tensor as well.
    packed, unpacked = ([s for s in shapes if 0 not in s] for shapes in (packed, unpacked))
    assert packed == unpacked == [(2, 24, 64)] * CONFIG.num_blocks


def test_host_copies_are_copies():
    x = torch.arange(4.0)
    for pack in (offload.to_host, offload.to_pinned):
        stored = pack(x)
        assert stored[1].data_ptr() != x.data_ptr()
        assert torch.equal(offload.to_device(stored), x)


def test_swapped_blocks_hold_two_blocks_at_most(monkeypatch):
    """And each is fetched once forward and once backward, in that order."""
    most, starts = [], []
    real = BlockSwap._start

    def spy(self, index):
        if index not in self.fetched:
            starts.append(index)
        real(self, index)
        most.append(len(self.fetched))

    monkeypatch.setattr(BlockSwap, "_start", spy)
    dit, adapters = adapted_dit()
    install_block_runner(dit, SaverSettings(blocks_to_swap=3))
    train_step(dit, adapters)
    assert max(most) <= 2
    order = dit.block_runner.swap.order
    assert starts == [*order, *reversed(order)]
    assert not dit.block_runner.swap.fetched


def test_state_dict_survives_the_swap_and_install_undoes_it():
    dit = make_dit(CONFIG)
    expected = {k: v.clone() for k, v in dit.state_dict().items()}
    install_block_runner(dit, SaverSettings(blocks_to_swap=4))
    for count in (4, 2, 0):
        install_block_runner(dit, SaverSettings(blocks_to_swap=count))
        state = dit.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], v) for k, v in expected.items())
    assert dit.block_runner is None


def test_placement_is_even_and_limited():
    assert swapped_indices(28, 0) == swapped_indices(1, 0) == []
    assert swapped_indices(28, 2) == [7, 21]
    assert swapped_indices(28, 14) == list(range(1, 28, 2))
    for count in range(1, 27):
        order = swapped_indices(28, count)
        assert len(set(order)) == count and order == sorted(order)
        assert order[0] >= 0 and order[-1] < 28
    for count in (27, 28, -1):
        with pytest.raises(UserError, match="give 0 to 26"):
            swapped_indices(28, count)
    with pytest.raises(UserError, match="blocks_to_swap 5"):
        install_block_runner(make_dit(CONFIG), SaverSettings(blocks_to_swap=5))


def test_settings_of_a_run():
    def of(**given):
        return SaverSettings.of(TrainOptions(dataset_config="d.toml", **given))

    assert of() == SaverSettings()
    assert of(cpu_offload_checkpointing=True) == SaverSettings("block", "host")
    assert of(unsloth_offload_checkpointing=True) == SaverSettings("block", "pinned")
    swapped = of(gradient_checkpointing=True, blocks_to_swap=2)
    assert swapped == SaverSettings("block", blocks_to_swap=2)
    assert of(recompute="2").policies(4, fused=False) == ["block", "block", "none", "none"]
    for recompute, message in (("mlp", "policy of the fused block"), ("5", "from 0 to 4")):
        with pytest.raises(UserError, match=f"--recompute.*{message}"):
            of(recompute=recompute).policies(4, fused=False)


def test_swapping_needs_frozen_weights():
    dit = make_dit(CONFIG).requires_grad_(True)
    with pytest.raises(UserError, match="frozen"):
        install_block_runner(dit, SaverSettings(blocks_to_swap=1))


@pytest.mark.parametrize("options", [{}, {"recompute": "block"}, {"blocks_to_swap": 2}])
def test_compiled_blocks(options):
    torch._dynamo.reset()
    dit, adapters = adapted_dit()
    expected = train_step(dit, adapters)
    install_block_runner(dit, SaverSettings(**options))
    compile_blocks(dit, backend="aot_eager", dynamic="auto", cache_size_limit=16)
    compiled = [block._compiled_call_impl is not None for block in dit.blocks]
    swapped = swapped_indices(6, options.get("blocks_to_swap", 0))
    assert compiled == [index not in swapped for index in range(6)]
    for a, b in zip(train_step(dit, adapters), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_block_compiles_without_graph_breaks():
    torch._dynamo.reset()
    dit = make_dit(CONFIG)
    inputs = make_inputs(CONFIG)
    expected = dit(*inputs, zero_keys=[7, 2])
    compile_blocks(dit, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(dit(*inputs, zero_keys=[7, 2]), expected)


def test_wrong_compile_options():
    dit = make_dit(CONFIG)
    with pytest.raises(UserError, match="--compile_mode max-autotune needs"):
        compile_blocks(dit, backend="eager", mode="max-autotune")
    with pytest.raises(UserError, match="--compile_backend turbo is unknown"):
        compile_blocks(dit, backend="turbo")
    with pytest.raises(UserError, match="--compile_dynamic maybe"):
        compile_blocks(dit, backend="eager", dynamic="maybe")


def test_swapped_weights_never_visit_the_device(monkeypatch):
    """A DiT that was loaded on the CPU moves to its device without them."""
    left = []
    monkeypatch.setattr(offload, "move_to", lambda dit, device, leave: left.append((device, leave)))
    dit = make_dit(CONFIG)
    install_block_runner(dit, SaverSettings(blocks_to_swap=2), device="cpu")
    ((_, leave),) = left
    swapped = [p for index in (1, 4) for p in dit.blocks[index].parameters()]
    assert {id(p) for p in leave} == {id(p) for p in swapped}


@pytest.mark.gpu
def test_swapped_weights_stay_off_a_card():
    dit = make_dit(CONFIG)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    install_block_runner(dit, SaverSettings(blocks_to_swap=4), device="cuda")
    sizes = [p.numel() * p.element_size() for p in dit.parameters() if p.is_cuda]
    assert all(p.is_cuda for p in dit.blocks[1].parameters()) is False
    assert torch.cuda.max_memory_allocated() - before < 1.2 * sum(sizes) + 2**20
    latents, sigma, context = (x.cuda() for x in make_inputs(CONFIG))
    expected = make_dit(CONFIG).cuda()(latents, sigma, context)
    torch.testing.assert_close(dit(latents, sigma, context), expected)
