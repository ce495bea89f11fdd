"""Twenty steps of training: with short float16 sums the losses follow float32's, bf16's do not."""

import dataclasses

import pytest
import torch

from anima_fast.adapters.lora import add_lora
from anima_fast.bench import curve
from anima_fast.bench.emulated import BF16, FLOAT32, FP16_SHORT
from anima_fast.bench.emulated_block import EmulatedBlock, enter, leave
from anima_fast.bench.interpreter import interpreting
from anima_fast.bench.parity import full_precision
from anima_fast.bench.precision import DitFile, as_patches, random_sample
from anima_fast.demo.tiny_stack import random_weights
from anima_fast.kernels import dispatch
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.fuse import fuse_blocks

STEPS = 20
# Of every loss, as a trainer has one; gradients of float16 need it.
SCALE = 2.0**10
# That of `anima-fast demo`.
DEMO = DitConfig(128, 4, 4, 32, 64, 32, 512)


def trained(loss_of, parameters, lr, steps=STEPS):
    """The losses of these steps, float64."""
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        (SCALE * loss).backward()
        for parameter in parameters:
            parameter.grad /= SCALE
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses).double()


def apart(losses, exact):
    """How far a curve is from float32's."""
    return ((losses - exact) / exact).norm().item()


def test_emulated_curve_of_the_demo():
    """Its DiT with a new LoRA, on two pictures in turn."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in AnimaDiT(DEMO).state_dict().items()}
    model = DitFile(random_weights(shapes, 1))
    head, blocks = model.head(), [model.block(i) for i in range(DEMO.num_blocks)]
    both = random_sample(DEMO, 9)
    samples = [
        dataclasses.replace(
            both,
            **{n: getattr(both, n)[i : i + 1] for n in ("latents", "sigma", "target", "context")},
            zero_rows=both.zero_rows[i : i + 1],
        )
        for i in range(2)
    ]

    def losses(way):
        adapters = [
            {
                name: dataclasses.replace(
                    a, down=a.down.clone().requires_grad_(),
                    up=torch.zeros_like(a.up).requires_grad_(),
                )
                for name, a in model.adapters(i).items()
            }
            for i in range(DEMO.num_blocks)
        ]  # fmt: skip

        def loss_of(step):
            s = samples[step % 2]
            x, given = enter(head, s.latents, s.sigma, s.context, s.zero_rows, way)
            for block, own in zip(blocks, adapters, strict=True):
                x = EmulatedBlock(block, own, way)(x, given)
            velocity = leave(head.final_layer, x, given, way)
            return (velocity - as_patches(s.target)).square().mean()

        factors = [t for own in adapters for a in own.values() for t in (a.down, a.up)]
        return trained(loss_of, factors, 0.002)

    exact, bf16, short = (losses(way) for way in (FLOAT32, BF16, FP16_SHORT))
    # It learns: a curve that stays where it was would say nothing.
    assert exact[-2:].sum() < 0.7 * exact[:2].sum()
    assert apart(short, exact) < apart(bf16, exact) / 4


@pytest.mark.skipif(not interpreting(), reason="a card trains with --mixed_precision fp16")
@pytest.mark.parametrize("steps", [3, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_curve_of_the_fused_block(steps):
    """One fused block, interpreted, towards what a teacher says."""
    inputs = curve._inputs(torch.float32, "cpu")
    latents, sigma, context = (inputs[name][:1] for name in ("latents", "sigma", "context"))
    inputs = {"latents": latents[..., :4, :4], "sigma": sigma, "context": context[:, :3]}
    inputs |= {"zero_keys": 507}
    teacher = curve._dit(torch.float32, "cpu", config=curve.ONE)
    curve._network(teacher, "cpu")
    with torch.no_grad():
        target = teacher(**inputs)

    def losses(dtype, fused):
        dit = curve._dit(dtype, "cpu", "triton" if fused else "torch", curve.ONE)
        network = add_lora(dit, rank=4, alpha=4.0, seed=1)
        if fused:
            fuse_blocks(dit)

        def loss_of(_):
            return (dit(**inputs).float() - target).square().mean()

        mode, kind = ("triton", "short") if fused else ("auto", "auto")
        # Around backward too.
        with dispatch.use(mode), curve._products(kind), full_precision():
            return trained(loss_of, list(network.parameters()), 1e-3, steps)

    exact, bf16 = losses(torch.float32, False), losses(torch.bfloat16, False)
    short = losses(torch.float16, True)
    assert exact[-1] < exact[0]
    assert apart(short, exact) < apart(bf16, exact) / 4
