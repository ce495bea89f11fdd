"""Ops against the code that they replace, and what the registry's parity tests cannot see."""

import pytest
import torch

from anima_fast.bench.parity import floor, relative_error
from anima_fast.kernels import dispatch
from anima_fast.kernels.adamw import adamw
from anima_fast.kernels.flow_loss import LOSS_TYPES, flow_loss, flow_loss_reference
from anima_fast.kernels.gate_residual import gate_residual_backward
from anima_fast.kernels.gelu import gelu
from anima_fast.kernels.gemm import gemm
from anima_fast.kernels.lora_linear import (
    lora_linear_backward,
    lora_linear_forward,
    lora_linear_reference,
)
from anima_fast.kernels.rmsnorm import rmsnorm, rmsnorm_backward
from anima_fast.models import flow
from anima_fast.models.flow import FlowSettings
from anima_fast.models.llm_adapter import AdapterNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.05}


@pytest.fixture(params=["triton", "reference"], autouse=True)
def mode(request):
    """Each test runs on the kernels and on what replaces them without a card."""
    torch.manual_seed(3)
    with dispatch.use(request.param):
        yield request.param


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


# AdamW


def optimizer_state(count, dtype=torch.float32):
    p = randn(count, dtype=dtype)
    m, v = (torch.zeros(count, device=DEVICE) for _ in range(2))
    return p, m, v


def ranges(ends, rates):
    return {
        "range_ends": torch.tensor(ends, device=DEVICE),
        "lrs": torch.tensor(rates, dtype=torch.float32, device=DEVICE),
    }


def test_adamw_is_torchs_adamw():
    """Five clipped steps, two learning rates, and padding that stays."""
    count, ends, rates, max_norm = 2500, (900, 2301), (1e-2, 3e-3), 5.0
    # With a usual ε nothing would show where it is added.
    options = {**OPTIONS, "eps": 1e-3}
    p, m, v = optimizer_state(count)
    before = [x[ends[1] :].clone() for x in (p, m, v)]
    theirs = [p[: ends[0]].clone(), p[ends[0] : ends[1]].clone()]
    groups = [{"params": [x], "lr": lr} for x, lr in zip(theirs, rates, strict=True)]
    optimizer = torch.optim.AdamW(
        groups, betas=(options["beta1"], options["beta2"]), eps=options["eps"],
        weight_decay=options["weight_decay"],
    )  # fmt: skip
    norms = []
    for step in range(1, 6):
        # A norm of 48 is clipped; after the second step, 0.48 is not.
        g = randn(count) * (1 if step < 3 else 0.01)
        given = g.clone()
        theirs[0].grad, theirs[1].grad = g[: ends[0]].clone(), g[ends[0] : ends[1]].clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step()
        clip = {"norm": norm, "max_norm": max_norm}
        adamw(p, g, m, v, **ranges(ends, rates), **options, **clip, step=step)
        norms.append(norm.item())
        assert torch.equal(g, given)
    assert max(norms) > max_norm > min(norms)
    state = [optimizer.state[x] for x in theirs]
    for ours, wanted in (
        (p, torch.cat(theirs)),
        (m, torch.cat([s["exp_avg"] for s in state])),
        (v, torch.cat([s["exp_avg_sq"] for s in state])),
    ):
        # Elements near zero are differences of large ones: one unit of the largest.
        atol = 1e-7 * wanted.abs().max().item()
        torch.testing.assert_close(ours[: ends[1]], wanted, rtol=1e-6, atol=atol)
    for ours, wanted in zip((p, m, v), before, strict=True):
        assert torch.equal(ours[ends[1] :], wanted)


def test_adamw_ranges():
    """Ranges of one element, an empty one, and a rate of zero."""
    p, m, v = optimizer_state(9)
    before, g = p.clone(), torch.ones(9, device=DEVICE)
    adamw(p, g, m, v, **ranges([1, 4, 4, 7], [0.5, 0.0, 9.0, 0.25]), **OPTIONS, step=1)
    # The first step moves by the rate, against the sign of the gradient, after the decay.
    rate = torch.tensor([0.5, 0, 0, 0, 0.25, 0.25, 0.25, 0, 0], device=DEVICE)
    torch.testing.assert_close(p, before * (1 - rate * OPTIONS["weight_decay"]) - rate)
    assert torch.equal(p[[1, 2, 3, 7, 8]], before[[1, 2, 3, 7, 8]])
    # A rate of zero still averages; padding does not.
    assert (m[:7] > 0).all() and (v[:7] > 0).all() and not m[7:].any() and not v[7:].any()


def test_adamw_end_beyond_the_buffer():
    """What lies behind the buffers is not theirs."""
    whole = [randn(9).abs() for _ in range(3)]
    before = [x.clone() for x in whole]
    p, m, v = (x[:5] for x in whole)
    adamw(p, randn(5), m, v, **ranges([9], [0.1]), **OPTIONS, step=1)
    for x, old in zip(whole, before, strict=True):
        assert (x[:5] != old[:5]).all() and torch.equal(x[5:], old[5:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adamw_rounds_once(dtype):
    """16-bit parameters with a wide gradient are float32 ones, rounded."""
    p, m, v = optimizer_state(300, dtype)
    wide = p.float(), m.clone(), v.clone()
    g = randn(300)
    for x, y, z in ((p, m, v), wide):
        adamw(x, g, y, z, **ranges([300], [0.1]), **OPTIONS, step=1)
    assert torch.equal(p, wide[0].to(dtype))
    assert torch.equal(m, wide[1]) and torch.equal(v, wide[2])


@pytest.mark.parametrize(
    "norm, max_norm, factor",
    [
        (2.0, 1.0, 0.5),
        (0.5, 1.0, 1.0),
        (2.0, 0.0, 1.0),
        (float("nan"), 1.0, float("nan")),
        # torch adds 10⁻⁶ to the norm.
        (2e-6, 1e-6, 1 / 3),
    ],
)
def test_adamw_clips(norm, max_norm, factor):
    p, m, v = optimizer_state(5)
    g = randn(5)
    norm = torch.tensor(norm, device=DEVICE)
    adamw(p, g, m, v, **ranges([5], [0.1]), **OPTIONS, step=1, norm=norm, max_norm=max_norm)
    torch.testing.assert_close(m, 0.1 * factor * g, equal_nan=True)
    assert p.isnan().all() == (factor != factor)


def test_adamw_changes_parameters_in_place():
    """A leaf that requires a gradient, as a view of a buffer, and its version is counted."""
    buffer = randn(8)
    before, p = buffer.clone(), torch.nn.Parameter(buffer)
    m, v = torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    version = p._version
    adamw(p, randn(8), m, v, **ranges([8], [0.1]), **OPTIONS, step=2.0)
    assert p.requires_grad and p._version > version
    assert not (buffer == before).any()


# The flow loss

SIGMA = (0.2, 0.9, 0.5)
FORMS = [
    pytest.param(loss, masked, weighted, id=f"{loss}-mask{masked}-weights{weighted}")
    for loss in LOSS_TYPES
    for masked, weighted in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 1))
]


@pytest.mark.parametrize("loss_type, masked, weighted", FORMS)
def test_flow_loss_is_the_loss_of_training(loss_type, masked, weighted):
    """Values and gradient, with pixel masks (2: normalised) and weights of samples and σ."""
    settings = FlowSettings(
        loss_type=loss_type, huber_schedule="exponential",
        weighting_scheme="cosmap" if weighted else "none", masked_loss_normalize=masked == 2,
    )  # fmt: skip
    sigma = torch.tensor(SIGMA, device=DEVICE)
    latents, noise = randn(3, 16, 6, 10), randn(3, 16, 6, 10)
    prediction = randn(3, 16, 6, 10)
    pixels = torch.rand(3, 1, 48, 80, device=DEVICE) if masked else None
    weights = torch.tensor([1.0, 0.3, 2.0], device=DEVICE) if weighted else None
    upstream = torch.tensor([1.0, 3.0, 0.5], device=DEVICE)

    cells = None
    if masked:
        cells = flow.mask_cells(pixels, (6, 10))
        cells = cells / cells.mean((1, 2, 3), keepdim=True) if masked == 2 else cells
    w = flow.loss_weight(settings.weighting_scheme, sigma)
    values = []
    for own in (True, False):
        x = prediction.clone().requires_grad_()
        if own:
            losses = flow_loss(
                x, latents, noise, w if weights is None else w * weights,
                loss_type=loss_type, c=flow.huber_delta(settings, sigma), cells=cells,
            )  # fmt: skip
        else:
            target = flow.velocity_target(latents, noise)
            losses = flow.flow_loss(x, target, sigma, settings, masks=pixels, loss_weights=weights)
        values.append((losses, *torch.autograd.grad(losses, x, upstream)))
    for ours, theirs in zip(*values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("frames", [False, True])
def test_flow_loss_of_one_frame(frames):
    """[B, C, 1, h, w] is [B, C, h, w], whichever way the mask is written."""
    x = [randn(2, 4, 6, 5) for _ in range(3)]
    cells = torch.rand(2, 1, 6, 5, device=DEVICE)
    wanted = flow_loss(*x, cells=cells)
    got = flow_loss(*(t[:, :, None] for t in x), cells=cells[:, :, None] if frames else cells)
    assert torch.equal(got, wanted)


def test_flow_loss_keeps_small_float16_gradients():
    """1/E is below float16's numbers; the loss scale brings the gradient back."""
    latents, noise = randn(1, 2**14) * 1e-3, randn(1, 2**14) * 1e-3
    x = torch.zeros(1, 2**14, device=DEVICE, dtype=torch.float16, requires_grad=True)
    scale = torch.tensor([2.0**16], device=DEVICE)
    (ours,) = torch.autograd.grad(flow_loss(x, latents, noise), x, scale)
    exact = 2 * (latents - noise) * 2**16 / 2**14
    torch.testing.assert_close(ours.float(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_flow_loss_of_a_perfect_prediction(loss_type):
    """d = 0: no loss and no gradient, and no NaN."""
    latents, noise = randn(2, 7), randn(2, 7)
    x = (noise - latents).requires_grad_()
    c = torch.full((2,), 0.1, device=DEVICE)
    losses = flow_loss(x, latents, noise, loss_type=loss_type, c=c)
    (dx,) = torch.autograd.grad(losses.sum(), x)
    assert not losses.any() and not dx.any()


def test_flow_loss_without_cancellation(mode):
    """Errors far below c: the plain formula has lost three digits."""
    d = randn(1, 999) * 1e-3
    zero, c = torch.zeros_like(d), torch.tensor([1.0], device=DEVICE)
    exact = flow_loss_reference(d.double(), zero, zero, loss_type="huber", c=c.double())
    found = flow_loss(d, zero, zero, loss_type="huber", c=c).double()
    error = ((found - exact) / exact).abs().item()
    assert error < (1e-6 if mode == "triton" else 1e-1)


# Norms, gates, GELU


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rmsnorm_rounds_as_the_adapter(x_dtype, dtype):
    """Bit for bit but for single units in the last place, where 1/√ rounds the other way."""
    norm = AdapterNorm(257).to(DEVICE, dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.5 * randn(257))
    x = randn(3, 5, 257, dtype=x_dtype) * 3
    with torch.no_grad():
        wanted = norm(x)
        found = rmsnorm(x, norm.weight)
    assert found.dtype == wanted.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=2 * eps, atol=0)
    assert dtype == torch.float32 or (found != wanted).sum() <= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_weights_get_the_gradient_of_what_was_multiplied(dtype):
    """dw = dy·n of a single row, n as forward rounds it, but where 1/√ rounds the other way."""
    norm = AdapterNorm(257).to(DEVICE, dtype)
    x, dy = randn(1, 257, dtype=torch.float32), randn(1, 257, dtype=dtype)
    with torch.no_grad():
        norm.weight.fill_(1)
        n = norm(x)
    dw = rmsnorm_backward(dy, x, norm.weight, needs_weight=True)[1]
    assert (dw != dy[0].float() * n[0].float()).sum() <= 5


def test_rmsnorm_of_one_element():
    """The sign of x times the weight."""
    x, weight = randn(7, 1) * 4, torch.full((1,), 3.0, device=DEVICE)
    torch.testing.assert_close(rmsnorm(x, weight), 3 * x.sign(), rtol=1e-4, atol=0)


def test_rmsnorm_backward_without_weight():
    x, dy, weight = randn(90, 100), randn(90, 100), randn(100)
    with_weight, without = (
        rmsnorm_backward(dy, x, weight, needs_weight=needed) for needed in (True, False)
    )
    assert without[1] is None and with_weight[1].shape == (100,)
    torch.testing.assert_close(without[0], with_weight[0])


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_gate_residual_backward_without_y(dtype):
    dout, y, gate = (randn(*s, dtype=torch.bfloat16) for s in ((2, 5, 40), (2, 5, 40), (2, 40)))
    dy, dgate = gate_residual_backward(dout, None, gate, dtype)
    exact = dout.float() * gate.float()[:, None]
    assert dgate is None
    assert torch.equal(dy, exact.to(dtype or torch.bfloat16))
    dy_too, dgate = gate_residual_backward(dout, y, gate, dtype)
    assert torch.equal(dy, dy_too)
    torch.testing.assert_close(dgate, (dout.float() * y.float()).sum(1))


def test_gelu_far_from_zero():
    """The tails: 0 and a, slopes 0 and 1; a scalar and an empty tensor have shapes too."""
    a = torch.tensor([-60.0, -8.0, 0.0, 8.0, 60.0], device=DEVICE, requires_grad=True)
    g = gelu(a)
    (da,) = torch.autograd.grad(g.sum(), a)
    for found, wanted in ((g, [0, 0, 0, 8, 60]), (da, [0, 0, 0.5, 1, 1])):
        wanted = torch.tensor(wanted, device=DEVICE, dtype=torch.float32)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert gelu(a[3]).shape == () and gelu(a[:0]).shape == (0,)


# The adapter around a library's product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["triton", "cublas"])
@pytest.mark.parametrize("adapted, needs_x", [(True, True), (True, False), (False, True)])
def test_gelu_in_the_epilogue(dtype, implementation, adapted, needs_x):
    """up and down of the MLP: gelu after the first adapter, its slope after the second's dx."""
    m, n, k, rank = 70, 75, 37, 5 if adapted else 0
    w, down, up = randn(n, k) / 6, randn(rank, k) / 6, randn(n, rank) / 2
    x, dy, pre = randn(m, k), randn(m, n), randn(m, k)
    layers = ([w], [down], [up], [0.3])

    def both(dtype, **options):
        given = [[t.to(dtype) for t in ts] for ts in layers[:3]]
        y, _, act = lora_linear_forward(x.to(dtype), *given, layers[3], gelu=True, **options)
        # The input of `down` is gelu(pre), which only backward sees.
        kept = pre.to(dtype) if needs_x or adapted else None
        h2 = lora_linear_forward(gelu(pre.to(dtype)), *given, layers[3], **options)[1]
        dx, d_downs, d_ups = lora_linear_backward(
            dy.to(dtype), None, h2, *given, layers[3], gelu_input=kept, needs_x=needs_x, **options
        )
        return [t for t in (y, act, dx, *d_downs, *d_ups) if t is not None]

    with dispatch.use("reference"):
        exact, plain = both(torch.float64), both(dtype)
    for found, eager, true in zip(both(dtype, implementation=implementation), plain, exact,
                                  strict=True):  # fmt: skip
        assert found.dtype == dtype and found.shape == true.shape
        if true.numel():
            allowed = 2 * relative_error(eager, true) + floor(dtype, 1)
            assert relative_error(found, true) <= allowed


@pytest.mark.parametrize("rank, sloped", [(3, True), (1100, False)])
def test_what_the_epilogue_adds_to_stays_in_its_margins(rank, sloped):
    """Tiles that hang over the edges read and write nothing beyond them; no sum is split."""
    m, n = 67, 33
    big = randn(m + 2, n + 2)
    before, inner = big.clone(), big[1:-1, 1:-1]
    h, up, pre = randn(m, rank), randn(n, rank), randn(m, n)
    with dispatch.use("triton"):
        gemm(h, up, scale=0.5, out=inner, add=True, gelu_grad=pre if sloped else None)
    expected = before[1:-1, 1:-1] + 0.5 * h @ up.T
    if sloped:
        expected *= torch.func.vmap(torch.func.vmap(torch.func.grad(torch.nn.functional.gelu)))(pre)
    torch.testing.assert_close(inner, expected, rtol=1e-4, atol=1e-4)
    inner.copy_(before[1:-1, 1:-1])
    assert torch.equal(big, before)


@pytest.mark.parametrize("scales", [(0.3, 0.3), (0.3, 0.7)])
def test_layers_of_one_rank_and_any_strengths(scales):
    """As one batched product where strengths agree, else one after another."""
    m, n, k, rank = 19, 12, 15, 4
    x, dy = randn(m, k), randn(m, 2 * n)
    weights, downs, ups = ([randn(*s) for _ in scales] for s in ((n, k), (rank, k), (n, rank)))
    leaves = [x, *downs, *ups]
    for leaf in leaves:
        leaf.requires_grad_()
    expected = lora_linear_reference(x, weights, downs, ups, scales)
    grads = torch.autograd.grad(expected, leaves, dy)
    with torch.no_grad():
        layers = (weights, downs, ups, scales)
        y, h, _ = lora_linear_forward(x, *layers, implementation="cublas")
        dx, d_downs, d_ups = lora_linear_backward(dy, x, h, *layers, implementation="cublas")
    torch.testing.assert_close([y, dx, *d_downs, *d_ups], [expected.detach(), *grads])
