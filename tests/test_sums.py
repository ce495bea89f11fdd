"""Short float16 sums: when they apply, and what stays as it was."""

import numpy as np
import pytest
import torch

from anima_fast.bench.interpreter import half_dot, half_sums, interpreting, start
from anima_fast.kernels import dispatch
from anima_fast.kernels.attention import attention
from anima_fast.kernels.gemm import gemm
from anima_fast.kernels.lora_linear import lora_linear, uses_triton
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
