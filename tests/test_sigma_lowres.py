"""Low resolution at high noise: distribution of sigma, which pictures, caches, resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stack import make_world, records, train_options

from anima_fast.data import images, lowres
from anima_fast.data.encode_latents import LatentPhase
from anima_fast.data.lowres import LowRes
from anima_fast.models.flow import FlowSettings, sample_sigma
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.training import setup, step
from anima_fast.training.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """The test pictures are 64 pixels wide."""
    monkeypatch.setattr(lowres, "LEAST_SIDE", 16)


class Item:
    def __init__(self, size, bucket):
        self.size, self.bucket, self.index = size, bucket, 0


# The distribution


@pytest.mark.parametrize("mode", ["sigmoid", "uniform", "shift", "flux_shift", "sigma"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_sample_keeps_the_whole_distribution(mode, batch):
    """Largest distance of the two distribution functions, for each place in the batch."""
    flow = FlowSettings(timestep_sampling=mode, discrete_flow_shift=2.0)
    low = LowRes(0.7, 0.5, flow)
    drawn = [low.draw(batch, (512, 512), 7, i) for i in range(3000)]
    sigmas = torch.stack([sigma for sigma, _ in drawn])
    expected = sample_sigma(flow, 200_000, (64, 64), torch.Generator().manual_seed(1)).sort()[0]
    for column in sigmas.T:
        places = torch.searchsorted(expected, column.sort()[0]) / len(expected)
        distance = (places - (torch.arange(3000) + 0.5) / 3000).abs().max()
        # The Kolmogorov-Smirnov bound for 3000 draws at one in ten thousand is 0.041.
        assert distance < 0.041
    for sigma, high in drawn:
        assert ((sigma >= 0.7) == high).all()
    share = sum(high for _, high in drawn) / len(drawn)
    assert share == pytest.approx(low.share((512, 512)), abs=0.03)


def test_a_side_that_is_never_drawn_takes_the_full_picture():
    low = LowRes(0.9, 0.5, FlowSettings(max_timestep=500))
    assert low.share((512, 512)) == 0
    assert not any(low.draw(4, (512, 512), i)[1] for i in range(50))


def test_draws_depend_on_their_key_alone():
    low = LowRes(0.7, 0.5, FlowSettings())
    first = low.draw(4, (512, 512), 1, 2, 3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = low.draw(4, (512, 512), 1, 2, 3), low.draw(4, (512, 512), 1, 2, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("bucket", "scale", "expected"),
    [
        ((1024, 1024), 0.5, (512, 512)), ((1344, 768), 0.5, (672, 384)),
        ((832, 1216), 0.25, (208, 304)), ((1040, 1008), 0.5, (512, 512)),
    ],
)  # fmt: skip
def test_sizes_of_smaller_pictures(bucket, scale, expected, monkeypatch):
    monkeypatch.setattr(lowres, "replace", lambda item, **new: new)
    found = LowRes(0.7, scale, FlowSettings()).small_item(Item((3000, 2000), bucket))
    assert found["bucket"] == expected
    width, height = found["resized"]
    assert width >= expected[0] and height >= expected[1]
    assert width == expected[0] or height == expected[1]
    monkeypatch.setattr(lowres, "LEAST_SIDE", 256)
    small = LowRes(0.7, scale, FlowSettings()).small_item(Item((3000, 2000), bucket))
    assert (small is None) == (min(expected) < 256)


# Runs


class Seen:
    """The latents, noise levels and masks of every micro-step."""

    def __init__(self, monkeypatch):
        self.batches = []
        real = step.batch_loss

        def batch_loss(run, batch, latents, noise, sigma, settings):
            masks = None if batch.masks is None else batch.masks.clone()
            self.batches.append((batch, latents.clone(), sigma.clone(), masks))
            return real(run, batch, latents, noise, sigma, settings)

        monkeypatch.setattr(step, "batch_loss", batch_loss)


def test_a_side_that_is_too_rare_takes_the_full_picture(monkeypatch):
    """Nothing else of four thousand draws lies above: the batch is no batch of the high side."""
    draws = iter([torch.tensor([0.9, 0.1]), torch.full((lowres.CANDIDATES,), 0.2)])
    monkeypatch.setattr(lowres, "sample_sigma", lambda *_: next(draws))
    sigma, high = LowRes(0.5, 0.5, FlowSettings()).draw(2, (64, 64), 1)
    assert sigma.tolist() == pytest.approx([0.9, 0.1]) and high is False


@pytest.mark.parametrize("cached", [True, False])
def test_high_noise_gets_the_smaller_picture(world, tmp_path, monkeypatch, cached):
    seen = Seen(monkeypatch)
    train(train_options(
        world, tmp_path, sigma_lowres=0.5, cache_latents=cached, max_train_epochs=4,
        masked_loss=False, timestep_sampling="uniform",
    ))  # fmt: skip
    vae = load_vae(world["vae"], dtype=torch.float32)
    sides = set()
    for batch, latents, sigma, _ in seen.batches:
        sides.add(batch.small)
        assert ((sigma >= 0.5) == batch.small).all()
        full = {(64, 64): (32, 32), (80, 48): (48, 32), (48, 80): (32, 48)}
        width, height = batch.items[0].bucket
        assert ((width, height) in full.values()) == batch.small
        assert latents.shape[-2:] == (height // 8, width // 8)
        pixels = torch.stack([torch.from_numpy(images.load_item(i)[0]) for i in batch.items])
        torch.testing.assert_close(latents, vae.encode(pixels), rtol=1e-3, atol=1e-3)
    assert sides == {True, False}
    assert {r["lowres"] for r in records(tmp_path)} == {0.0, 1.0}


def test_small_latents_are_cached_once_and_full_ones_stay(world, tmp_path, monkeypatch):
    encoded = []
    real = LatentPhase.encode

    def encode(self, missing):
        encoded.append(len(missing))
        return real(self, missing)

    monkeypatch.setattr(LatentPhase, "encode", encode)
    cache = {"cache_dir": str(tmp_path / "cache"), "max_train_epochs": 1}
    train(train_options(world, tmp_path / "a", **cache))
    train(train_options(world, tmp_path / "b", sigma_lowres=0.5, **cache))
    train(train_options(world, tmp_path / "c", sigma_lowres=0.6, **cache))
    train(train_options(world, tmp_path / "d", sigma_lowres=0.6, sigma_lowres_scale=0.25, **cache))
    assert encoded == [5, 5, 5]


def test_mirrored_pictures_and_masks_have_the_smaller_size(world, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    text = tmp_path / "data.toml"
    original = Path(world["dataset_config"]).read_text(encoding="utf-8")
    text.write_text(original + "\nflip_aug = true\nalpha_mask = true\n", encoding="utf-8")
    given = {**world, "dataset_config": str(text)}
    train(train_options(
        given, tmp_path / "out", sigma_lowres=0.5, max_train_epochs=3,
        timestep_sampling="uniform", masked_loss=True,
    ))  # fmt: skip
    assert {batch.small for batch, *_ in seen.batches} == {True, False}
    for batch, _, _, masks in seen.batches:
        width, height = batch.items[0].bucket
        assert masks.shape[-2:] == (height, width)


def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path):
    given = {"sigma_lowres": 0.5, "max_train_epochs": 4, "learning_rate": 0.01}
    train(train_options(world, tmp_path / "a", save_every_n_epochs=2, save_state=True, **given))
    state = str(tmp_path / "a" / "lora-000002-state")
    train(train_options(world, tmp_path / "b", resume=state, **given))
    one, other = (load_file(tmp_path / n / "lora.safetensors") for n in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_validation_always_has_the_full_picture(world, tmp_path, monkeypatch):
    given = {"validation_split": 0.4, "max_train_epochs": 2, "learning_rate": 1e-12}
    train(train_options(world, tmp_path / "a", **given))
    train(train_options(world, tmp_path / "b", sigma_lowres=0.05, **given))
    losses = [[r["loss"] for r in records(tmp_path / n, "validation")] for n in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_off_it_draws_nothing(world, tmp_path, monkeypatch):
    """Without the option the run is what it always was: sigma comes after the noise."""
    seen = Seen(monkeypatch)
    monkeypatch.setattr(setup.LowRes, "draw", None)
    train(train_options(world, tmp_path, max_train_epochs=1))
    assert all(batch.sigma is None and not batch.small for batch, *_ in seen.batches)
    assert "lowres" not in records(tmp_path)[0]


def test_what_it_does_is_said(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lowres, "LEAST_SIDE", 32)
    train(train_options(world, tmp_path, sigma_lowres=0.7, max_train_epochs=1))
    said = capsys.readouterr().err
    assert "20% of the batches are above sigma 0.7 and have 25% of the tokens" in said
    monkeypatch.setattr(lowres, "LEAST_SIDE", 256)
    train(train_options(world, tmp_path / "b", sigma_lowres=0.7, max_train_epochs=1))
    assert "5 images would be smaller than 256 pixels" in capsys.readouterr().err
