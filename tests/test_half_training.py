"""`--mixed_precision fp16` on the fused blocks: every way to run them, from options to files."""

import math

import pytest
import torch
from safetensors.torch import load_file
from stack import make_world, records, same_tensors, train_options
from test_block import TWO, make_inputs, make_network
from tiny_dit import dit_weights
from torch import nn

from anima_fast.adapters.lora import merge_lora
from anima_fast.bench.parity import relative_error
from anima_fast.errors import UserError
from anima_fast.kernels import dispatch
from anima_fast.kernels.gemm import gemm
from anima_fast.kernels.row_powers import TAIL
from anima_fast.kernels.sums import CHAINS, use_sums
from anima_fast.memory.offload import SaverSettings, install_block_runner
from anima_fast.models import fused_attention
from anima_fast.models.block import FusedBlockFunction
from anima_fast.models.dit import load_dit
from anima_fast.models.dit_layers import Linear
from anima_fast.models.saturation import Saturation
from anima_fast.options.sample import SampleOptions
from anima_fast.sampling.run import run_sample
from anima_fast.training import events
from anima_fast.training.loop import train
from anima_fast.training.run import FIRST, LossScaler

HALF = {"mixed_precision": "fp16", "kernels": "triton"}
SMALL = "a tree --w 32 --h 32 --s 2"
HUGE = 2.0**14


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), blocks=4)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """For kernels that run interpreted."""
    return make_world(tmp_path_factory.mktemp("small"), blocks=1)


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """The file of a plain run."""
    return trained(world, tmp_path_factory.mktemp("plain"))


def trained(world, folder, **changes):
    return train(train_options(world, folder, **{**HALF, **changes})).output


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute": "block"},
        {"recompute": "mlp"},
        {"recompute": "2"},
        {"cpu_offload_checkpointing": True},
        {"unsloth_offload_checkpointing": True},
        {"blocks_to_swap": 2},
        {"blocks_to_swap": 1, "recompute": "block"},
    ],
    ids=lambda changes: "+".join(f"{name} {value}" for name, value in changes.items()),
)
def test_memory_policies_make_the_same_file(world, plain, tmp_path, changes):
    assert same_tensors(trained(world, tmp_path, **changes), plain)


def test_all_that_goes_on_beside_a_run(world, plain, tmp_path):
    """A running mean and previews leave the network alone."""
    out = trained(
        world, tmp_path, ema_decay=0.9, sample_prompt=(SMALL,), sample_every_n_epochs=1,
        save_every_n_epochs=1,
    )  # fmt: skip
    assert same_tensors(out, plain)
    assert len(list(tmp_path.rglob("*.png"))) == 2 and list(tmp_path.glob("*-ema.safetensors"))


def test_validation_computes_as_training_does(world, tmp_path):
    """Its losses are those of float32 to a few digits, and it changes nothing."""
    given = {"validation_split": 0.4, "validate_every_n_steps": 1, "max_train_epochs": 1}
    out = trained(world, tmp_path / "half", **given)
    given["validate_every_n_steps"] = None
    assert same_tensors(out, trained(world, tmp_path / "seldom", **given))
    given |= {"validate_every_n_steps": 1, "mixed_precision": "no"}
    trained(world, tmp_path / "full", **given)
    half, full = (records(tmp_path / name, "validation") for name in ("half", "full"))
    assert len(half) == len(full) > 1
    for ours, exact in zip(half, full, strict=True):
        assert ours["loss"] == pytest.approx(exact["loss"], rel=2e-3)


def test_what_is_cut_beside_a_step_is_not_counted_in_the_next(world, tmp_path, monkeypatch):
    """Previews and validations tell their own."""

    def validate(run, say, stopped):
        run.dit.saturation.counts[0] = 5

    monkeypatch.setattr(events, "validate_or_skip", validate)
    said = []
    monkeypatch.setattr(Saturation, "tell", spied(Saturation.tell, said))
    trained(world, tmp_path, validation_split=0.4, validate_every_n_steps=1, max_train_epochs=1)
    assert set(said) == {5} and len(said) > 1
    assert not any("saturated" in step for step in records(tmp_path))


def spied(function, results):
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call


def test_a_resumed_run_ends_in_the_same_file(world, plain, tmp_path):
    trained(world, tmp_path, max_train_epochs=1, save_state=True, save_every_n_epochs=1)
    (state,) = tmp_path.glob("*state*")
    again = trained(world, tmp_path / "again", resume=str(state))
    assert same_tensors(again, plain)


KINDS = {
    "loha": {"network_module": "networks.loha"},
    "lokr": {"network_module": "networks.lokr", "network_args": ("factor=4",)},
    "dora": {"network_args": ("dora_wd=True",)},
    "dropout": {"network_dropout": 0.2},
    "tlora": {"tlora_min_rank": 1},
    "llm adapter": {"network_args": ("train_llm_adapter=True",)},
    "text encoder": {"cache_text_encoder_outputs": False, "text_encoder_lr": (0.1,)},
    "adaln": {"network_args": ("include_patterns=['.*adaln.*', '.*proj']",)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_learns_what_it_does_in_float32(world, tmp_path, kind):
    given = {**KINDS[kind], "optimizer_type": "SGD", "learning_rate": 0.1, "max_grad_norm": 0.0}
    half = load_file(trained(world, tmp_path / "half", **given))
    full = load_file(trained(world, tmp_path / "full", **given, mixed_precision="no"))
    bf16 = load_file(trained(world, tmp_path / "bf16", **given, mixed_precision="bf16"))
    flat = [torch.cat([t[name].float().flatten() for name in full]) for t in (half, bf16, full)]
    errors = [relative_error(found, flat[2]) for found in flat[:2]]
    assert errors[0] < errors[1] / 3, errors


def half_dit(weights=None, *, attn_mode="torch", **options):
    dit = load_dit(weights or dit_weights(TWO), dtype=torch.float16, attn_mode=attn_mode)
    network = make_network(dit)
    install_block_runner(dit, SaverSettings(**options), fused=True)
    return dit, network


def gradients(dit, network, scale=1.0):
    """Flat gradients of the mean square of an error, times a scale."""
    inputs = make_inputs()
    network.zero_grad_flat()
    out = dit(inputs["latents"].to(dit.dtype), inputs["sigma"], inputs["context"].to(dit.dtype))
    ((out.float() - inputs["target"]).square().mean() * scale).backward()
    return network.flat_grad.clone()


def test_the_residual_stream_has_sixteen_bits(monkeypatch):
    """What is kept between forward and backward, and handed from block to block."""
    dit, _ = half_dit(recompute="block")
    seen = []
    real = FusedBlockFunction.apply

    def apply(settings, names, *tensors):
        seen.append(tensors[0])
        out = real(settings, names, *tensors)
        out.register_hook(lambda gradient: seen.append(gradient))
        return out

    monkeypatch.setattr(FusedBlockFunction, "apply", apply)
    inputs = make_inputs()
    out = dit(inputs["latents"].half(), inputs["sigma"], inputs["context"].half())
    out.square().mean().backward()
    assert len(seen) == 4
    for x in seen:
        assert x.dtype == torch.float16 and x.shape[-1] == TWO.model_channels + TAIL


def test_a_residual_stream_beyond_float16(monkeypatch):
    """Latents that make rows of millions: gradients as in float32."""
    weights = dit_weights(TWO)
    weights["x_embedder.proj.1.weight"] *= 1e3
    for name in weights:
        if "adaln_modulation" in name and name.endswith(".2.weight"):
            weights[name] *= 30
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        dit = load_dit(weights, dtype=dtype)
        network = make_network(dit)
        install_block_runner(dit, SaverSettings(), fused=True)
        found.append(gradients(dit, network, 1e3))
    exact, half, bf16 = found
    assert relative_error(half, exact) < relative_error(bf16, exact) / 3


def test_the_first_scale_is_that_of_the_largest_gradient():
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    scaler = LossScaler("cpu", enabled=True)
    with scaler.first_backward(layer):
        loss = layer(x).square().mean() * 1e-6
        scaler.backward(loss)
    assert FIRST / 2 < x.grad.abs().max() <= FIRST
    scale = scaler.get_scale()
    assert math.log2(scale) % 1 == 0
    with scaler.first_backward(layer):
        scaler.backward(layer(x).square().mean() * 1e-9)
    assert scaler.get_scale() == scale
    resumed = LossScaler("cpu", enabled=True)
    resumed.load_state_dict({**scaler.state_dict(), "scale": 64.0})
    with resumed.first_backward(layer):
        resumed.backward(layer(x).square().mean())
    assert resumed.get_scale() == 64.0


def test_tiny_gradients_need_the_loss_scale():
    """Of 1e-9 float16 holds nothing, of the scaled ones everything."""
    exact_dit = load_dit(dit_weights(TWO), dtype=torch.float32)
    exact = gradients(exact_dit, make_network(exact_dit), 1e-7)
    dit, network = half_dit()
    plain = gradients(dit, network, 1e-7)
    scaler = LossScaler("cpu", enabled=True)
    network.zero_grad_flat()
    inputs = make_inputs()
    with scaler.first_backward(dit.final_layer):
        out = dit(inputs["latents"].half(), inputs["sigma"], inputs["context"].half())
        scaler.backward((out.float() - inputs["target"]).square().mean() * 1e-7)
    scaled = network.flat_grad / scaler.get_scale()
    assert relative_error(scaled, exact) < 5e-3 < relative_error(plain, exact)


def saturating(layer="blocks.1.mlp.layer1.weight"):
    weights = dit_weights(TWO)
    weights[layer] = weights[layer] * HUGE
    return weights


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_what_float16_cannot_hold_is_cut_counted_and_named(recompute):
    dit, _ = half_dit(saturating(), attn_mode="triton", recompute=recompute)
    inputs = make_inputs(batch=1, height=4, width=4)
    with dispatch.use("triton"), torch.no_grad():
        out = dit(inputs["latents"].half(), inputs["sigma"], inputs["context"].half())
    assert out.isfinite().all()
    assert dit.saturation.total() > 0
    said = []
    assert dit.saturation.tell(said.append) > 0
    (line,) = said
    assert "results of blocks.1.mlp.layer1, they were cut at 65504" in line and "bf16" in line
    # Told once; counted each time.
    assert dit.saturation.total() == 0 and dit.saturation.tell(said.append) == 0
    dit.saturation.counts[dit.saturation.names.index("blocks.1.mlp.layer1")] += 3
    assert dit.saturation.tell(said.append) == 3 and len(said) == 1


@pytest.mark.parametrize("chain", CHAINS)
def test_the_sum_is_cut_not_its_parts(chain):
    """Few tiles are split along K where no count is kept; a part may exceed what the sum is."""
    counts = torch.zeros(3, dtype=torch.int32)
    x, w = torch.full((2, 2048), 8.0).half(), torch.full((3, 2048), 5.0).half()
    with dispatch.use("triton"):
        y = gemm(x, w, counter=(counts, 1), chain=chain)
        x[:, 1024:] *= -1
        zero = gemm(4 * x, w, counter=(counts, 2), chain=chain)
    assert (y == 65504).all() and counts.tolist() == [0, 6, 0] and (zero == 0).all()


def saturating_file(world, folder):
    from safetensors.torch import save_file

    tensors = load_file(world["pretrained_model_name_or_path"])
    (name,) = (n for n in tensors if n.endswith("blocks.0.mlp.layer1.weight"))
    tensors[name] = tensors[name] * HUGE
    changed = folder / "dit.safetensors"
    save_file(tensors, changed)
    return changed


def test_sampling_tells_what_float16_cannot_hold(small_world, tmp_path, capsys):
    world = small_world
    dit = str(saturating_file(world, tmp_path))
    options = SampleOptions(
        dit=dit, qwen3=world["qwen3"], vae=world["vae"], prompt="a tree", width=32, height=32,
        steps=1, cfg=1.0, dtype="fp16", kernels="triton", output=str(tmp_path / "a.png"),
    )  # fmt: skip
    with dispatch.use("triton"):
        run_sample(options)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("blocks.0.mlp.layer1, they were cut at 65504: use --dtype bf16") == 1


def test_a_run_tells_what_float16_cannot_hold(small_world, tmp_path, capsys):
    changed = saturating_file(small_world, tmp_path)
    # Gradients of such a layer overflow: the scale is lowered, and no step was made.
    with dispatch.use("triton"), pytest.raises(UserError, match="nothing is saved"):
        trained(
            {**small_world, "pretrained_model_name_or_path": str(changed)}, tmp_path / "out",
            max_train_steps=1, max_train_epochs=None,
        )  # fmt: skip
    said = capsys.readouterr().err
    assert said.count("blocks.0.mlp.layer1, they were cut at 65504") == 1
    (step,) = records(tmp_path / "out")
    assert step["saturated"] > 0


LARGE = ["self_attn.k_proj", "cross_attn.v_proj", "cross_attn.output_proj", "mlp.layer1"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [20.0, 1e-6])
def test_weights_outside_of_float16_have_a_power_of_two(fused, size):
    """Stored once, in float16, divided by it; layers of one product share it."""
    weights = dit_weights(TWO)
    for name in LARGE:
        key = f"blocks.0.{name}.weight"
        weights[key] = weights[key] * size
    found = []
    for dtype in (torch.float32, torch.float16):
        dit = load_dit(weights, dtype=dtype)
        network = make_network(dit)
        if fused:
            install_block_runner(dit, SaverSettings(), fused=True)
        found.append(gradients(dit, network, 100.0))
    assert relative_error(found[1], found[0]) < 5e-3
    attention = dit.blocks[0].self_attn
    scales = {attention.q_proj.weight_scale, attention.k_proj.weight_scale}
    assert len(scales) == 1 and (scales != {1.0}) == (size > 1)
    assert 0 < attention.k_proj.weight.abs().max() <= 1
    assert attention.k_proj.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_weight_of_8_bit_is_held_exactly(dtype):
    layer, weight = Linear(16, 8), (torch.randn(8, 16) * 30).to(dtype)
    held = layer.hold(weight, torch.float16)
    assert held.abs().max() <= 1
    assert torch.equal(held.float() * layer.weight_scale, weight.float())


def test_a_weight_that_float16_cannot_hold():
    layer = Linear(32, 16)
    weight, x = torch.randn(16, 32) * 1e6, torch.randn(4, 32) * 1e-4
    layer.weight = nn.Parameter(layer.hold(weight, torch.float16))
    assert layer.weight.dtype == torch.float16
    torch.testing.assert_close(layer(x.half()).float(), x @ weight.T, rtol=1e-2, atol=0.5)
    layer.weight = nn.Parameter(layer.hold(weight, torch.bfloat16))
    assert layer.weight_scale == 1.0


def test_merging_and_magnitudes_read_the_weight_as_it_computes(tmp_path):
    from anima_fast.adapters.lycoris import initial_magnitudes

    weights = dit_weights(TWO)
    key = "blocks.0.mlp.layer1.weight"
    weights[key] = weights[key] * 1e6
    dit = load_dit(weights, dtype=torch.float16)
    layer = dit.blocks[0].mlp.layer1
    norms = weights[key].norm(dim=1, keepdim=True)
    torch.testing.assert_close(initial_magnitudes(layer), norms, rtol=1e-3, atol=0)
    network = make_network(load_dit(weights, dtype=torch.float32))
    network.save(tmp_path / "lora.safetensors", dtype=torch.float32)
    before = layer.weight.float() * layer.weight_scale
    merge_lora(dit, tmp_path / "lora.safetensors", 1e5)
    change = layer.weight.float() * layer.weight_scale - before
    adapter = network.modules_by_name["blocks.0.mlp.layer1"]
    right = 1e5 * adapter.scale * adapter.up @ adapter.down
    assert relative_error(change, right.detach()) < 0.05


def test_short_sums_run_in_our_own_attention():
    q, k = torch.randn(1, 8, 2, 32).half(), torch.randn(1, 5, 2, 32).half()
    with dispatch.use("triton"):
        assert fused_attention.backend(q, k, k, "torch") == "flash"
        with use_sums(64):
            assert fused_attention.backend(q, k, k, "torch") == "own"
            assert fused_attention.backend(q.bfloat16(), k, k, "torch") == "flash"
            assert fused_attention.backend(q, k, k, "flash") == "graph"


def test_graphs_replay_what_plain_steps_compute():
    from test_block_graphs import Recorder, batch_of, make_dit, step, zero_keys_of

    recorder = Recorder()
    plain, recorded = make_dit(dtype=torch.float16), make_dit(recorder, dtype=torch.float16)
    for seed in range(4):
        found = [step(*one, batch_of(seed), zero_keys_of(5)) for one in (plain, recorded)]
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, rtol=2e-2, atol=1e-4)
    assert recorder.recordings == 1 and recorded[0].graphs.replayed
