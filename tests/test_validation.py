"""Validation: fixed noise levels and noise, stopping early, and losses by noise level."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from stack import make_config, make_images, make_world, records, train_options

from anima_fast.errors import UserError
from anima_fast.options.run import TrainOptions
from anima_fast.training import events, validation
from anima_fast.training.loop import train
from anima_fast.training.run import Position, SigmaBins
from anima_fast.training.validation import SIGMAS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_network_that_does_not_learn_has_one_validation_loss(world, tmp_path):
    """Same images, noise and sigma, no dropout or extra noise: only weights could change it."""
    given = {"validation_split": 0.4, "learning_rate": 1e-12, "max_train_epochs": 3}
    given |= {"network_dropout": 0.9, "caption_dropout_rate": 0.9, "ip_noise_gamma": 0.5}
    train(train_options(world, tmp_path, **given))
    found = records(tmp_path, "validation")
    assert len(found) == 3
    for name in map(str, SIGMAS):
        values = [r["per_sigma"][name] for r in found]
        assert max(values) - min(values) < 1e-5 * values[0]
    assert found[0]["loss"] == pytest.approx(sum(found[0]["per_sigma"].values()) / 4)
    assert len(set(found[0]["per_sigma"].values())) == 4


def test_dropout_is_off_in_validation(world, tmp_path):
    """With a LoRA that does something: one that starts at zero has nothing to drop."""
    train(train_options(world, tmp_path / "first", learning_rate=0.05, max_train_epochs=1))
    start = str(next((tmp_path / "first").glob("*.safetensors")))
    given = {"validation_split": 0.4, "learning_rate": 1e-12, "max_train_epochs": 3}
    for out, more in (("plain", {}), ("dropped", {"network_dropout": 0.9})):
        train(train_options(world, tmp_path / out, network_weights=start, **given, **more))
    losses = [
        r["loss"] for out in ("plain", "dropped") for r in records(tmp_path / out, "validation")
    ]
    assert len(losses) == 6 and max(losses) - min(losses) < 1e-5 * losses[0]


def test_noise_depends_on_the_batch_and_the_level_alone(world, tmp_path, monkeypatch):
    seen, real = [], validation.batch_loss

    def batch_loss(run, batch, latents, noise, sigma, settings):
        seen.append(noise.clone())
        return real(run, batch, latents, noise, sigma, settings)

    monkeypatch.setattr(validation, "batch_loss", batch_loss)
    train(train_options(world, tmp_path, validation_split=0.7, max_train_epochs=2))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) > len(SIGMAS), "more than one batch"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    starts = {tuple(noise.flatten()[:4].tolist()) for noise in first}
    assert len(starts) == len(first)


@pytest.mark.parametrize("failures", [1, 2])
def test_memory_that_is_out_ends_no_run(world, tmp_path, monkeypatch, capsys, failures):
    """Tried once more, then left out; the weights are those of a run where nothing happened."""
    given = {"validation_split": 0.4, "network_dropout": 0.3, "learning_rate": 0.01}
    train(train_options(world, tmp_path / "plain", **given))
    real, left = validation.batch_loss, [None] * failures

    def batch_loss(*args):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(validation, "batch_loss", batch_loss)
    train(train_options(world, tmp_path / "full", **given))
    found = [records(tmp_path / name, "validation") for name in ("plain", "full")]
    assert found[1] == (found[0] if failures == 1 else found[0][1:])
    assert ("no validation loss" in capsys.readouterr().err) == (failures == 2)
    one, other = (load_file(tmp_path / n / "lora.safetensors") for n in ("plain", "full"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_subset_may_be_the_validation_folder(world, tmp_path):
    """validation_split = 1.0 holds a whole folder out, and no image of another one."""
    held = make_images(tmp_path / "held", 3, seed=5)
    config = make_config(tmp_path / "data.toml", tmp_path / "world_images")
    make_images(tmp_path / "world_images", 4)
    text = config.read_text(encoding="utf-8")
    text += f'\n[[datasets.subsets]]\nimage_dir = "{held.as_posix()}"\nvalidation_split = 1.0\n'
    config.write_text(text, encoding="utf-8")
    options = train_options({**world, "dataset_config": str(config)}, tmp_path / "out")
    train(options)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["images"] == 4
    assert len(records(tmp_path / "out", "validation")) == options.max_train_epochs


# Stopping early


def fake_losses(monkeypatch, losses):
    left = iter(losses)
    monkeypatch.setattr(events, "validate_or_skip", lambda *_: {"0.2": next(left)})


@pytest.mark.parametrize("every", ["epochs", "steps"])
def test_it_stops_when_the_loss_no_longer_falls(world, tmp_path, monkeypatch, capsys, every):
    fake_losses(monkeypatch, [3.0, 2.0, 2.5, 1.99, 4.0, 4.0, 4.0])
    given = {"validation_split": 0.2, "early_stop_patience": 2, "early_stop_min_delta": 0.05}
    given |= {"max_train_epochs": 9, "save_every_n_epochs": 1}
    given |= {"validate_every_n_steps": 1} if every == "steps" else {}
    train(train_options(world, tmp_path, **given))
    # 1.99 is no better by more than 0.05: two stale ones after 2.0.
    assert [r["loss"] for r in records(tmp_path, "validation")] == [3.0, 2.0, 2.5, 1.99]
    assert "stopped early" in capsys.readouterr().err
    (event,) = records(tmp_path, "event")
    assert "lora-best.safetensors" in event["text"]
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "finished"
    best, last = (load_file(tmp_path / f"{n}.safetensors") for n in ("lora-best", "lora"))
    assert any(not torch.equal(best[key], last[key]) for key in best)
    if every == "epochs":
        second = load_file(tmp_path / "lora-000002.safetensors")
        assert all(torch.equal(best[key], second[key]) for key in best)


def test_patience_survives_a_resume(world, tmp_path, monkeypatch):
    given = {"validation_split": 0.2, "early_stop_patience": 2, "max_train_epochs": 6}
    fake_losses(monkeypatch, [1.0, 2.0])
    train(train_options(
        world, tmp_path / "a", **given | {"max_train_epochs": 2}, save_state_on_train_end=True
    ))  # fmt: skip
    fake_losses(monkeypatch, [2.0, 2.0, 2.0])
    train(train_options(world, tmp_path / "b", resume=str(tmp_path / "a" / "lora-state"), **given))
    assert len(records(tmp_path / "b", "validation")) == 1


def test_patience_needs_something_held_out():
    with pytest.raises(UserError, match="--validation_split"):
        TrainOptions(train_data_dir="x", resolution="64", early_stop_patience=2)


def test_patience_needs_an_image_held_out_by_the_dataset_file(world, tmp_path):
    with pytest.raises(UserError, match="no image is held out"):
        train(train_options(world, tmp_path, early_stop_patience=2))


def test_what_counts_as_better():
    position = Position(step=1)
    assert not position.record_validation(math.nan, 0.0) and position.best_loss is None
    assert position.record_validation(1.0, 0.0) and not position.record_validation(1.0, 0.0)
    assert not position.record_validation(math.nan, 0.0) and position.stale == 2


def test_a_loss_that_never_is_a_number_is_said(world, tmp_path, monkeypatch):
    fake_losses(monkeypatch, [math.nan] * 4)
    given = {"validation_split": 0.2, "early_stop_patience": 2, "max_train_epochs": 4}
    train(train_options(world, tmp_path, **given))
    (event,) = records(tmp_path, "event")
    assert event["text"] == "stopped early: 2 validations without a finite loss"
    assert not (tmp_path / "lora-best.safetensors").exists()


# Losses by noise level


def test_bins_hold_means_and_counts():
    bins = SigmaBins(torch.device("cpu"))
    bins.add(torch.tensor([0.0, 0.05, 0.15, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    bins.add(torch.tensor([0.99, 0.5]), torch.tensor([9.0, math.nan]))
    found = bins.take()
    assert found["means"] == [2.0, 5.0, *[None] * 7, 8.0]
    assert found["counts"] == [2, 1, *[0] * 7, 2]
    assert bins.take()["counts"] == [0] * 10


def test_a_run_logs_every_sample_once(world, tmp_path):
    train(train_options(world, tmp_path, max_train_epochs=2))
    found = records(tmp_path, "sigma_bins")
    assert [sum(r["counts"]) for r in found] == [5, 5]
    for epoch, record in enumerate(found, 1):
        total = sum(m * c for m, c in zip(record["means"], record["counts"], strict=True) if c)
        steps = [r for r in records(tmp_path, "step") if r["epoch"] == epoch]
        assert total > 0 and len(steps) > 0
