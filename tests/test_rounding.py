"""Stochastic rounding to bfloat16: unbiased, between neighbours, repeatable."""

import pytest
import torch

from anima_fast.training.optimizers.weight_updates import rounding_generator, stochastic_round

CPU = torch.device("cpu")


def generator(*key):
    return rounding_generator(CPU, *key)


def neighbours(x):
    """The bfloat16 numbers at or below and at or above x, as float32."""
    bits = x.view(torch.int32)
    toward_zero = (bits & -65536).view(torch.float32)
    away = ((bits & -65536) + 65536).view(torch.float32)
    away = torch.where(toward_zero == x, toward_zero, away)
    return torch.minimum(toward_zero, away), torch.maximum(toward_zero, away)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_the_result_is_one_of_the_two_neighbours(scale):
    x = scale * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    low, high = neighbours(x)
    found = stochastic_round(x, generator(1)).float()
    assert ((found == low) | (found == high)).all()
    assert (found == low).any() and (found == high).any()


def test_it_is_unbiased():
    """The mean of n draws lies within five standard errors, for each of 200 numbers."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    low, high = (t.double() for t in neighbours(x))
    n = 20_000
    mean = stochastic_round(x.expand(n, -1).contiguous(), generator(2)).double().mean(0)
    probability = (x.double() - low) / (high - low)
    error = (high - low) * (probability * (1 - probability) / n).sqrt()
    assert ((mean - x.double()).abs() <= 5 * error).all()
    # Rounding to nearest fails the same test.
    nearest = x.bfloat16().double()
    assert not ((nearest - x.double()).abs() <= 5 * error).all()


def test_small_updates_add_up():
    """A weight of 1 with steps of 1/128 gains 0.1 from a hundred updates of 0.001."""
    weights = torch.ones(4000, dtype=torch.bfloat16)
    plain = weights.clone()
    for step in range(100):
        weights = stochastic_round(weights.float() + 1e-3, generator(3, step))
        plain = (plain.float() + 1e-3).bfloat16()
    assert (plain == 1).all()
    assert abs(weights.float().mean().item() - 1.1) < 0.005


def test_numbers_that_bfloat16_has_stay():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, float("inf"), -float("inf")]).bfloat16().float()
    for key in range(20):
        found = stochastic_round(x, generator(key)).float()
        assert torch.equal(found.view(torch.int32), x.view(torch.int32))


def test_nan_stays_nan():
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32)
    for key in range(20):
        assert stochastic_round(bits.view(torch.float32), generator(key)).isnan().all()


def test_the_key_decides():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = stochastic_round(x, generator(7, 3, "a"))
    assert torch.equal(first, stochastic_round(x, generator(7, 3, "a")))
    for other in ((8, 3, "a"), (7, 4, "a"), (7, 3, "b")):
        assert not torch.equal(first, stochastic_round(x, generator(*other)))


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="expected float32"):
        stochastic_round(torch.zeros(2, dtype=torch.float64), generator(0))
