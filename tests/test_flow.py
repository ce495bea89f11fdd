"""Noise levels, losses and schedules against independent vectors and their own definitions."""

import types

import golden
import pytest
import torch

from anima_fast.errors import UserError
from anima_fast.models import flow
from anima_fast.models.flow_settings import TIMESTEP_SAMPLINGS, WEIGHTING_SCHEMES, FlowSettings

SETTINGS = {
    "sigmoid": {},
    "sigmoid_scale1.5": {"sigmoid_scale": 1.5},
    "uniform": {"timestep_sampling": "uniform"},
    "shift3": {"timestep_sampling": "shift", "discrete_flow_shift": 3.0},
    "shift0.5_scale2": {
        "timestep_sampling": "shift",
        "discrete_flow_shift": 0.5,
        "sigmoid_scale": 2.0,
    },
    "flux_shift_128x128": {"timestep_sampling": "flux_shift"},
    "flux_shift_96x160": {"timestep_sampling": "flux_shift"},
    "flux_shift_64x64": {"timestep_sampling": "flux_shift"},
    "sigma_uniform": {"timestep_sampling": "sigma"},
    "sigma_uniform_shift3": {"timestep_sampling": "sigma", "discrete_flow_shift": 3.0},
    "sigma_logit_normal": {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal"},
    "sigma_logit_normal_m0.5_s0.7": {
        "timestep_sampling": "sigma",
        "weighting_scheme": "logit_normal",
        "logit_mean": 0.5,
        "logit_std": 0.7,
    },
    "sigma_mode": {"timestep_sampling": "sigma", "weighting_scheme": "mode"},
}


def latent_size(name: str) -> tuple[int, int]:
    size = name.rsplit("_", 1)[-1]
    return tuple(map(int, size.split("x"))) if name.startswith("flux") else (8, 8)


def test_every_sampler_has_a_vector():
    tensors, _ = golden.load("timesteps")
    assert {key.rsplit(".", 1)[0] for key in tensors} == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_sigma_from_draw_meets_the_vectors(name):
    tensors, _ = golden.load("timesteps")
    sigma = flow.sigma_from_draw(
        FlowSettings(**SETTINGS[name]), tensors[f"{name}.draw"], latent_size(name)
    )
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma, tensors[f"{name}.sigma"].float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(sigma, tensors[f"{name}.timestep_model"].float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_distribution(name):
    stats = golden.load_json("timesteps_stats")[name]
    hw = tuple(stats["settings"].pop("latent_hw"))
    settings = FlowSettings(**stats["settings"])
    sigma = flow.sample_sigma(settings, 50_000, hw, torch.Generator().manual_seed(7))
    assert sigma.mean().item() == pytest.approx(stats["mean"], abs=0.01)
    assert sigma.std().item() == pytest.approx(stats["std"], abs=0.01)
    quantiles = torch.quantile(sigma, torch.tensor(stats["quantile_p"]))
    torch.testing.assert_close(quantiles, torch.tensor(stats["quantiles"]), atol=0.02, rtol=0)


def test_sampling_is_reproducible_and_uses_the_global_generator():
    torch.manual_seed(3)
    first = flow.sample_sigma(FlowSettings(), 5, (8, 8))
    torch.manual_seed(3)
    assert torch.equal(first, flow.sample_sigma(FlowSettings(), 5, (8, 8)))
    generated = flow.sample_sigma(FlowSettings(), 5, (8, 8), torch.Generator().manual_seed(3))
    assert torch.equal(first, generated)


@pytest.mark.parametrize("mode", TIMESTEP_SAMPLINGS)
def test_timestep_limits_restrict_sigma_affinely(mode):
    draw = torch.linspace(0.01, 0.99, 50)
    free = flow.sigma_from_draw(FlowSettings(timestep_sampling=mode), draw, (64, 64))
    settings = FlowSettings(timestep_sampling=mode, min_timestep=200, max_timestep=700)
    limited = flow.sigma_from_draw(settings, draw, (64, 64))
    torch.testing.assert_close(limited, 0.2 + 0.5 * free)


@pytest.mark.parametrize("limits", [(500, 500), (-1, 10), (0, 1001), (700, 200)])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(UserError, match="min < max"):
        FlowSettings(min_timestep=limits[0], max_timestep=limits[1])


@pytest.mark.parametrize("name", ["l2", "l1", "huber", "smooth_l1"])
def test_element_loss_vectors(name):
    tensors, _ = golden.load("loss")
    loss = flow.element_loss(tensors["pred"] - tensors["target"], name, tensors["huber_c"])
    torch.testing.assert_close(loss, tensors[f"loss.{name}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_weighting_vectors(scheme):
    tensors, _ = golden.load("loss")
    weight = flow.loss_weight(scheme, tensors["sigma"])
    torch.testing.assert_close(weight, tensors[f"weight.{scheme}"], rtol=1e-5, atol=0)


def test_mask_vectors():
    tensors, _ = golden.load("loss")
    loss = tensors["loss.l2"]
    masked = flow.apply_mask(loss, tensors["alpha_mask"])
    torch.testing.assert_close(masked, tensors["loss.l2_masked"], rtol=1e-5, atol=1e-7)
    # The red channel of a conditioning image.
    masked = flow.apply_mask(loss, (tensors["cond_image"][:, :1] + 1) / 2)
    torch.testing.assert_close(masked, tensors["loss.l2_masked_cond"], rtol=1e-5, atol=1e-7)


def test_composed_loss_vector():
    tensors, _ = golden.load("loss")
    per_sample = flow.flow_loss(
        tensors["pred"],
        tensors["target"],
        tensors["sigma"],
        FlowSettings(weighting_scheme="cosmap"),
        masks=tensors["alpha_mask"],
        loss_weights=tensors["loss_weights"],
    )
    assert per_sample.shape == (3,)
    total = tensors["total.l2_cosmap_masked_weighted"]
    torch.testing.assert_close(per_sample.mean().view(1), total, rtol=1e-5, atol=0)


def test_five_dimensional_latents_give_the_same_loss():
    tensors, _ = golden.load("loss")
    settings = FlowSettings(loss_type="huber", huber_schedule="exponential")
    arguments = {"masks": tensors["alpha_mask"], "loss_weights": tensors["loss_weights"]}
    prediction, target, sigma = tensors["pred"], tensors["target"], tensors["sigma"]
    flat = flow.flow_loss(prediction, target, sigma, settings, **arguments)
    deep = flow.flow_loss(prediction[:, :, None], target[:, :, None], sigma, settings, **arguments)
    torch.testing.assert_close(flat, deep)


def test_half_precision_predictions_are_reduced_in_float32():
    prediction = torch.full((1, 16, 32, 32), 300.0, dtype=torch.float16)
    loss = flow.flow_loss(
        prediction, torch.zeros_like(prediction), torch.tensor([0.5]), FlowSettings()
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(90_000)


def test_normalised_mask_is_the_mean_over_the_mask():
    d = torch.randn(2, 16, 4, 4)
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, :8, :16] = 1
    settings = FlowSettings(masked_loss_normalize=True)
    loss = flow.flow_loss(d, torch.zeros_like(d), torch.rand(2), settings, masks=mask)
    torch.testing.assert_close(loss, (d[:, :, :1, :2] ** 2).flatten(1).mean(1))
    empty = flow.flow_loss(d, torch.zeros_like(d), torch.rand(2), settings, masks=0 * mask)
    assert empty.tolist() == [0, 0]


def test_exponential_huber_runs_from_one_to_c():
    settings = FlowSettings(
        loss_type="huber", huber_schedule="exponential", huber_c=0.1, huber_scale=2.0
    )
    c = flow.huber_delta(settings, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(c, torch.tensor([2.0, 2 * 0.1**0.5, 0.2]))


def test_snr_schedule_stands_for_constant():
    settings = FlowSettings(loss_type="huber", huber_schedule="snr", huber_c=0.2, huber_scale=3.0)
    c = flow.huber_delta(settings, torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(c, torch.tensor([0.6, 0.6]))


@pytest.mark.parametrize(
    "name", ["timestep_sampling", "weighting_scheme", "loss_type", "huber_schedule"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=name):
        FlowSettings(**{name: "logsnr"})


def test_noisy_latents_and_target_meet_at_both_ends():
    latents, noise = torch.randn(3, 16, 4, 6), torch.randn(3, 16, 4, 6)
    x = flow.noisy_latents(latents, noise, torch.tensor([0.0, 1.0, 0.25]))
    torch.testing.assert_close(x[0], latents[0])
    torch.testing.assert_close(x[1], noise[1])
    # Following the velocity for the rest of the way ends in the noise.
    v = flow.velocity_target(latents, noise)
    torch.testing.assert_close(x[2] + 0.75 * v[2], noise[2])


@pytest.mark.parametrize("random_strength", [False, True])
def test_input_perturbation_changes_the_input_only(random_strength):
    latents, noise = torch.zeros(1, 16, 64, 64), torch.zeros(1, 16, 64, 64)
    settings = FlowSettings(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=random_strength)
    generator = torch.Generator().manual_seed(1)
    x = flow.noisy_latents(latents, noise, torch.ones(1), settings, generator)
    generator.manual_seed(1)
    strength = 0.1 * (torch.rand(1, generator=generator).item() if random_strength else 1)
    assert x.std().item() == pytest.approx(strength, rel=0.02)
    assert flow.velocity_target(latents, noise).abs().max() == 0


@pytest.mark.parametrize("shift", [1, 3, 5])
@pytest.mark.parametrize("steps", [4, 20])
def test_inference_schedules(shift, steps):
    tensors, _ = golden.load("loss")
    expected = tensors[f"schedule.shift{shift}.steps{steps}.sigmas"]
    torch.testing.assert_close(
        flow.inference_sigmas(steps, float(shift)), expected, rtol=1e-5, atol=1e-7
    )


def test_settings_come_from_options_by_name():
    options = types.SimpleNamespace(
        timestep_sampling="shift", discrete_flow_shift=2.5, min_timestep=100, unrelated=1
    )
    settings = FlowSettings.from_options(options)
    assert settings.discrete_flow_shift == 2.5
    assert settings.sigma_range == (0.1, 1.0)
