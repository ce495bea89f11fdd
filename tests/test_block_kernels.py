"""What the fused block asks of kernels beyond the public ops, against what replaces the kernels.

Sums left out, gradients added, GELU inside products, results written into parts of buffers.
"""

import itertools

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from anima_fast.kernels import attention, dispatch
from anima_fast.kernels.attention import attention_backward, attention_forward
from anima_fast.kernels.gate_residual import gate_residual_backward
from anima_fast.kernels.gate_residual_layernorm_modulate import (
    gate_residual_layernorm_modulate_backward,
    gate_residual_layernorm_modulate_forward,
)
from anima_fast.kernels.gelu import gelu_forward
from anima_fast.kernels.gemm import gemm
from anima_fast.kernels.layernorm_modulate import (
    layernorm_modulate_backward,
    layernorm_modulate_forward,
    row_chunks,
)
from anima_fast.kernels.lora_linear import lora_linear_backward, lora_linear_forward, stacked
from anima_fast.kernels.qk_norm_rope import qk_norm_rope_backward
from anima_fast.kernels.rmsnorm import rmsnorm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def both(function, *args, **options):
    """Results of the kernels and of the definitions."""
    for mode in ("triton", "reference"):
        with dispatch.use(mode):
            yield function(*args, **options)


def assert_equal(found, wanted, **tolerance):
    if isinstance(found, (tuple, list)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_equal(a, b, **tolerance)
    elif wanted is None or found is None:
        assert found is wanted
    else:
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, **{"rtol": 1e-5, "atol": 2e-5, **tolerance})


@pytest.fixture
def draw():
    """Random tensors, no two of which have the same strides; NaN lies between their rows."""
    gaps = itertools.count(3)

    def make(*shape, dtype=torch.float32):
        buffer = torch.full((*shape[:-1], shape[-1] + next(gaps)), float("nan"), dtype=dtype)
        buffer[..., : shape[-1]] = torch.randn(shape).to(dtype)
        return buffer.to(DEVICE)[..., : shape[-1]]

    return make


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("sums", [False, True])
def test_layernorm_modulate_backward(draw, residual, sums):
    """The last of the programs has three rows, the others have four."""
    dh, x, scale = draw(2, 67, 40), draw(2, 67, 40), draw(2, 40)
    given = {"residual": draw(2, 67, 40) if residual else None, "needs_modulation": sums}
    found, wanted = both(layernorm_modulate_backward, dh, x, scale, **given)
    assert (found[1] is None) != sums
    assert_equal(found, wanted)


def test_chunks_of_rows():
    """They hold every row once, and never are too few programs where there are rows for more."""
    for length in (1, 3, 4, 5, 255, 1024, 1025, 4096, 9216, 70001):
        chunk, parts = row_chunks(length, True)
        assert (parts - 1) * chunk < length <= parts * chunk
        assert parts <= 256 and (chunk == 4 or parts > 128)
        assert row_chunks(length, False) == (1, length)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seam_backward(draw, sums, dtype):
    dx, dh, x, y = (draw(2, 67, 40) for _ in range(4))
    gate, scale = draw(2, 40), draw(2, 40)
    found, wanted = both(
        gate_residual_layernorm_modulate_backward, dx, dh, x, y if sums else None, gate, scale,
        dtype=dtype,
    )  # fmt: skip
    assert found[1].dtype == dtype
    # dy of one element may round to the other side.
    assert_equal(found, wanted, **({"rtol": 8e-3} if dtype == torch.bfloat16 else {}))


def test_the_seam_norms_what_it_stores(draw):
    """Bit for bit: backward norms the rounded x' again."""
    x, y = (draw(2, 5, 70, dtype=torch.bfloat16) for _ in range(2))
    gate, scale, shift = (draw(2, 70, dtype=torch.bfloat16) for _ in range(3))
    for mode in ("triton", "reference"):
        with dispatch.use(mode):
            stored, h = gate_residual_layernorm_modulate_forward(
                x, y, gate, scale, shift, torch.float32
            )
            again = layernorm_modulate_forward(stored, scale, shift, torch.float32)
        assert stored.dtype == torch.bfloat16 and torch.equal(h, again)


@pytest.mark.skipif(DEVICE == "cuda", reason="launches are replaced")
def test_grids_for_any_number_of_tokens(monkeypatch):
    """A card takes 65535 programs in y and z: tokens are counted in x."""
    grids = []
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda self, grid: lambda *a, **k: grids.append(grid)
    )
    x, vector = torch.zeros(1, 70000, 4), torch.zeros(1, 4)
    with dispatch.use("triton"):
        gate_residual_backward(x, None, vector)
        layernorm_modulate_backward(x, x, vector, needs_modulation=False)
        gate_residual_layernorm_modulate_backward(x, x, x, None, vector, vector)
    assert grids == [(70000, 1)] * 3


def test_gate_residual_backward(draw):
    dout, y, gate = draw(2, 67, 40), draw(2, 67, 40), draw(2, 40)
    for given in (y, None):
        assert_equal(*both(gate_residual_backward, dout, given, gate))


@pytest.mark.parametrize("parts, rope", [(2, True), (1, False), (3, True)])
@pytest.mark.parametrize("sums", [False, True])
def test_qk_norm_rope_backward_in_place(draw, parts, rope, sums):
    """Over its own gradient, the first parts of a packed buffer; the others stay."""
    packed, weights = draw(2, 5, 3, 2, 12), draw(parts, 12)
    cos, sin = (draw(5, 6), draw(5, 6)) if rope else (None, None)
    gradient = draw(2, 5, 3, 2, 12)
    results = []
    for mode in ("triton", "reference"):
        buffer = gradient.clone()
        with dispatch.use(mode):
            out, dweights = qk_norm_rope_backward(
                buffer[:, :, :parts], packed, weights, cos, sin, out=buffer, needs_weights=sums
            )
        assert out is buffer and torch.equal(out[:, :, parts:], gradient[:, :, parts:])
        results.append((out, dweights))
    assert_equal(*results)
    assert (results[0][1] is None) != sums


@pytest.mark.parametrize(
    "length, keys, programs", [(300, 5, 256), (300, 5, 13), (40, 130, 13), (65, 64, 256)]
)
def test_attention_backward_into_packed_gradients(draw, monkeypatch, length, keys, programs):
    """Many queries over few keys are split, into parts of one tile or, among few programs, of more;
    what lies around the three gradients stays as it is."""
    monkeypatch.setattr(attention, "PROGRAMS", programs)
    q, k, v, do = (draw(2, n, 3, 20) for n in (length, keys, keys, length))
    zero = torch.tensor([0, 300], dtype=torch.int32, device=DEVICE)
    results = []
    for mode in ("triton", "reference"):
        dq, dk, dv = (draw(2, n, 2, 3, 20) for n in (length, keys, keys))
        before = [x[:, :, 1].clone() for x in (dq, dk, dv)]
        with dispatch.use(mode):
            out, lse = attention_forward(q, k, v, zero)
            into = tuple(x[:, :, 0] for x in (dq, dk, dv))
            attention_backward(do, q, k, v, out, lse, into=into)
        for x, old in zip((dq, dk, dv), before, strict=True):
            assert torch.equal(x[:, :, 1], old)
        results.append((out, lse, *into))
    assert_equal(*results)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_attention_far_below_zero(draw):
    """Where every logit is -1000, the keys beyond the last one must not count as e^1000."""
    q, k, v, do = (draw(1, n, 2, 16) for n in (5, 3, 3, 5))
    q, k = 16 + q, -16 + k
    results = []
    for mode in ("triton", "reference"):
        with dispatch.use(mode):
            out, lse = attention_forward(q, k, v, None)
            results.append((out, lse, *attention_backward(do, q, k, v, out, lse)))
    assert results[1][1].max() < -900
    # Logits of 1000 in float32 carry four digits behind the point.
    assert_equal(*results, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_backward_multiplies_what_forward_did(draw, x_dtype):
    """The gradient of a 16-bit weight has the rounded x̂ in it."""
    dy, x, weight = draw(70, 40), draw(70, 40, dtype=x_dtype), draw(40, dtype=torch.bfloat16)
    found, wanted = both(rmsnorm_backward, dy, x, weight)
    assert_equal(found, wanted, **({"rtol": 1e-2} if x_dtype == torch.bfloat16 else {}))
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)


# Ranks of three layers; the second has no adapter.
RANKS, WIDTHS, TOKENS, INNER = (4, 0, 7), (24, 17, 40), 70, 33


def layers(draw):
    return {
        "weights": [draw(n, INNER) / 6 for n in WIDTHS],
        "downs": [draw(r, INNER) / 6 for r in RANKS],
        "ups": [draw(n, r) if r else draw(n, 1)[:, :0] for n, r in zip(WIDTHS, RANKS, strict=True)],
        "scales": [0.5, 1.0, 1.5],
        "factors": [draw(TOKENS, 4) > 0, None, 1 + draw(TOKENS, 7).abs()],
    }


@pytest.mark.parametrize("implementation", ["triton", "cublas"])
@pytest.mark.parametrize("dropped", [False, True])
def test_lora_linear_forward(draw, implementation, dropped):
    x, given = draw(TOKENS, INNER), layers(draw)
    if not dropped:
        given["factors"] = None
    with dispatch.use("triton"):
        y, h, act = lora_linear_forward(x, **given, gelu=True, implementation=implementation)
    parts, hidden = [], []
    for i, rank in enumerate(RANKS):
        inner = x @ given["downs"][i].T
        if dropped and rank:
            inner = inner * given["factors"][i]
        hidden.append(inner)
        parts.append(x @ given["weights"][i].T + given["scales"][i] * inner @ given["ups"][i].T)
    wanted = torch.cat(parts, 1)
    assert_equal((y, h), (wanted, torch.cat(hidden, 1)))
    assert_equal(act, torch.nn.functional.gelu(wanted))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("k", [7, 1500, 2049])
def test_product_of_any_strides(draw, turned, k):
    """Rows or columns dense, each of the six matrices its own strides; long sums are split."""
    make = (lambda a, b: draw(b, a).T) if turned else draw
    x, w, h, b, out = make(40, k), make(35, k), make(40, 5), make(35, 5), make(40, 35)
    with dispatch.use("triton"):
        assert_equal(gemm(x, w, scale=0.5, out=out), 0.5 * x @ w.T, atol=2e-4)
        assert_equal(gemm(x, w, adapter=(h, b, 0.5)), x @ w.T + 0.5 * h @ b.T, atol=2e-4)


def test_stacked_matrices_are_a_view_only_in_order():
    buffer = torch.randn(9, 4)
    parts = [buffer[:2], buffer[2:7], buffer[7:]]
    assert stacked(parts).data_ptr() == buffer.data_ptr() and torch.equal(stacked(parts), buffer)
    for other in (parts[::-1], [parts[0], parts[2]], [buffer[:3], buffer[2:5]], [parts[1].clone()]):
        assert torch.equal(stacked(other), torch.cat(other))


def test_gelu_in_a_product_is_of_what_is_stored(draw):
    """Bit for bit: backward takes the slope at the rounded pre-activation."""
    x, w = draw(TOKENS, INNER, dtype=torch.bfloat16), draw(24, INNER, dtype=torch.bfloat16)
    none = torch.empty(0, INNER, dtype=torch.bfloat16), torch.empty(24, 0, dtype=torch.bfloat16)
    down, up = (t.to(DEVICE) for t in none)
    with dispatch.use("triton"):
        y, _, act = lora_linear_forward(
            x, [w], [down], [up], [1.0], gelu=True, implementation="triton"
        )
        assert torch.equal(act, gelu_forward(y))


@pytest.mark.parametrize("implementation", ["triton", "cublas"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("gelu, needs_x", [(False, True), (True, True), (False, False)])
def test_lora_linear_backward(draw, implementation, dropped, gelu, needs_x):
    """Against autograd, x being gelu of a given pre-activation or not."""
    a, given = draw(TOKENS, INNER), layers(draw)
    if not dropped:
        given["factors"] = None
    dy = draw(TOKENS, sum(WIDTHS))
    leaf = a.detach().clone().requires_grad_()
    trained = {
        kind: [t.detach().clone().requires_grad_() for t in given[kind]]
        for kind in ("downs", "ups")
    }
    x = torch.nn.functional.gelu(leaf) if gelu else leaf
    parts, hidden = [], []
    for i, rank in enumerate(RANKS):
        inner = x @ trained["downs"][i].T
        if dropped and rank:
            inner = inner * given["factors"][i]
        hidden.append(inner)
        parts.append(x @ given["weights"][i].T + given["scales"][i] * inner @ trained["ups"][i].T)
    torch.cat(parts, 1).backward(dy)
    with dispatch.use("triton"):
        dx, d_downs, d_ups = lora_linear_backward(
            dy, x.detach(), torch.cat(hidden, 1).detach(), **given,
            gelu_input=a if gelu else None, needs_x=needs_x, dtype=torch.float32,
            implementation=implementation,
        )  # fmt: skip
    assert_equal(dx, leaf.grad if needs_x else None)
    for i, rank in enumerate(RANKS):
        if rank:
            assert_equal(d_downs[i], trained["downs"][i].grad, atol=2e-4)
            assert_equal(d_ups[i], trained["ups"][i].grad, atol=2e-4)


@pytest.mark.parametrize("implementation", ["triton", "cublas"])
def test_sums_of_16_bit_adapters_are_rounded_once(draw, implementation):
    """float32 gradients of bfloat16 products keep what the accumulator holds."""
    x, w = draw(900, 16, dtype=torch.bfloat16), draw(24, 16, dtype=torch.bfloat16)
    a, b = draw(3, 16, dtype=torch.bfloat16), draw(24, 3, dtype=torch.bfloat16)
    dy, h = draw(900, 24, dtype=torch.bfloat16), draw(900, 3, dtype=torch.bfloat16)
    with dispatch.use("triton"):
        _, (da,), (db,) = lora_linear_backward(
            dy, x, h, [w], [a], [b], [0.3], needs_x=False, dtype=torch.float32,
            implementation=implementation,
        )  # fmt: skip
    exact = 0.3 * dy.double().T @ h.double()
    error = (db.double() - exact).norm() / exact.norm()
    # Only the card's cuBLAS has a product with float32 results.
    assert error < (1e-5 if implementation == "triton" or DEVICE == "cuda" else 5e-3)
    g = (0.3 * dy.double() @ b.double()).bfloat16().double()
    exact = g.T @ x.double()
    assert (da.double() - exact).norm() / exact.norm() < 5e-3
