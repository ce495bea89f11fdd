"""T-LoRA's rank masks, and adapters on a range of blocks."""

import pytest
import torch
from tiny_dit import make_dit, make_inputs, relative_error

from anima_fast.adapters.lora import add_lora
from anima_fast.adapters.network import rank_mask
from anima_fast.memory.offload import install_block_runner


@pytest.mark.parametrize(
    ("sigma", "rank", "least", "alpha", "expected"),
    [
        (0.0, 16, 4, 1.0, 16),
        (1.0, 16, 4, 1.0, 4),
        (0.5, 16, 4, 1.0, 10),
        (0.5, 16, 4, 2.0, 7),
        (0.999, 8, 1, 1.0, 1),
        (0.5, 4, 8, 1.0, 4),
        (0.3, 16, 0, 0.0, 16),
    ],
)
def test_how_many_ranks_a_noise_level_leaves(sigma, rank, least, alpha, expected):
    mask = rank_mask(torch.tensor([sigma]), rank, least, alpha)
    assert mask.shape == (1, rank)
    assert mask[0].tolist() == [1.0] * expected + [0.0] * (rank - expected)


def filled(dit, **options):
    network = add_lora(dit, rank=4, alpha=4.0, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    network.flat.copy_(0.2 * torch.randn(network.flat.shape, generator=generator))
    return network


def gradients(network, dit, inputs, target):
    network.zero_grad_flat()
    loss = (dit(*inputs).float() - target).square().mean()
    loss.backward()
    return loss.detach(), network.flat_grad.clone()


@pytest.mark.parametrize("fused", [False, True])
def test_masked_ranks_neither_act_nor_learn(fused):
    """The masked network is the one whose matrices are cut, sample by sample, fused or not."""
    dit, inputs = make_dit(), make_inputs()
    network = filled(dit)
    network.tlora = (1, 1.0)
    sigma = inputs[1]
    network.at_noise(sigma)
    kept = rank_mask(sigma, 4, 1).sum(dim=1).int().tolist()
    assert len(set(kept)) > 1
    if fused:
        install_block_runner(dit, fused=True)
    target = torch.zeros_like(dit(*inputs))
    y = dit(*inputs)
    _, masked_grad = gradients(network, dit, inputs, target)
    install_block_runner(dit)
    full = {name: (a.down.clone(), a.up.clone()) for name, a in network.modules_by_name.items()}
    network.eval()
    for i, ranks in enumerate(kept):
        with torch.no_grad():
            for name, adapter in network.modules_by_name.items():
                adapter.up.copy_(full[name][1])
                adapter.up[:, ranks:] = 0
        one = [value[i : i + 1] for value in inputs]
        assert relative_error(y[i : i + 1], dit(*one)) < 1e-5
    # Ranks that no sample of the batch may use get no gradient at all.
    most = max(kept)
    assert masked_grad.abs().sum() > 0
    for adapter in network.adapters:
        assert adapter.down.grad[most:].abs().sum() == 0
        assert adapter.up.grad[:, most:].abs().sum() == 0


def test_masks_act_in_training_only():
    dit, inputs = make_dit(), make_inputs()
    network = filled(dit)
    plain = dit(*inputs)
    network.tlora = (1, 1.0)
    network.at_noise(torch.ones(len(inputs[0])))
    assert relative_error(dit(*inputs), plain) > 1e-4
    network.eval()
    assert torch.equal(dit(*inputs), plain)


def test_blocks_below_the_first_adapted_one_are_not_differentiated():
    dit, inputs = make_dit(), make_inputs()
    last = len(dit.blocks) - 1
    network = filled(dit, blocks=[last])
    assert {name.split(".")[1] for name in network.modules_by_name} == {str(last)}
    needed = []
    for block in dit.blocks:
        block.register_forward_hook(lambda *call: needed.append(call[2].requires_grad))
    dit(*inputs)
    assert needed == [False] * last + [True]
