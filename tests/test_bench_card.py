"""What surrounds a measurement on a card, tried without one: the step's wait for its data."""

import time

import pytest
import torch

from anima_fast.bench import loading, profile, step_models
from anima_fast.bench.choice import Choice
from anima_fast.data.batches import Batches
from anima_fast.errors import UserError

LATE = 0.03
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes of a card")


@pytest.fixture
def late(monkeypatch):
    """Every batch comes so many seconds late, of four steps."""
    original = Batches.iterate

    def iterate(self, *args, **kwargs):
        for batch in original(self, *args, **kwargs):
            time.sleep(LATE)
            yield batch

    monkeypatch.setattr(Batches, "iterate", iterate)
    monkeypatch.setattr(loading, "DIFFERENT", 2)
    monkeypatch.setattr(loading, "REPEATS", 2)


def tiny_bench():
    bench = step_models.Bench(step_models.CONFIG)
    bench.inputs = step_models.Inputs.random(step_models.CONFIG, 16, 3)
    return bench


@on_the_cpu
def test_a_step_waits_for_the_batches_of_the_trainers_loader(late):
    bench = tiny_bench()
    random = bench.inputs
    found = loading.waits(bench, 16, 3)
    assert len(found.whole) == len(found.waiting) == 3
    assert min(found.waiting) >= LATE and found.seconds >= LATE and 0 < found.share < 1
    for name in ("latents", "noise", "sigma", "context"):
        before, after = getattr(random, name), getattr(bench.inputs, name)
        assert (before.shape, before.dtype) == (after.shape, after.dtype), name
    assert not torch.equal(random.latents, bench.inputs.latents)


@on_the_cpu
def test_the_profile_of_the_step_shows_the_wait(late):
    text = profile.step_text(Choice(sizes={"L": 16}, providers=("eager",)))
    rows = {line.split()[2]: line for line in text.splitlines() if line.startswith("step eager")}
    assert list(rows) == ["forward", "backward", "optimize", "whole", "data"]
    assert float(rows["data"].split()[3]) >= 1e3 * LATE
    assert "of 3 steps is waiting for the next batch" in rows["data"]


@pytest.mark.parametrize(("op", "name"), [("step", "liger"), ("gelu", "sdpa-flash")])
def test_a_profile_of_a_provider_that_is_not_there_is_refused(op, name):
    with pytest.raises(UserError, match=f"{op} has no provider {name} here: use one of own, eager"):
        next(profile.calls(op, Choice(providers=(name,))))
