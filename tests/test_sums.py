"""Short float16 sums: when they apply, and what stays as it was."""

import numpy as np
import pytest
import torch

from anima_fast.bench import curve
from anima_fast.bench.interpreter import half_dot, half_sums, interpreting, start
from anima_fast.kernels import dispatch
from anima_fast.kernels.attention import attention, attention_reference
from anima_fast.kernels.gemm import gemm
from anima_fast.kernels.lora_linear import lora_linear, lora_linear_reference, uses_triton
from anima_fast.kernels.sums import CHAINS, chain_of, use_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if interpreting():
    start()


@pytest.fixture(autouse=True)
def kernels():
    """Every test runs on the kernels, with the same numbers."""
    torch.manual_seed(5)
    with dispatch.use("triton"):
        yield


def randn(*shape, dtype=torch.float16):
    return torch.randn(shape).to(DEVICE, dtype)


def attend(dtype, chain=None):
    """Attention's inputs and its result."""
    leaves = [randn(1, n, 1, 72, dtype=dtype).requires_grad_() for n in (70, 40, 40)]
    return leaves, attention(*leaves, chain=chain)


def project(dtype, chain=None):
    """The inputs and the result of a layer with an adapter."""
    x, w, a, b = (randn(*s, dtype=dtype) for s in ((37, 90), (65, 90), (5, 90), (65, 5)))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    return leaves, lora_linear(x, [w], [a], [b], [0.5], chain=chain)


def values(made):
    """A result and all gradients."""
    leaves, out = made
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


def equal(some, others):
    return [torch.equal(a, b) for a, b in zip(some, others, strict=True)]


@pytest.mark.parametrize("op", [attend, project])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types_keep_float32_sums(op, dtype):
    torch.manual_seed(6)
    before = values(op(dtype))
    torch.manual_seed(6)
    with use_sums(64):
        assert all(equal(before, values(op(dtype))))
    x = randn(3, dtype=dtype)
    assert chain_of(x, 64) == 0


@pytest.mark.parametrize("op", [attend, project])
def test_backward_sums_as_forward_did(op):
    """It runs in another thread and maybe outside of the block that chose."""
    found = {}
    for name, chain in (("short", 64), ("full", 0)):
        torch.manual_seed(6)
        found[name] = values(op(torch.float16, chain))
    torch.manual_seed(6)
    with use_sums(64):
        made = op(torch.float16)
    assert all(equal(found["short"], values(made)))
    torch.manual_seed(6)
    made = op(torch.float16)
    with use_sums(64):
        assert all(equal(found["full"], values(made)))
    assert not all(equal(found["short"], found["full"]))


def test_the_setting_is_left_as_it_was():
    x = randn(2)
    with pytest.raises(KeyError), use_sums(64):
        with use_sums(32):
            assert chain_of(x) == 32 and chain_of(x, 0) == 0
        assert chain_of(x) == 64
        raise KeyError
    assert chain_of(x) == 0
    with pytest.raises(ValueError, match="chain is 128, expected one of 0, 64, 32 terms"):
        use_sums(128).__enter__()
    with pytest.raises(ValueError, match="chain is 16"):
        chain_of(x, 16)


def test_a_step_along_k_is_one_chain(monkeypatch):
    from anima_fast.kernels import attention as module
    from anima_fast.kernels import gemm as products

    for chain in filter(None, CHAINS):
        for m in (1, 64, 65, 4096):
            assert products.tile_for(m, 2048, torch.float16, chain=chain).k == chain
        for kernel, summed in (("fwd", "keys"), ("dkdv", "queries"), ("dq", "keys")):
            assert getattr(module.tiles(kernel, torch.float16, chain), summed) <= chain
    # A kernel refuses a longer one.
    tile = products.tile_for(128, 128, torch.float16)
    monkeypatch.setattr(products, "tile_for", lambda *_: products.Tile(32, 32, 128, 4, 1))
    with pytest.raises(Exception, match="one chain"):
        gemm(randn(32, 128), randn(32, 128), chain=64)
    assert tile.k <= 64


def test_auto_takes_the_kernels_that_can(monkeypatch):
    """On a card no product is Triton's yet, but no library has short sums."""
    monkeypatch.setattr(dispatch, "runs_triton", lambda x: True)
    monkeypatch.setattr(dispatch, "forced", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))

    class OnCard:
        is_cuda, device = True, "cuda"

        def __len__(self):
            return 4096

    x = OnCard()
    assert [uses_triton(x, name) for name in ("auto", "triton", "cublas")] == [False, True, False]
    assert [uses_triton(x, name, 64) for name in ("auto", "cublas")] == [True, False]


# Large activations and small gradients


def layer_step(activation, gradient, dtype):
    """A layer on activations of this size: its result and gradients, of those of this size."""
    torch.manual_seed(6)
    x, w, a, b = (
        torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5
        for shape in ((40, 300), (70, 300), (5, 300), (70, 5))
    )
    w, dy = w.bfloat16().to(dtype), torch.randn(40, 70, device=DEVICE) * gradient
    leaves = [t.to(dtype).requires_grad_() for t in (x * 300**0.5 * activation, a, b)]
    call = lora_linear if dtype == torch.float16 else lora_linear_reference
    out = call(leaves[0], [w], [leaves[1]], [leaves[2]], [0.5], chain=64)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(dtype))]


def attention_step(activation, gradient, dtype):
    """The same of attention, whose queries and keys are normed before and values are not."""
    torch.manual_seed(6)
    q, k, v, do = (torch.randn(1, n, 1, 72, device=DEVICE) for n in (70, 90, 90, 70))
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v * activation)]
    call = attention if dtype == torch.float16 else attention_reference
    out = call(*leaves, chain=64)
    return [out.detach(), *torch.autograd.grad(out, leaves, (do * gradient).to(dtype))]


def error(found, exact, where):
    return (found.double() - exact)[where].norm() / exact[where].norm()


STEPS = pytest.mark.parametrize("step", [layer_step, attention_step])


@STEPS
@pytest.mark.parametrize(
    ("activation", "gradient"),
    # Thousands; gradients of 10⁻⁹ that a loss scale has brought to 16, and to 10⁻³.
    [(3000, 2.0**-7), (1, 1e-9 * 2**34), (1, 1e-9 * 2**20)],
)
def test_what_float16_holds_has_half_of_the_error_of_bfloat16(step, activation, gradient):
    exact, bf16, own = (
        step(activation, gradient, dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    )
    for found, plain, value in zip(own, bf16, exact, strict=True):
        assert error(found, value, ...) < error(plain, value, ...) / 2


@STEPS
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("activation", "gradient"), [(3000, 16), (30000, 1)])
def test_what_float16_does_not_hold_is_seen(step, activation, gradient):
    """Numbers are right or not finite, or the largest there is; some are not here."""
    exact, bf16, own = (
        step(activation, gradient, dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    )
    seen = False
    for found, plain, value in zip(own, bf16, exact, strict=True):
        right = found.isfinite() & (found.abs() < 65504)
        seen |= not right.all()
        assert not right[value.abs() > 65600].any()
        if right.any():
            assert error(found, value, right) < error(plain, value, right) / 2
    assert seen


@pytest.mark.parametrize("chain", [64, 32])
def test_equal_values_of_thousands_add_up(chain):
    """What every key says is in range, though 32 of it are not."""
    torch.manual_seed(7)
    q, k = (torch.randn(1, n, 1, 72, device=DEVICE) * 0.1 for n in (40, 200))
    v = 30000 + 100 * torch.randn(1, 200, 1, 72, device=DEVICE)
    exact = attention_reference(*(t.double() for t in (q, k, v)))
    found = attention(*(t.half() for t in (q, k, v)), chain=chain)
    plain = attention_reference(*(t.bfloat16() for t in (q, k, v)))
    assert error(found, exact, ...) < error(plain, exact, ...) / 2


@STEPS
def test_gradients_below_float16_vanish_without_a_loss_scale(step):
    """As in any product of float16: nothing is there, and nothing else in its place."""
    _, *exact = step(1, 1e-9, torch.float64)
    out, *own = step(1, 1e-9, torch.float16)
    assert out.any() and all(value.any() for value in exact)
    assert not any(found.any() for found in own)


@pytest.mark.skipif(not interpreting(), reason="the whole table runs on a card")
def test_the_fused_block_has_half_of_the_error_of_bfloat16(monkeypatch):
    """Two blocks with adapters everywhere on six tokens: the output and every gradient."""
    inputs = curve._inputs

    def few(dtype, device):
        found = inputs(dtype, device)
        latents, sigma, context = (found[name][:1] for name in ("latents", "sigma", "context"))
        latents = latents[:, :, :4, :6]
        return {"latents": latents, "sigma": sigma, "context": context, "zero_keys": [507]}

    monkeypatch.setattr(curve, "_inputs", few)
    found = list(curve.block_checks(DEVICE, [curve.SHORT]))
    assert len(found) == 1 + 2 * (2 * 16 + 2)
    for one in found:
        assert one.error <= min(one.allowed, one.reference_error / 2), one


# What the interpreter does in place of a card


def rounded(x, to_zero):
    """float16 of one number, by looking at its two neighbours."""
    near = np.float16(x)
    if to_zero and abs(float(near)) > abs(x):
        return np.nextafter(near, np.float16(0))
    return near


@pytest.mark.parametrize("to_zero", [False, True])
@pytest.mark.parametrize("terms", [16, 8])
def test_the_emulated_instruction_is_a_loop(terms, to_zero):
    """Number by number in float64, rounded after so many terms."""
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(s).astype(np.float16) for s in ((3, 40), (40, 4)))
    start_at = random.standard_normal((3, 4)).astype(np.float16)
    with half_sums(terms, to_zero=to_zero):
        found = half_dot(a, b, start_at)
    assert found.dtype == np.float16
    for m in range(3):
        for n in range(4):
            acc = start_at[m, n]
            for first in range(0, 40, terms):
                products = a[m, first : first + terms].astype(float) * b[first : first + terms, n]
                acc = rounded(float(acc) + products.sum(), to_zero)
            assert found[m, n] == acc


@pytest.mark.parametrize(("to_zero", "expected"), [(False, np.inf), (True, 65504.0)])
def test_the_emulated_instruction_overflows(to_zero, expected):
    a = np.full((1, 16), 100, np.float16)
    with half_sums(16, to_zero=to_zero):
        found = half_dot(a, a.T, np.zeros((1, 1), np.float16))
    assert found[0, 0] == expected


@pytest.mark.skipif(not interpreting(), reason="a card rounds as it does")
@pytest.mark.parametrize(
    ("terms", "to_zero", "chain", "error", "gain"),
    [
        (16, False, 64, 3.3e-4, 0),
        (16, False, 32, 2.5e-4, 0),
        (8, False, 64, 4.4e-4, 0),
        (8, False, 32, 3.3e-4, 0),
        (16, True, 64, 1.0e-3, -9e-4),
        (16, True, 32, 6.1e-4, -5e-4),
        (8, True, 64, 1.9e-3, -1.6e-3),
        (8, True, 32, 1.0e-3, -9e-4),
    ],
)
def test_a_product_on_every_card_there_may_be(terms, to_zero, chain, error, gain):
    """Error and common gain of normal numbers, for each way to round that a card may have."""
    x, w = randn(64, 2048), randn(64, 2048)
    exact = x.double() @ w.double().T
    with half_sums(terms, to_zero=to_zero):
        y = gemm(x, w, dtype=torch.float32, chain=chain).double()
    assert (y - exact).norm() / exact.norm() == pytest.approx(error, rel=0.07)
    assert (y * exact).sum() / exact.square().sum() - 1 == pytest.approx(gain, rel=0.1, abs=2e-5)
