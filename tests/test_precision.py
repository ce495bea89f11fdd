"""The emulated step is the DiT's own; short sums against bf16 at full width; the command."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from profile_dit import WIDE, profile_weights
from safetensors.torch import load_file, save_file
from stack import make_world
from tiny_dit import TINY, dit_weights
from typer.testing import CliRunner

from anima_fast.adapters.lora import add_lora
from anima_fast.bench import precision, precision_command
from anima_fast.bench.emulated import BF16, FLOAT32, FP16_FULL, FP16_SHORT, Sums
from anima_fast.bench.precision import DitFile, Sample, compare, random_sample
from anima_fast.cli import app
from anima_fast.models.dit import load_dit


@pytest.fixture(scope="module")
def tiny():
    """A DiT of three blocks and an input whose samples have different zero rows."""
    model = DitFile(dit_weights())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 8, 12, generator=generator)
    context = torch.randn(2, 5, TINY.context_dim, generator=generator)
    context[1, 3:] = 0
    return model, Sample.of(latents, context, (507, -2), "")


def eager_step(model, sample, dtype):
    """Velocity and adapters' gradients of the DiT as it is defined."""
    dit = load_dit(dit_weights(), dtype=dtype)
    network = add_lora(dit, rank=precision.RANK, alpha=precision.RANK, seed=0)
    for name, adapter in network.modules_by_name.items():
        _, index, layer = name.split(".", 2)
        given = model.adapters(int(index))[layer]
        adapter.down.data.copy_(given.down)
        adapter.up.data.copy_(given.up)
    velocity = dit(sample.latents, sample.sigma, sample.context, zero_keys=sample.zero_rows)
    # As a loss scale does; a cosine does not see it.
    (1024 * (velocity.float() - sample.target).square().mean()).backward()
    return velocity.detach().float(), {
        name: (adapter.down.grad / 1024, adapter.up.grad / 1024)
        for name, adapter in network.modules_by_name.items()
    }


def emulated_step(model, sample, way, monkeypatch):
    """The same of `compare`, by spying on what it adds up."""
    gradients = {}
    add = precision.Agreement.add

    def spy(self, layer, own, exact):
        gradients[layer] = own
        add(self, layer, own, exact)

    monkeypatch.setattr(precision.Agreement, "add", spy)
    passes = []
    end = precision._end
    monkeypatch.setattr(precision, "_end", lambda one, *rest: (end(one, *rest), passes.append(one)))
    # The last is the one that is asked for.
    compare(model, sample, (way,))
    return passes[-1].velocity, gradients


def test_the_emulated_step_is_that_of_the_dit(tiny, monkeypatch):
    model, sample = tiny
    velocity, gradients = eager_step(model, sample, torch.float32)
    found, own = emulated_step(model, sample, FLOAT32, monkeypatch)
    expected = precision._as_patches(velocity)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert own.keys() == gradients.keys() and len(own) == 30
    for name, factors in gradients.items():
        for a, b in zip(own[name], factors, strict=True):
            assert (a - b).norm() < 2e-5 * b.norm(), name


@pytest.mark.parametrize(
    "way, dtype",
    [(BF16, torch.bfloat16), (dataclasses.replace(FP16_FULL, residual="float32"), torch.float16)],
)
def test_emulated_16_bit_errs_as_the_dit_in_16_bit(tiny, way, dtype):
    model, sample = tiny
    exact, exact_gradients = eager_step(model, sample, torch.float32)
    velocity, gradients = eager_step(model, sample, dtype)
    (row,) = compare(model, sample, (way,))
    eager = (velocity - exact).norm() / exact.norm()
    assert 0.5 < row.velocity / eager < 1.5
    agreement = precision.Agreement()
    for name, factors in gradients.items():
        agreement.add(name, factors, exact_gradients[name])
    assert 0.3 < row.one_minus_cosine / (1 - agreement.cosine) < 2


def test_a_row_finds_the_layer_that_agrees_least():
    agreement = precision.Agreement()
    one = torch.ones(4)
    agreement.add("good", (one, one), (one, one))
    agreement.add("bad", (one, -one), (one, 0.5 * one))
    assert agreement.worst_layer == "bad"
    assert agreement.worst == pytest.approx(2 / (8 * 5) ** 0.5)
    assert agreement.cosine == pytest.approx((8 + 2) / (16 * 13) ** 0.5)
    agreement.add("none", (one * float("nan"),), (one,))
    assert agreement.worst_layer == "none" and agreement.cosine != agreement.cosine


@pytest.mark.slow
def test_short_sums_at_full_width():
    """Two blocks with the published profile, the residual stream in 16 bit."""
    sample = random_sample(WIDE, 64)
    one = {name: getattr(sample, name)[:1] for name in ("latents", "sigma", "target", "context")}
    sample = dataclasses.replace(sample, **one, zero_rows=sample.zero_rows[:1])
    given = {name: one[name] for name in ("latents", "sigma", "context")}
    weights = profile_weights(given | {"zero_keys": sample.zero_rows[0]})
    ways = (
        BF16,
        FP16_SHORT,
        dataclasses.replace(FP16_SHORT, name="whole", sums=Sums(2048)),
        # One product of a head's 128 numbers, as a kernel would make it.
        dataclasses.replace(FP16_SHORT, name="logits", logits=Sums(128)),
    )
    bf16, short, whole, logits = (
        row.one_minus_cosine for row in compare(DitFile(weights), sample, ways)
    )
    assert short < bf16 / 20
    # What the bound is for: sums of all K miss it, and the logits' sums show.
    assert whole > bf16 / 20
    assert logits > 1.3 * short


def test_the_loss_scale_keeps_gradients_in_the_range_of_float16(tiny, monkeypatch):
    model, sample = tiny
    small = dataclasses.replace(sample, target=sample.target * 1e4)
    (row,) = compare(model, small, (FP16_SHORT,))
    assert row.one_minus_cosine < 1e-5
    monkeypatch.setattr(precision, "LARGEST_GRADIENT", 2.0**-18)
    (row,) = compare(model, small, (FP16_SHORT,))
    assert row.one_minus_cosine > 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def command(*words):
    return CliRunner().invoke(app, ["parity", "precision", *map(str, words)])


def test_the_command_prints_a_table_or_rows(world):
    dit = world["pretrained_model_name_or_path"]
    done = command("--dit", dit, "--tokens", 20)
    assert done.exit_code == 0, done.output
    assert "emulated on the CPU" in done.output and "2 samples of 16 tokens" in done.output
    assert "sums of 64 terms" in done.output
    found = json.loads(command("--dit", dit, "--tokens", 20, "--json").output)
    assert [row["precision"] for row in found["rows"]] == ["bf16", "fp16-full", "fp16-short"]
    bf16, full, short = found["rows"]
    for row in (full, short):
        assert bf16["cosine"] < row["cosine"] < 1 and 0 < row["velocity"] < bf16["velocity"]
        assert row["worst_layer"].startswith("blocks.")


def test_the_command_takes_the_data_of_a_run(world, monkeypatch):
    seen = []
    monkeypatch.setattr(precision_command, "compare", lambda m, s, *rest: seen.append(s) or [])
    words = [word for name, value in world.items() for word in (f"--{name}", value)]
    done = command(*words, "--tokens", 7)
    assert done.exit_code == 0, done.output
    (sample,) = seen
    assert sample.latents.shape == (2, 16, 4, 4)
    assert "the middle of image0.png, image1.png" in done.output
    assert len(sample.context) == 2 and all(0 < n < 512 for n in sample.zero_rows)
    # Latents and captions are those of the caches that training fills and reads.
    folder = Path(world["dataset_config"]).parent / "images" / ".anima_cache"
    (file,) = folder.glob("image0-*.latents.safetensors")
    middle = load_file(file)["latents"][:, 2:6, 2:6]
    clean = sample.latents[0] - sample.sigma[0] * sample.target[0]
    torch.testing.assert_close(clean, middle)
    done = command(*words, "--tokens", 7)
    assert "encoding" not in done.output and torch.equal(seen[1].latents, seen[0].latents)


@pytest.mark.parametrize(
    "tokens, expected", [(1, (1, 1)), (6, (3, 2)), (24, (6, 4)), (23, (5, 3)), (1000, (6, 4))]
)
def test_what_is_too_large_is_cut_around_the_middle(tokens, expected):
    latents = torch.arange(96.0).view(1, 1, 12, 8)
    found = precision_command.cut(latents, tokens)
    assert found.shape == (1, 1, 2 * expected[0], 2 * expected[1])
    assert abs(found.mean() - latents.mean()) <= 9


def test_bad_input_is_one_line(world, tmp_path, monkeypatch):
    dit = world["pretrained_model_name_or_path"]
    other, half = tmp_path / "other.safetensors", tmp_path / "half.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    tensors = load_file(dit)
    tensors.pop("net.blocks.1.mlp.layer2.weight")
    save_file(tensors, half)
    cases = {
        (): "--dit is required",
        ("--dit", tmp_path / "none.safetensors"): "does not exist",
        ("--dit", other): "is not an Anima DiT",
        ("--dit", half): "1 tensors missing (blocks.1.mlp.layer2.weight)",
        ("--dit", dit, "--tokens", 0): "--tokens",
        ("--dit", dit, "--precision", "bf16"): "unknown option",
        ("--dit", dit, "--dataset_config", world["dataset_config"]): "--qwen3 is required",
    }
    for words, expected in cases.items():
        check(command(*words), expected)
    monkeypatch.setattr(precision_command, "host_free", lambda: 2**20)
    check(command("--dit", dit), "of memory and 0.0 GiB are free")
    check(CliRunner().invoke(app, ["parity", "--quick", "precision", "--dit", dit]), "drop them")


def check(done, expected):
    assert done.exit_code == 2 and done.output.count("\n") == 1, done.output
    assert done.output.startswith("error: ") and expected in done.output


def test_short_sums_are_left_out_where_the_probe_refuses_them():
    assert [way.name for way in precision_command.ways_with(0)] == ["bf16", "fp16-full"]
    assert precision_command.ways_with(32)[2].sums.chain == 32


def test_what_is_not_finite_is_null(tiny):
    model, sample = tiny
    nothing = float("nan")
    row = precision.Row("fp16-full", nothing, nothing, "blocks.0.mlp.layer1", nothing, 0.5)
    found = json.loads(precision_command.as_object([row], model, sample, 64))["rows"][0]
    assert found["cosine"] is None and found["velocity"] == 0.5
    assert "fp16-full: not finite" in precision_command.as_text([row])
