"""Emulated float16 products against a plain loop, and the probe that chooses the sums."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from profile_dit import MEAN, Channels

from anima_fast.bench import emulated
from anima_fast.bench.emulated import BF16, FP16_FULL, FP16_SHORT, FULL, SHORT, WHOLE, Sums, product
from anima_fast.bench.emulated_block import _Attention, _Linear, _Residual
from anima_fast.bench.parity import relative_error
from anima_fast.measure.probe import Probe, choose_chain, probe


def loop(a, b, sums):
    """One product in numpy, element by element."""
    out = np.zeros((len(a), b.shape[1]))
    for i, j in np.ndindex(out.shape):
        long = np.float32(0)
        for start in range(0, a.shape[1], sums.chain):
            chain = np.float16(0)
            stop = min(start + sums.chain, a.shape[1])
            for k in range(start, stop, sums.every):
                end = min(k + sums.every, stop)
                terms = a[i, k:end].astype(np.float64) @ b[k:end, j].astype(np.float64)
                exact = np.float64(chain) + terms
                chain = np.float16(exact)
                if sums.to_zero and abs(np.float64(chain)) > abs(exact):
                    chain = np.nextafter(chain, np.float16(0))
            long = np.float32(long + np.float32(chain))
        out[i, j] = long
    return out


@pytest.mark.parametrize("chain", [64, 32, WHOLE])
@pytest.mark.parametrize("every, to_zero", [(16, False), (8, False), (16, True), (8, True)])
@pytest.mark.parametrize("terms", [1, 40, 200])
def test_a_product_is_that_of_a_plain_loop(chain, every, to_zero, terms, monkeypatch):
    monkeypatch.setattr(emulated, "TILE_ROWS", 3)
    monkeypatch.setattr(emulated, "TILE", 6)
    rng = np.random.default_rng(terms)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((5, terms), (terms, 7)))
    sums = Sums(chain, every, to_zero)
    found = product(torch.from_numpy(a).float(), torch.from_numpy(b).float(), sums).numpy()
    expected = loop(a, b, sums)
    # Terms are summed in float32 here and exactly there: a tie may fall to the other side.
    assert np.mean(found != expected) < 0.03
    assert np.abs(found - expected).max() <= 2**-10 * np.abs(expected).max()


def test_heads_are_products_of_their_own():
    a, b = torch.randn(2, 3, 5, 80).half().float(), torch.randn(2, 3, 80, 4).half().float()
    found = product(a, b, SHORT)
    assert torch.equal(found[1, 2], product(a[1, 2], b[1, 2], SHORT))
    assert found.shape == (2, 3, 5, 4)


def test_towards_zero_of_both_signs_and_too_large():
    x = torch.tensor([1 + 2**-11, -1 - 2**-11, 0.0, 1e-9, -1e-9, 1e6, -1e6, 3.0])
    expected = [1, -1, 0, 0, 0, 65504, -65504, 3]
    assert emulated.toward_zero(x).tolist() == expected


def inputs(name, rows=24, columns=48):
    """Activations with a published profile in float32, and a weight that bf16 holds."""
    draw = Channels(3)
    terms = 8192 if name == "mlp.layer2" else 2048
    profile = draw.profile(1, name, terms) / MEAN
    x = torch.randn(rows, terms, generator=draw.generator) * profile
    return x, draw.weight(columns, terms).bfloat16().float()


def errors(name, *ways):
    x, w = inputs(name)
    exact = x.double() @ w.double().T
    found = []
    for way in ways:
        rounded, factor = way.weight(w)
        found.append(relative_error(way.product(way.stored(x), rounded.T) * factor, exact))
    return found


@pytest.mark.parametrize("name", ["self_attn.qkv", "cross_attn.q_proj", "mlp.layer1", "mlp.layer2"])
def test_one_product_of_the_model(name):
    longer, whole = (dataclasses.replace(FP16_SHORT, sums=Sums(n)) for n in (128, WHOLE))
    bf16, full, short, double, long = errors(name, BF16, FP16_FULL, FP16_SHORT, longer, whole)
    assert 1.2e-3 < bf16 < 2.2e-3 and 1.5e-4 < full < 2.8e-4
    # Half of bf16's error is allowed; sums of twice the length are seen all the same.
    assert 3e-4 < short < 4.4e-4 < double < 0.5 * bf16
    assert long > (1.2 * bf16 if name == "mlp.layer2" else 2.5 * short)


def test_a_weight_becomes_float16_without_loss():
    _, w = inputs("mlp.layer1", columns=512)
    for size in (2.0**-20, 1.0, 2.0**20):
        rounded, factor = FP16_SHORT.weight(w * size)
        assert 2**-6 <= rounded.abs().max() <= 1
        assert relative_error(rounded * factor, (w * size).double()) < 1e-6


def test_rows_have_a_power_of_two_of_their_own():
    x = torch.randn(6, 100) * torch.tensor([[1e-9], [1e-3], [1.0], [1e5], [1e9], [0.0]])
    found = FP16_SHORT.stored_rows(x)
    for row, exact in zip(found[:5], x[:5], strict=True):
        assert relative_error(row, exact.double()) < 3e-4
    assert torch.equal(found[5], x[5])
    plain = FP16_SHORT.stored(x)
    assert plain.abs().max() == emulated.HALF_MAX and not plain[0].any()


def test_both_products_of_a_layer_are_emulated():
    x, w = inputs("mlp.layer1", rows=8)
    x = FP16_SHORT.stored(x).requires_grad_()
    down, up = (torch.randn(4, 2048) / 64).requires_grad_(), torch.randn(48, 4, requires_grad=True)
    dy = FP16_SHORT.stored(torch.randn(8, 48))
    rounded, factor = FP16_SHORT.weight(w)
    half_down, half_up = FP16_SHORT.stored(down), FP16_SHORT.stored(up)
    y = _Linear.apply(x, w, down, up, 0.5, FP16_SHORT)
    dx, d_down, d_up = torch.autograd.grad(y, (x, down, up), dy)
    h, g = FP16_SHORT.stored(x @ half_down.T), FP16_SHORT.stored(0.5 * (dy @ half_up))
    assert torch.equal(y, product(x, rounded.T, SHORT) * factor + 0.5 * (h @ half_up.T))
    assert torch.equal(dx, product(dy, rounded, SHORT) * factor + g @ half_down)
    assert torch.equal(d_down, g.T @ x) and torch.equal(d_up, 0.5 * (dy.T @ h))


def test_the_residual_stream_and_its_gradient_are_stored_alike():
    x = (torch.randn(3, 50) * torch.tensor([[1e-6], [1.0], [1e6]])).requires_grad_()
    dx = torch.randn(3, 50) * torch.tensor([[1e6], [1.0], [1e-8]])
    for way in (BF16, FP16_SHORT):
        out = _Residual.apply(x, way)
        (found,) = torch.autograd.grad(out, x, dx)
        assert torch.equal(out, way.stored_rows(x)) and torch.equal(found, way.stored_rows(dx))
        assert not torch.equal(found, dx)


def attention_errors(way, scale):
    """Of out, dq, dk, dv at tokens in clusters, whose logits reach some 10 · scale²."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(8, 128, generator=generator).repeat_interleave(32, 0)

    def heads(spread):
        x = centre + spread * torch.randn(256, 128, generator=generator)
        return x / x.square().mean(-1, keepdim=True).sqrt()

    q, k, v, dout = heads(0.5) * scale, heads(0.5) * scale, heads(1), heads(1)
    values = [x.to(torch.float64)[None, None].requires_grad_() for x in (q, k, v)]
    s = values[0] @ values[1].transpose(-1, -2) / 128**0.5
    out = s.softmax(-1) @ values[2]
    exact = (out, *torch.autograd.grad(out, values, dout.double()[None, None]))
    own = [way.stored(x)[None, None].requires_grad_() for x in (q, k, v)]
    out = _Attention.apply(*own, torch.zeros(1, 256), torch.zeros(1), way)
    found = (out, *torch.autograd.grad(out, own, dout[None, None]))
    return [relative_error(a, b) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_short_sums_in_attention_keep_the_yardstick(scale):
    bf16, short = attention_errors(BF16, scale), attention_errors(FP16_SHORT, scale)
    assert all(own < 0.5 * other for own, other in zip(short, bf16, strict=True))


@pytest.mark.parametrize("chain", [64, WHOLE])
def test_float16_sums_of_logits_break_the_yardstick(chain):
    everywhere = dataclasses.replace(FP16_SHORT, logits=Sums(chain))
    inexact, bf16 = attention_errors(everywhere, 3.0), attention_errors(BF16, 3.0)
    assert inexact[0] > 0.5 * bf16[0]


def test_all_products_of_attention_but_the_logits_follow_the_sums():
    full, short, whole = (
        attention_errors(dataclasses.replace(FP16_FULL, sums=sums), 1.0)
        for sums in (FULL, SHORT, Sums(WHOLE))
    )
    assert all(a < b < c for a, b, c in zip(full, short, whole, strict=True))


ROUNDINGS = [
    # every, to zero, chain that is chosen, error and gain of the first probe
    (16, False, 64, 3.9e-4, 0),
    (8, False, 64, 4.9e-4, 0),
    (16, True, 32, 1.05e-3, -8.8e-4),
    (8, True, 0, 1.85e-3, -1.6e-3),
]


@pytest.mark.parametrize("every, to_zero, chain, error, gain", ROUNDINGS)
def test_the_probe_decides_by_how_sums_are_rounded(every, to_zero, chain, error, gain):
    found = []

    def measure(length):
        sums = Sums(length, every, to_zero)
        found.append(probe(lambda a, b, n: product(a.float(), b.float(), sums), length))
        return found[-1]

    chosen, last = choose_chain(measure)
    assert chosen == chain and last == found[-1]
    assert len(found) == (1 if chain == 64 else 2)
    assert found[0].error == pytest.approx(error, rel=0.05)
    assert found[0].gain == pytest.approx(gain, rel=0.05, abs=1e-5)


def test_a_common_gain_asks_for_shorter_sums():
    for gain in (1e-4, -1e-4):
        assert Probe(64, 5e-4, gain, 1.6e-3).accepted
    for gain in (3e-4, -3e-4):
        assert not Probe(64, 5e-4, gain, 1.6e-3).accepted
        assert Probe(32, 5e-4, gain, 1.6e-3).accepted


def test_float32_sums_where_products_overflow_or_are_as_bad_as_bf16():
    for error in (math.nan, math.inf, 9e-4):
        chosen, last = choose_chain(lambda chain, e=error: Probe(chain, e, 0.0, 1.6e-3))
        assert chosen == 0 and last.chain == 32
    exact = probe(lambda a, b, n: product(a.float(), b.float(), FULL), 64)
    assert exact.accepted and exact.error < 2.5e-4
