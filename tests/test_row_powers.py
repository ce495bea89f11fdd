"""Rows of float16 with a power of two each: what they hold, what the row kernels make of them."""

import pytest
import torch

from anima_fast.kernels import dispatch
from anima_fast.kernels.gate_residual import gate_residual, gate_residual_backward
from anima_fast.kernels.gate_residual_layernorm_modulate import (
    gate_residual_layernorm_modulate_backward,
    gate_residual_layernorm_modulate_forward,
)
from anima_fast.kernels.layernorm_modulate import (
    layernorm_modulate_backward,
    layernorm_modulate_forward,
    layernorm_modulate_reference,
)
from anima_fast.kernels.row_powers import (
    TAIL,
    _converted,
    opened,
    powers_of,
    stored,
    with_powers,
    without_powers,
)

BOTH = pytest.mark.parametrize("kernels", ["reference", "triton"])
WIDTH = 48
PACKED = torch.empty(0, WIDTH + TAIL, dtype=torch.float16)


def rows(seed=0, length=6, largest=1e6):
    """[1, L, D] float32 whose rows differ by powers of four."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, length, WIDTH, generator=generator)
    return x * largest * 4.0 ** -torch.arange(length)[:, None]


def vectors(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, WIDTH, generator=generator).unbind()


def row_errors(found, exact):
    """The relative error of each row."""
    exact = exact.double()
    return ((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


@BOTH
@pytest.mark.parametrize("largest", [1e30, 1e6, 1.0, 1e-9, 1e-25])
def test_rows_of_any_size_keep_eleven_bits(kernels, largest):
    x = rows(largest=largest)
    with dispatch.use(kernels):
        packed = with_powers(x)
        found = without_powers(packed)
    assert packed.dtype == torch.float16 and packed.shape == (1, 6, WIDTH + TAIL)
    assert packed[..., :WIDTH].abs().amax(-1).min() >= 2**14
    assert packed.isfinite().all() and not packed[..., WIDTH + 1 :].any()
    torch.testing.assert_close(found, x, rtol=2**-11, atol=0)


@BOTH
def test_small_entries_of_a_row_keep_their_digits(kernels):
    x = (2.0 ** -torch.arange(WIDTH).float() * 1.2345)[None, None]
    with dispatch.use(kernels):
        found = without_powers(with_powers(x))
    torch.testing.assert_close(found[..., :28], x[..., :28], rtol=2**-11, atol=0)
    # Below them digits end, and nothing else.
    torch.testing.assert_close(found, x, rtol=2**-11, atol=2.0**-38)


@BOTH
def test_zeros_and_what_is_not_finite(kernels):
    x = torch.ones(1, 4, WIDTH)
    x[0, 0], x[0, 1, 3], x[0, 2, 5] = 0.0, torch.inf, torch.nan
    with dispatch.use(kernels):
        found = without_powers(with_powers(x))
    assert torch.equal(found[0, 0], x[0, 0]) and torch.equal(found[0, 3], x[0, 3])
    assert found[0, 1, 3] == torch.inf and found[0, 2, 5].isnan()
    assert found.isfinite().sum() == x.isfinite().sum()


def test_the_kernel_stores_what_the_reference_stores():
    x = torch.cat([rows(largest=big) for big in (1e20, 3.0, 1e-20)], 1)
    with dispatch.use("triton"):
        assert torch.equal(_converted(x, PACKED, WIDTH), stored(x, PACKED))
        packed = stored(x, PACKED)
        assert torch.equal(_converted(packed, x[:0], WIDTH), opened(packed, WIDTH))


def test_other_widths_are_refused():
    assert not powers_of(torch.empty(2, WIDTH), WIDTH)
    for x in (torch.empty(2, WIDTH + TAIL), torch.empty(2, WIDTH + 8).half()):
        with pytest.raises(ValueError, match="expected rows of 48, or of 64"):
            powers_of(x, WIDTH)
    with pytest.raises(ValueError, match=r"gate is \(1, 40\)"):
        gate_residual(with_powers(rows()), rows(), torch.ones(1, 40))


@BOTH
@pytest.mark.parametrize("largest, gradient", [(1e6, 1e-9), (1e-3, 1e4), (3e5, 1e12)])
def test_a_seam_keeps_rows_of_any_size(kernels, largest, gradient):
    """Forward and backward, where float16 itself holds neither x nor its gradient."""
    x, y, dout, dh = rows(largest=largest), rows(1, largest=largest), rows(2), rows(3)
    # y and dh are float16: a product's result and its gradient.
    y, dh = (y / largest).half(), (dh / 1e6).half()
    dout = dout * gradient / 1e6
    gate, scale, shift = vectors(3)
    with dispatch.use(kernels):
        x_out, h = gate_residual_layernorm_modulate_forward(
            with_powers(x), y, gate, scale, shift, torch.float16
        )
        dx, dy, *sums = gate_residual_layernorm_modulate_backward(
            with_powers(dout), dh, x_out, y, gate, scale, dtype=torch.float32
        )
    exact = opened(with_powers(x), WIDTH).double() + gate.double() * y.double()
    assert row_errors(opened(x_out, WIDTH), exact) < 2**-11
    of_norm = layernorm_modulate_reference(exact, scale.double(), shift.double())
    assert row_errors(h, of_norm) < 2**-9
    dr, *of_norm = layernorm_modulate_backward(
        dh.double(), opened(x_out, WIDTH).double(), scale.double(),
        residual=opened(with_powers(dout), WIDTH).double(),
    )  # fmt: skip
    assert row_errors(opened(dx, WIDTH), dr) < 2**-10
    assert row_errors(dy, dr * gate.double()) < 1e-5
    for found, right in zip(sums, [(dr * y.double()).sum(1), *of_norm], strict=True):
        assert row_errors(found, right) < 1e-4


@BOTH
def test_the_ends_of_a_block_keep_rows_of_any_size(kernels):
    x, dout = rows(largest=1e6), rows(2, largest=1e-9)
    y = rows(1, largest=1.0).half()
    gate, scale, shift = vectors(3)
    with dispatch.use(kernels):
        packed, packed_dout = with_powers(x), with_powers(dout)
        x_out = gate_residual(packed, y, gate)
        dy, dgate = gate_residual_backward(packed_dout, y, gate, torch.float32)
        h = layernorm_modulate_forward(packed, scale, shift, torch.float16)
        dx, dscale, dshift = layernorm_modulate_backward(y, packed, scale, residual=packed_dout)
    x, dout = opened(packed, WIDTH).double(), opened(packed_dout, WIDTH).double()
    assert row_errors(opened(x_out, WIDTH), x + gate.double() * y.double()) < 2**-11
    assert row_errors(dy, dout * gate.double()) < 1e-6
    assert row_errors(dgate, (dout * y.double()).sum(1)) < 1e-4
    assert row_errors(h, layernorm_modulate_reference(x, scale, shift)) < 2**-10
    right = layernorm_modulate_backward(y.double(), x, scale.double(), residual=dout)
    assert row_errors(opened(dx, WIDTH), right[0]) < 2**-10
    assert row_errors(dscale, right[1]) < 1e-4 and row_errors(dshift, right[2]) < 1e-4
