"""On a card only: real shapes, the fused block beside the eager one, whole steps, no leaks."""

import functools

import pytest
import torch
from test_block import make_network
from tiny_dit import TINY, dit_weights
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from anima_fast.adapters.lora import add_lora
from anima_fast.bench.launches import block_launches
from anima_fast.bench.parity import check_op, floor, full_precision, relative_error
from anima_fast.bench.pretend import Card
from anima_fast.kernels.lora_linear import lora_linear
from anima_fast.kernels.registry import OPS
from anima_fast.memory.offload import SaverSettings, install_block_runner
from anima_fast.models.dit import AnimaDiT, DitConfig, load_dit
from anima_fast.models.fuse import fuse_blocks

pytestmark = pytest.mark.gpu
WIDE = DitConfig(
    model_channels=2048, num_blocks=2, num_heads=16, head_dim=128, context_dim=1024,
    adaln_rank=256, mlp_hidden=8192,
)  # fmt: skip
REAL = [
    pytest.param(op, sizes, id=f"{op.name}-{label}")
    for op in OPS.values()
    for label, sizes in op.real_shapes(1024).items()
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op, sizes", REAL)
def test_parity_at_real_shapes(op, sizes, dtype):
    wrong = [
        f"{c.tensor}: {c.error:.2e} > {c.allowed:.2e} {c.remark}"
        for c in check_op(op, sizes, dtype, device="cuda")
        if not c.passed
    ]
    assert not wrong, "; ".join(wrong)


def wide_dit(dtype, attn_mode):
    torch.manual_seed(0)
    with torch.device("meta"):
        dit = AnimaDiT(WIDE, attn_mode)
    dit = dit.to_empty(device="cuda").to(dtype).requires_grad_(False)
    for parameter in dit.parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data.normal_(std=std).add_(0 if parameter.ndim > 1 else 1)
    return dit


def wide_gradients(dtype, fused, attn_mode="torch", recompute="none"):
    dit = wide_dit(torch.bfloat16, attn_mode).to(dtype)
    network = make_network(dit, rank=32).to("cuda")
    if fused:
        fuse_blocks(dit, recompute)
    generator = torch.Generator("cuda").manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    latents, context, target = draw(2, 16, 64, 64), draw(2, 96, 1024), draw(2, 16, 64, 64)
    sigma = torch.tensor([0.3, 0.8], device="cuda")
    out = dit(
        latents.bfloat16().to(dtype), sigma, context.bfloat16().to(dtype), zero_keys=[416, 10]
    )
    (out.to(torch.promote_types(dtype, torch.float32)) - target).square().mean().backward()
    return network.flat_grad


@pytest.mark.parametrize("attn_mode", ["torch", "triton"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_the_fused_block_at_the_real_width(attn_mode, recompute):
    with full_precision():
        exact = wide_gradients(torch.float32, fused=False)
    eager = relative_error(wide_gradients(torch.bfloat16, fused=False), exact)
    fused = wide_gradients(torch.bfloat16, True, attn_mode, recompute)
    assert relative_error(fused, exact) <= 2 * eager + floor(torch.bfloat16, 1)


@pytest.mark.parametrize("implementation", ["triton", "cublas"])
def test_both_products_of_lora_linear(implementation):
    op = OPS["lora_linear"]
    for sizes in op.real_shapes(1024).values():
        inputs = op.make_inputs(sizes, torch.bfloat16, "cuda")
        exact = {k: v for k, v in inputs.items() if k != "implementation"}
        wide = {k: [t.float() for t in v] if isinstance(v, list) and k != "scales" else v
                for k, v in exact.items()}  # fmt: skip
        wide["x"] = exact["x"].float()
        with full_precision():
            expected = op.reference(**wide)
        found = lora_linear(**exact, implementation=implementation)
        plain = op.reference(**exact)
        assert relative_error(found, expected) <= 2 * relative_error(plain, expected)


def test_peak_memory_of_a_fused_step_is_at_most_six_tenths_of_eager():
    peaks = []
    for fused in (False, True):
        torch.cuda.empty_cache()
        dit = wide_dit(torch.bfloat16, "torch")
        add_lora(dit, rank=32, seed=1).to("cuda")
        if fused:
            fuse_blocks(dit)
        x = torch.randn(1, 16, 128, 128, device="cuda", dtype=torch.bfloat16)
        context = torch.randn(1, 96, 1024, device="cuda", dtype=torch.bfloat16)
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        dit(x, torch.tensor([0.5], device="cuda"), context, zero_keys=416).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - weights)
    assert peaks[1] <= 0.6 * peaks[0], peaks


@pytest.mark.parametrize("policy", ["none", "mlp", "block"])
def test_the_card_takes_what_is_counted_without_one(policy):
    """Launches and memory of one block, by profiler and allocator; libraries may add a little."""
    dit = wide_dit(torch.bfloat16, "torch")
    make_network(dit, rank=32).to("cuda")
    fuse_blocks(dit, policy)
    draw = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    sigma, context = torch.rand(1, device="cuda"), draw(1, 96, 1024)
    shared = dit._shared(sigma, context, 64, 64, 416)
    x = draw(1, 4096, 2048).requires_grad_()
    gradient = draw(1, 4096, 2048)

    def both():
        # What comes in must not be added up here.
        x.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        dit.blocks[0](x, shared).backward(gradient)
        return torch.cuda.max_memory_allocated() - before

    for _ in range(2):
        # Once to warm up: libraries take their workspaces.
        peak = both()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        both()
        torch.cuda.synchronize()
    kernels = sum(e.device_type == DeviceType.CUDA for e in trace.events())
    major, minor = torch.cuda.get_device_capability()
    counted = block_launches(f"own {policy}", card=Card(10 * major + minor))
    assert len(counted.launches) <= kernels <= 1.2 * len(counted.launches)
    # The gradient was there before, where it is counted; the result lives here, and there no more.
    assert peak == pytest.approx(counted.peaks["both"], rel=0.05)


def test_steps_repeat_bit_for_bit():
    """No atomics anywhere: the same step twice gives the same gradients."""
    first = wide_gradients(torch.bfloat16, True, "triton").clone()
    assert torch.equal(first, wide_gradients(torch.bfloat16, True, "triton"))


@pytest.mark.parametrize("attn_mode", ["torch", "triton"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_graphs_repeat_the_plain_launches(attn_mode, recompute):
    """Real CUDA graphs: other images, noise and captions in each step, weights that change."""
    found = []
    for cuda_graphs in (False, True):
        dit = wide_dit(torch.bfloat16, attn_mode)
        network = make_network(dit, rank=32).to("cuda")
        install_block_runner(dit, SaverSettings(recompute, cuda_graphs=cuda_graphs), fused=True)
        grads = []
        for step, rows in enumerate((96, 100, 70, 128)):
            generator = torch.Generator("cuda").manual_seed(step)
            draw = lambda *shape, g=generator: torch.randn(*shape, generator=g, device="cuda")  # noqa: E731
            x, context = draw(2, 16, 64, 64).bfloat16(), draw(2, rows, 1024).bfloat16()
            sigma = torch.tensor([0.3, 0.8], device="cuda")
            dit(x, sigma, context, zero_keys=512 - rows).float().square().mean().backward()
            grads.append(network.flat_grad.clone())
            network.zero_grad_flat()
            with torch.no_grad():
                network.flat.mul_(0.9)
        if cuda_graphs:
            assert dit.graphs.replayed == 3
        found.append(torch.cat(grads))
    assert relative_error(found[1], found[0]) < 0.02


def test_the_tiny_dit_in_every_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        grads = []
        for fused in (False, True):
            dit = load_dit(dit_weights(TINY), dtype=dtype, device="cuda")
            network = make_network(dit).to("cuda")
            if fused:
                fuse_blocks(dit)
            latents = torch.ones(1, 16, 6, 10, device="cuda").cumsum(3) / 10
            context = torch.ones(1, 5, TINY.context_dim, device="cuda")
            sigma = torch.tensor([0.4], device="cuda")
            with full_precision():
                dit(latents, sigma, context, zero_keys=507).float().square().mean().backward()
            grads.append(network.flat_grad)
        assert relative_error(grads[1], grads[0]) < {4: 1e-4, 2: 0.05}[dtype.itemsize]
