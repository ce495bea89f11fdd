"""The optimizer around optimizers: chunks, masters, random rounding, state, errors."""

import pytest
import torch
from torch import nn

from anima_fast.training.optimizers import weight_updates
from anima_fast.training.optimizers.weight_updates import WeightUpdates
from anima_fast.training.optimizers.weights import Weight

CPU = torch.device("cpu")
SHAPES = {"a": (40, 30), "b": (7,), "c": (64, 80), "d": (3, 5)}


def weights_of(dtype=torch.bfloat16, *, master=False, swapped=(), shapes=SHAPES):
    made = []
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(len(name) + sum(shape))
        value = torch.randn(shape, generator=generator).to(dtype)
        made.append(Weight(name, nn.Parameter(value), "base", swapped=name in swapped))
        if master:
            made[-1].keep_master(value)
    return made


def updates_of(weights, cls=torch.optim.AdamW, *, update="stochastic", lr=1e-3, **options):
    half = len(weights) // 2
    groups = [
        {"params": [w.param for w in some], "lr": rate, "name": name}
        for name, some, rate in (("one", weights[:half], lr), ("two", weights[half:], 2 * lr))
    ]
    inner = cls(groups, lr=lr)
    return WeightUpdates(inner, weights, CPU, update=update, seed=3, **options)


def give(updates, step):
    """A gradient for every weight, as backward gives it."""
    for index, weight in enumerate(updates.weights.values()):
        generator = torch.Generator().manual_seed(100 * step + index)
        grad = torch.randn(weight.param.shape, generator=generator).to(weight.param.dtype)
        updates.gradients.take(weight, grad)


def steps(updates, first, last, clip=1.0):
    for step in range(first, last):
        give(updates, step)
        updates.clip_gradients(clip)
        updates.step()
        updates.clear_gradients()
    return updates


def values(updates):
    return [w.truth.clone() for w in updates.weights.values()]


def same(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_float32_weights_get_what_the_optimizer_itself_does():
    weights = weights_of(torch.float32)
    plain = [w.param.detach().clone().requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(
        [{"params": plain[:2], "lr": 1e-3}, {"params": plain[2:], "lr": 2e-3}]
    )
    updates = updates_of(weights, update="fp32")
    for step in range(5):
        give(updates, step)
        for param, grad in zip(plain, updates.gradients.kept.values(), strict=True):
            param.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(plain, 1.0)
        assert updates.clip_gradients(1.0).item() == pytest.approx(norm.item(), rel=1e-6)
        updates.step(), optimizer.step()
        updates.clear_gradients()
    for weight, param in zip(weights, plain, strict=True):
        torch.testing.assert_close(weight.param, param, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("update", ["plain", "stochastic", "fp32"])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_chunks_do_not_change_the_result(monkeypatch, update, cls):
    found = []
    for chunk, swapped in ((1, ()), (1300, ()), (10**9, ()), (1, ("a", "c"))):
        monkeypatch.setattr(weight_updates, "CHUNK", chunk)
        weights = weights_of(master=update == "fp32", swapped=swapped)
        found.append(values(steps(updates_of(weights, cls, update=update), 0, 4)))
    assert all(same(found[0], other) for other in found[1:])


def test_together_is_the_same_for_an_optimizer_of_single_weights():
    found = [
        values(steps(updates_of(weights_of(master=True), update="fp32", together=both), 0, 4))
        for both in (False, True)
    ]
    assert same(*found)


def test_a_chunk_is_as_large_as_said(monkeypatch):
    monkeypatch.setattr(weight_updates, "CHUNK", 1300)
    updates = updates_of(weights_of())
    give(updates, 0)
    assert [[w.name for w in some] for _, some in updates._chunks()] == [["a", "b"], ["c"], ["d"]]


def test_masters_are_the_truth_and_the_model_has_them_rounded():
    updates = steps(updates_of(weights_of(master=True), update="fp32"), 0, 3)
    for weight in updates.weights.values():
        assert weight.truth.dtype == torch.float32
        assert torch.equal(weight.param, weight.master.bfloat16())
        assert not torch.equal(weight.param.float(), weight.master)


def test_state_is_float32_but_for_plain_updates():
    for update, dtype in (("stochastic", torch.float32), ("plain", torch.bfloat16)):
        updates = steps(updates_of(weights_of(), update=update), 0, 1)
        assert {s["exp_avg"].dtype for s in updates.state.values()} == {dtype}


def test_every_step_rounds_anew():
    """A hundred updates of an eighth of a step: nearly every weight has moved."""
    weights = weights_of(shapes={"a": (4000,), "b": (4000,)})
    for weight in weights:
        weight.param.data.fill_(1.0)
    updates = updates_of(weights, torch.optim.SGD, lr=1e-3)
    for _ in range(100):
        for weight in weights:
            updates.gradients.take(weight, torch.full((4000,), -1.0).bfloat16())
        updates.step()
        updates.clear_gradients()
    moved = weights[0].param.detach().float()
    assert (moved == 1).float().mean() < 0.01
    assert moved.mean().item() == pytest.approx(1.1, abs=0.003)
    # The second weight has twice the rate, and random numbers of its own.
    assert weights[1].param.detach().float().mean().item() == pytest.approx(1.2, abs=0.005)


@pytest.mark.parametrize("update", ["plain", "stochastic", "fp32"])
@pytest.mark.parametrize("swapped", [(), ("a", "c")])
def test_a_saved_state_goes_on_exactly(update, swapped):
    def make():
        weights = weights_of(master=update == "fp32", swapped=swapped)
        return updates_of(weights, update=update)

    whole = steps(make(), 0, 6)
    first = steps(make(), 0, 3)
    second = make()
    for mine, theirs in zip(second.weights.values(), first.weights.values(), strict=True):
        mine.set(theirs.truth)
    second.load_state_dict(first.state_dict())
    assert same(values(second), values(first))
    assert same(values(steps(second, 3, 6)), values(whole))


def test_large_state_of_swapped_weights_waits_elsewhere():
    updates = steps(updates_of(weights_of(swapped=("c",))), 0, 2)
    by_name = {w.name: w for w in updates.weights.values()}
    assert set(by_name["c"].state_home) == {"exp_avg", "exp_avg_sq"}
    state = updates.state[by_name["c"].param]
    assert state["exp_avg"] is by_name["c"].state_home["exp_avg"]
    assert not by_name["a"].state_home


def test_a_failing_step_leaves_the_weights_as_the_model_knows_them():
    weights = weights_of()
    updates = updates_of(weights)
    before = [w.param.detach().clone() for w in weights]
    give(updates, 0)

    def broken():
        raise RuntimeError("out of memory")

    updates.inner.step = broken
    with pytest.raises(RuntimeError):
        updates.step()
    assert same([w.param.detach() for w in weights], before)
    assert len(updates.param_groups) == 2


def test_the_loss_scale_is_divided_out():
    plain, scaled = (updates_of(weights_of(torch.float32), update="fp32") for _ in range(2))
    give(plain, 0), give(scaled, 0)
    for grad in scaled.gradients.kept.values():
        grad.mul_(1024)
    found_inf = torch.zeros(())
    scaled.unscale(torch.tensor(1 / 1024), found_inf)
    assert found_inf.item() == 0
    norms = [updates.clip_gradients(1.0).item() for updates in (plain, scaled)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    plain.step(), scaled.step()
    for a, b in zip(values(plain), values(scaled), strict=True):
        torch.testing.assert_close(a, b)
    give(scaled, 1)
    next(iter(scaled.gradients.kept.values()))[0, 0] = float("inf")
    scaled.unscale(torch.tensor(1 / 1024), found_inf)
    assert found_inf.item() == 1


def test_a_weight_without_a_gradient_stays():
    weights = weights_of()
    updates = updates_of(weights)
    updates.gradients.take(weights[0], torch.ones(40, 30).bfloat16())
    before = [w.param.detach().clone() for w in weights]
    updates.clip_gradients(1.0)
    updates.step()
    assert [torch.equal(w.param, b) for w, b in zip(weights, before, strict=True)] == [
        False, True, True, True,
    ]  # fmt: skip


def test_each_weight_has_random_numbers_of_its_own():
    weights = weights_of(shapes={"a": (4000,), "b": (4000,)})
    for weight in weights:
        weight.param.data.fill_(1.0)
    groups = [{"params": [w.param for w in weights], "lr": 1e-3}]
    inner = torch.optim.SGD(groups)
    updates = WeightUpdates(inner, weights, CPU, update="stochastic", seed=3)
    for weight in weights:
        updates.gradients.take(weight, torch.full((4000,), -3.0).bfloat16())
    updates.step()
    assert not torch.equal(weights[0].param, weights[1].param)
