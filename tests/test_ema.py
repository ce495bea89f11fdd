"""The running mean of the weights: its formula, its file beside the LoRA, and its resume."""

import pytest
import torch
from safetensors.torch import load_file
from stack import make_world, train_options

from anima_fast.training.loop import train
from anima_fast.training.optimizers.ema import Ema


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_the_mean_follows_its_formula():
    weights = torch.zeros(3)
    ema = Ema(weights, 0.5)
    mean = 0.0
    for step in range(12):
        weights.fill_(step + 1.0)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * (step + 1.0)
    assert ema.mean.tolist() == pytest.approx([mean] * 3)
    with ema.in_place():
        assert weights.tolist() == pytest.approx([mean] * 3)
    assert weights.tolist() == [12.0] * 3


def test_the_mean_of_half_precision_weights_is_kept_in_float32():
    weights = torch.ones(2, dtype=torch.bfloat16)
    ema = Ema(weights, 0.9999)
    ema.updates = 10**9
    weights.fill_(2.0)
    ema.update()
    assert ema.mean.tolist() == pytest.approx([1.0001] * 2, abs=1e-6)


def run(world, folder, **changes):
    return train(train_options(world, folder, ema_decay=0.6, **changes))


def test_the_file_beside_the_lora_is_the_mean_of_the_steps(world, tmp_path):
    """Recomputed from the LoRA files of every step; raw weights are those of a run without."""
    run(world, tmp_path / "a", max_train_epochs=None, max_train_steps=4, save_every_n_steps=1)
    train(train_options(world, tmp_path / "b", max_train_epochs=None, max_train_steps=4))
    files = [tmp_path / "a" / f"lora-step{i:08d}.safetensors" for i in (1, 2, 3)]
    files.append(tmp_path / "a" / "lora.safetensors")
    steps = [load_file(path) for path in files]
    plain = load_file(tmp_path / "b" / "lora.safetensors")
    assert all(torch.equal(plain[key], steps[-1][key]) for key in plain)
    found = load_file(tmp_path / "a" / "lora-ema.safetensors")
    start = load_file(tmp_path / "a" / "lora-step00000001-ema.safetensors")
    assert_is_mean(found, steps)
    assert start.keys() == found.keys()


def assert_is_mean(found, steps):
    """Up matrices start at zero, so their mean is known from the first step on."""
    for key in (k for k in found if "lora_up" in k):
        mean = torch.zeros_like(found[key])
        for t, weights in enumerate(steps):
            decay = min(0.6, (1 + t) / (10 + t))
            mean = decay * mean + (1 - decay) * weights[key]
        torch.testing.assert_close(found[key], mean, rtol=1e-4, atol=1e-8)


def test_the_mean_beside_a_schedule_free_average_is_that_of_the_steps(world, tmp_path):
    """Recomputed from the resume states, which hold the training points."""
    run(
        world, tmp_path, optimizer_type="AdamWScheduleFree", lr_scheduler="constant",
        max_train_epochs=None, max_train_steps=4, save_every_n_steps=1, save_state=True,
    )  # fmt: skip
    names = [*(f"lora-step{i:08d}-state" for i in (1, 2, 3)), "lora-state"]
    steps = [load_file(tmp_path / name / "network.safetensors") for name in names]
    assert_is_mean(load_file(tmp_path / "lora-ema.safetensors"), steps)
    average = load_file(tmp_path / "lora.safetensors")
    assert any(not torch.equal(average[key], steps[-1][key]) for key in average)


def test_a_resumed_run_has_the_same_mean(world, tmp_path):
    whole = tmp_path / "whole"
    run(world, whole, max_train_epochs=2, save_every_n_epochs=1, save_state=True)
    resumed = tmp_path / "resumed"
    run(world, resumed, max_train_epochs=2, resume=str(whole / "lora-000001-state"))
    for name in ("lora.safetensors", "lora-ema.safetensors"):
        one, other = load_file(whole / name), load_file(resumed / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_state_without_a_mean_starts_it_and_says_so(world, tmp_path, capsys):
    train(train_options(world, tmp_path / "a", max_train_epochs=1, save_state_on_train_end=True))
    run(world, tmp_path / "b", max_train_epochs=2, resume=str(tmp_path / "a" / "lora-state"))
    assert "no running mean" in capsys.readouterr().err
    assert (tmp_path / "b" / "lora-ema.safetensors").exists()


def test_old_files_are_removed_with_their_means(world, tmp_path):
    run(world, tmp_path, max_train_epochs=4, save_every_n_epochs=1, save_last_n_epochs=1)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [
        "lora-000003-ema.safetensors", "lora-000003.safetensors",
        "lora-ema.safetensors", "lora.safetensors",
    ]  # fmt: skip
