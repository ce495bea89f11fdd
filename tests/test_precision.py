"""The emulated step and that of the kernels are the DiT's own; full width; the command."""

import dataclasses
import json
import math
from functools import partial
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
from anima_fast.bench.interpreter import interpreting
from anima_fast.bench.kernel_pass import KernelPass, kernel_product
from anima_fast.bench.precision import DitFile, EmulatedPass, Sample, compare, random_sample
from anima_fast.cli import app
from anima_fast.kernels import lora_linear
from anima_fast.measure.probe import Probe, probe
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


def step_of(make, model, sample, way):
    """The same block after block, and the pass that made it."""
    one = make(model, model.head(), sample, way)
    blocks = range(model.config.num_blocks)
    for index in blocks:
        one.forward(index, model.block(index))
    one.finish(1.0)
    return one, {
        f"blocks.{index}.{name}": factors
        for index in reversed(blocks)
        for name, factors in one.backward(index, model.block(index)).items()
    }


@pytest.mark.parametrize("make", [EmulatedPass, partial(KernelPass, device=torch.device("cpu"))])
def test_a_step_block_after_block_is_that_of_the_dit(tiny, make):
    model, sample = tiny
    velocity, gradients = eager_step(model, sample, torch.float32)
    one, own = step_of(make, model, sample, FLOAT32)
    found, expected = one.velocity, precision.as_patches(velocity)
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


@pytest.mark.skipif(not interpreting(), reason="a card has its own device and memory")
def test_kernels_make_the_rows_of_the_emulation(monkeypatch):
    """Two fused blocks on four tokens, interpreted, one after the other."""
    model = DitFile(dit_weights(dataclasses.replace(TINY, num_blocks=2)))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 4, 4, generator=generator)
    context = torch.randn(1, 3, TINY.context_dim, generator=generator)
    sample = Sample.of(latents, context, (509,), "")
    bf16, full, short = compare(model, sample)
    seen, gemm = [], lora_linear.gemm
    monkeypatch.setattr(
        lora_linear,
        "gemm",
        lambda *rest, **o: (seen.append(o.get("chain", 0)), gemm(*rest, **o))[1],
    )
    make = partial(KernelPass, device=torch.device("cpu"))
    (row,) = compare(model, sample, (FP16_SHORT,), make=make)
    # Products of layers and the narrow ones of adapters.
    assert set(seen) == {0, 64}
    assert row.precision == "fp16-short" and row.saturated == 0
    assert 0.3 * full.one_minus_cosine < row.one_minus_cosine < bf16.one_minus_cosine / 50
    assert 0.5 * short.velocity < row.velocity < 2 * short.velocity


def test_the_probe_of_the_product_kernel():
    """Interpreted, the kernel rounds as the emulation does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = probe(kernel_product, 64, device)
    assert found.accepted
    if interpreting():
        assert found.error == pytest.approx(3.9e-4, rel=0.05)


def test_values_beyond_float16_are_counted(tiny):
    model, sample = tiny
    tensors = dit_weights()
    name = "blocks.1.mlp.layer1.weight"
    # GELU of 10⁵ and more is beyond in about half of the hidden values.
    loud = DitFile(tensors | {name: tensors[name] * 1e6})
    quiet, bf16, full = (
        *compare(model, sample, (FP16_FULL,)),
        *compare(loud, sample, (BF16, FP16_FULL)),
    )
    assert quiet.saturated == bf16.saturated == 0 and full.saturated > 1000
    text = precision_command.as_text([bf16, full])
    assert f"fp16-full: {full.saturated} values are beyond 65504, use bf16" in text
    assert "bf16: " not in text
    assert "beyond" not in precision_command.as_text([quiet])


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
    check(command("--dit", dit, "--device", "cuda:99"), "--device cuda")
    monkeypatch.setattr(precision_command, "host_free", lambda: 2**20)
    check(command("--dit", dit), "of memory and 0.0 GiB are free")
    check(CliRunner().invoke(app, ["parity", "--quick", "precision", "--dit", dit]), "drop them")


def check(done, expected):
    assert done.exit_code == 2 and done.output.count("\n") == 1, done.output
    assert done.output.startswith("error: ") and expected in done.output


def test_short_sums_are_left_out_where_the_probe_refuses_them():
    assert [way.name for way in precision_command.ways_with(0)] == ["bf16", "fp16-full"]
    assert precision_command.ways_with(32)[2].sums.chain == 32
    # Before capability 8.0.
    ways = precision_command.ways_with(64, bf16=False)
    assert [way.name for way in ways] == ["fp16-full", "fp16-short"]


class Card:
    """What `parity precision` asks of a CUDA device."""

    type = "cuda"


@pytest.fixture
def card(monkeypatch):
    """A device that there is not: what it would compute is recorded."""
    seen = []
    for name, value in {
        "choose_device": lambda name: Card(),
        "uses_fused_blocks": lambda kernels, device: kernels != "eager" and device.type == "cuda",
        "has_bf16": lambda device: True,
        "place": lambda device: "a card",
        "device_free": lambda device: 2**30,
        "probe": lambda multiply, chain, device: Probe(chain, 4e-4, 0.0, 1.6e-3),
        "compare": lambda *given: seen.append(given[-1]) or [],
    }.items():
        monkeypatch.setattr(precision_command, name, value)
    return seen


def test_a_card_runs_the_kernels(world, card, monkeypatch):
    dit = world["pretrained_model_name_or_path"]
    found = json.loads(command("--dit", dit, "--tokens", 4, "--json").output)
    assert found["emulated"] is False and card[0].func is KernelPass
    assert "by the kernels on a card" in command("--dit", dit, "--tokens", 4).output
    done = command("--dit", dit, "--tokens", 4, "--kernels", "eager", "--json")
    assert json.loads(done.output)["emulated"] is True and card[2] is EmulatedPass
    monkeypatch.setattr(precision_command, "device_free", lambda device: 2**20)
    check(command("--dit", dit, "--tokens", 4), "of GPU memory and 0.0 GiB are free")


@pytest.mark.gpu
def test_the_command_on_a_card(world):
    found = json.loads(command("--dit", world["pretrained_model_name_or_path"], "--json").output)
    assert found["emulated"] is False
    rows = {row["precision"]: row for row in found["rows"]}
    for name in rows.keys() - {"bf16"}:
        assert rows[name]["one_minus_cosine"] < rows["bf16"]["one_minus_cosine"] / 20
        assert math.isfinite(rows[name]["velocity"])


def test_what_is_not_finite_is_null(tiny):
    model, sample = tiny
    nothing = float("nan")
    row = precision.Row("fp16-full", nothing, nothing, "blocks.0.mlp.layer1", nothing, 0.5)
    found = json.loads(precision_command.as_object([row], model, sample, 64, ""))["rows"][0]
    assert found["cosine"] is None and found["velocity"] == 0.5 and found["saturated"] is None
    assert "fp16-full: not finite" in precision_command.as_text([row])
