"""The prediction of a LoRA's memory: bytes of a tiny run, counted units, and the commands."""

import dataclasses
import json
import math
import struct
import types
import weakref
from pathlib import Path

import pytest
import torch
from stack import make_world, train_options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.memory.kept import FusedAttention
from anima_fast.memory.lora import DECODE_UNITS, ENCODE_UNITS, fused_block, published_step
from anima_fast.memory.plan import CPU_PROGRAM_BYTES, GIB, LargestBatch
from anima_fast.models.vae import VAE
from anima_fast.training.planning import (
    check_memory,
    largest_batch,
    lora_needs,
    memory_needs,
    show_memory,
)
from anima_fast.training.setup import prepare
from anima_fast.training.step import micro_step

CPU = torch.device("cpu")
BATCH_OF_TWO = LargestBatch(2, 16, rows=33, words=17)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


CASES = {
    "fp32": {},
    "bf16": {"mixed_precision": "bf16"},
    "fp16": {"mixed_precision": "fp16"},
    "adapters in 16 bit": {"full_bf16": True},
    "running mean": {"ema_decay": 0.9},
    "AdaFactor": {"optimizer_type": "AdaFactor"},
    "8 bit": {"optimizer_type": "AdamW8bit"},
    "LoHa": {"network_module": "networks.loha"},
    "LoKr": {"network_module": "networks.lokr"},
    "DoRA": {"network_args": ("dora_wd=True",)},
    "dropout": {"network_dropout": 0.1},
    "upper blocks": {"network_args": ("train_block_indices=1",)},
    "some layers": {
        "network_args": ("exclude_patterns=['.*mlp.*']", "network_reg_dims=.*q_proj=8"),
    },
    "one block recomputed": {"recompute": "1"},
    "LLM adapter": {"network_args": ("train_llm_adapter=True",)},
    "text encoder": {"cache_text_encoder_outputs": False, "network_train_unet_only": False},
    "live images": {"cache_latents": False},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_those_of_a_run(world, tmp_path, case):
    """Weights, adapters, gradients and state exactly; what is kept for backward within 1 %."""
    options = train_options(world, tmp_path, **CASES[case])
    run = prepare(options, seed=7, say=lambda text: None)
    kept = kept_bytes(run, options)
    run.training.optimizer.step()
    need = memory_needs(options, run.plan, CPU)(options)
    assert need["weights"] == parameter_bytes(run.dit)
    assert need["parameters"] == run.training.network.flat.nbytes
    assert need["gradients"] == run.training.network.flat_grad.nbytes
    states = [v for state in run.training.optimizer.state.values() for v in state.values()]
    assert need["state"] == sum(v.nbytes for v in states if isinstance(v, torch.Tensor))
    assert need["mean"] == (run.training.ema.mean.nbytes if run.training.ema else 0)
    models = (run.vae, run.conditioning.adapter, run.conditioning.text_encoder)
    assert need["other"] == sum(parameter_bytes(m) for m in models if m is not None)
    assert need["activations"] == pytest.approx(kept, rel=0.01)


def parameter_bytes(module):
    return sum(p.nbytes for p in module.parameters())


def kept_bytes(run, options):
    """What autograd keeps of the largest batch, whose backward is then run."""
    text = (run.conditioning.adapter, run.conditioning.text_encoder)
    models = [run.dit, run.training.network, *(model for model in text if model is not None)]
    own = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    alive = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive[storage.data_ptr()] = storage.nbytes()
        return tensor

    order = run.plan.epoch_batches(1, run.seed)
    largest = largest_batch(run.plan)
    items = next(b for b in order if tokens(run.plan.items[b[0]], b) == largest)
    batch = run.batches.load(items, epoch=1, step=0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = micro_step(run, batch, step=0, micro=0).mean()
    loss.backward()
    return sum(alive.values())


def tokens(item, batch):
    return LargestBatch(len(batch), (item.bucket[0] // 16) * (item.bucket[1] // 16))


def test_a_recomputed_block_keeps_its_input(world, tmp_path):
    options = train_options(world, tmp_path)
    needs, unit = lora_needs(options, BATCH_OF_TWO, CPU), 2 * 16 * 64 * 4
    first, second = needs.eager.blocks
    assert needs.unit == unit and second > first > 10 * unit
    plain, all_blocks, one, offloaded = (
        needs(dataclasses.replace(options, **change))
        for change in (
            {}, {"recompute": "block"}, {"recompute": "1"}, {"cpu_offload_checkpointing": True},
        )
    )  # fmt: skip
    assert plain["activations"] - one["activations"] == first - unit
    assert plain["activations"] - all_blocks["activations"] == first + second - 2 * unit
    # What is computed again is there in one block's backward.
    assert one["workspace"] == plain["workspace"] + first - unit
    assert all_blocks["workspace"] == plain["workspace"] + second - unit
    assert all_blocks["activations"] - offloaded["activations"] == 2 * unit
    assert offloaded.host == all_blocks.host + 2 * unit


def needs_of(world, folder, **changes):
    options = train_options(world, folder, **changes)
    return lora_needs(options, BATCH_OF_TWO, CPU)(options)


def test_block_swap_moves_frozen_weights_to_the_host(tmp_path):
    world = make_world(tmp_path, blocks=6)
    plain, swapped = (needs_of(world, tmp_path, blocks_to_swap=n) for n in (0, 4))
    block = (swapped.host - CPU_PROGRAM_BYTES) // 4
    # Two of them visit the device.
    assert plain["weights"] - swapped["weights"] == 2 * block
    assert swapped["activations"] < plain["activations"]


def test_phases(world, tmp_path):
    cached = needs_of(world, tmp_path, sample_prompt="a cat", sample_every_n_epochs=1)
    assert list(cached.stages()) == [
        "encoding images", "encoding captions", "training", "previews",
    ]  # fmt: skip
    live = needs_of(
        world, tmp_path, cache_latents=False, cache_text_encoder_outputs=False,
        network_train_unet_only=True,
    )  # fmt: skip
    assert list(live.stages()) == ["training"]
    assert live["other"] > cached["other"] == 0 and live["encode"] > 0


class Meter(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("method", "units"), [("encode", ENCODE_UNITS), ("decode", DECODE_UNITS)])
def test_maps_of_the_vae(method, units):
    """At the published width, without values."""
    with torch.device("meta"):
        vae = VAE().requires_grad_(False)
    shape = (1, 3, 512, 512) if method == "encode" else (1, 16, 64, 64)
    with torch.no_grad(), FusedAttention(), Meter() as meter:
        getattr(vae, method)(torch.empty(shape, device="meta"))
    assert meter.peak == pytest.approx(units * 96 * 512 * 512 * 4, rel=0.01)


def test_fused_blocks():
    """Units of the compute dtype."""
    for policy, kept, again in (("none", 13.53, 0), ("mlp", 9.51, 4.02), ("block", 1.18, 12.35)):
        block = fused_block(policy, 100)
        assert (block.kept, block.again) == pytest.approx((100 * kept, 100 * again))
    for policy, kept in (("none", 16.53), ("mlp", 12.51), ("block", 1.18)):
        assert fused_block(policy, 1, more=3).kept == pytest.approx(kept)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Options of the published sizes: files with names and shapes, and holes instead of numbers."""
    folder = tmp_path_factory.mktemp("published")
    stack = make_world(folder / "small")
    keys = Path(__file__).parent / "golden" / "keys_dit.json"
    shapes = {f"net.{n}": s for n, s in json.loads(keys.read_text(encoding="utf-8")).items()}
    dit = write_holes(folder / "dit.safetensors", shapes)
    return {**stack, "pretrained_model_name_or_path": dit}


def write_holes(path, shapes):
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return str(path)


def large(published, **changes):
    # As on a card: `--vram` plans for one.
    values = {"vram": 24.0, "network_dim": 32, "device": None, "mixed_precision": "bf16"}
    return train_options(published, Path("out"), **values | changes)


BATCH = LargestBatch(1, 4096, rows=96, words=96)


@pytest.mark.parametrize("policy", ["none", "mlp", "block"])
def test_the_plan_of_a_card_is_what_bench_model_says(published, policy):
    options = large(published, recompute=policy)
    need, step = lora_needs(options, BATCH, CPU)(options), published_step(policy, tokens=4096)
    for key in ("weights", "parameters", "gradients", "activations", "workspace"):
        assert need[key] == step[key], key
    assert need["state"] == pytest.approx(step["state"], abs=64)
    assert need.stages()["training"] == pytest.approx(step.device, abs=64)


def test_eager_blocks_are_counted_at_the_real_width(published):
    """30.5 units of the eager block at L = 1024, S = 96, rank 32 (docs/performance.md)."""
    options = large(published, kernels="eager")
    needs = lora_needs(options, LargestBatch(1, 1024, rows=96, words=96), CPU)
    assert needs.eager.blocks[1] / needs.unit == pytest.approx(30.5, abs=0.3)
    assert len(set(needs.eager.blocks)) <= 2


def test_longer_captions_adaln_and_graphs_take_more(published):
    base = large(published)
    plain = lora_needs(base, BATCH, CPU)(base)
    longer = lora_needs(base, dataclasses.replace(BATCH, rows=512), CPU)(base)
    assert longer["activations"] > plain["activations"]
    adaln = large(published, network_args=("include_patterns=['.*adaln.*']",))
    unit = 4096 * 2048 * 2
    more = lora_needs(adaln, BATCH, CPU)(adaln)["activations"] - plain["activations"]
    assert more == pytest.approx(28 * 3 * unit)
    graphs = large(published, cuda_graphs=True)
    held = lora_needs(graphs, BATCH, CPU)(graphs)["graphs"]
    assert held == plain["activations"] + plain["workspace"]


def image(side=1024, batch=1):
    """An image of a plan, as far as the prediction looks at it."""
    return types.SimpleNamespace(
        dataset=types.SimpleNamespace(batch_size=batch), bucket=(side, side)
    )


@pytest.fixture
def planned(monkeypatch):
    """Any plan has captions of 96 tokens."""
    monkeypatch.setattr("anima_fast.training.planning.longest_caption", lambda *_: (96, 96))
    return types.SimpleNamespace(items=[image()])


def test_a_card_that_is_too_small_is_refused_with_numbers(published, planned):
    with pytest.raises(UserError) as caught:
        check_memory(large(published, vram=10.0), planned, CPU, say=print)
    text = str(caught.value)
    assert "this LoRA needs about 10.5 GiB of device memory, 8.7 GiB can be used" in text
    assert "--recompute mlp (" not in text and "--gradient_checkpointing (5." in text
    assert "--blocks_to_swap 14 (" in text and "\n" not in text
    said = []
    check_memory(large(published, vram=12.0), planned, CPU, say=said.append)
    assert said == ["memory: about 10.5 GiB on cpu"]


def test_several_options_are_named_when_one_is_not_enough(published, planned):
    with pytest.raises(UserError, match=r"use --gradient_checkpointing .*--blocks_to_swap \d+ \("):
        check_memory(large(published, vram=3.6), planned, CPU, say=print)
    with pytest.raises(UserError, match=r"even .* use a smaller resolution or batch size"):
        check_memory(large(published, vram=1.0), planned, CPU, say=print)


def test_without_vram_a_card_that_is_too_small_is_only_warned_of(published, planned, monkeypatch):
    monkeypatch.setattr("anima_fast.memory.fit.device_free", lambda device: 5 * GIB)
    card = torch.device("cuda")
    monkeypatch.setattr("anima_fast.training.planning.plans_fused_blocks", lambda *_: True)
    monkeypatch.setattr(
        "anima_fast.training.planning.network_state_bytes", lambda options, network, device: 0
    )
    said = []
    check_memory(large(published, vram=None), planned, card, say=said.append)
    assert len(said) == 1 and said[0].startswith("memory may run out: this LoRA needs about")
    assert "4.8 GiB can be used: use " in said[0]


def test_nothing_is_said_on_a_cpu(published, planned):
    check_memory(large(published, vram=None), planned, CPU, say=pytest.fail)


def test_the_plan_in_words(world, tmp_path):
    said = []
    show_memory(train_options(world, tmp_path / "out", plan_memory=True), say=said.append)
    text = "\n".join(said)
    for words in ("together, on the device", "in the host", "peaks: encoding images", "assumed: "):
        assert words in text, words
    assert not (tmp_path / "out").exists()


def run_cli(command, world, *words):
    given = [f"--{name}={value}" for name, value in world.items()]
    return CliRunner().invoke(app, [command, *given, *words])


def test_the_commands(world, tmp_path):
    """`plan` and `train --plan_memory` are the same, and train nothing."""
    words = (f"--output_dir={tmp_path / 'out'}", "--vram=24", "--cache_latents")
    plan, train = run_cli("plan", world, *words), run_cli("train", world, *words, "--plan_memory")
    assert plan.exit_code == train.exit_code == 0, plan.output
    assert plan.output == train.output and "it fits: 22.0 GiB" in plan.output
    assert not (tmp_path / "out").exists()


def test_plan_reads_the_file_of_a_run(world, tmp_path):
    file = tmp_path / "run.toml"
    lines = [f"{name} = {value!r}" for name, value in world.items()]
    file.write_text("\n".join([*lines, f"output_dir = {str(tmp_path / 'out')!r}"]), "utf-8")
    done = CliRunner().invoke(app, ["plan", "--config_file", str(file), "--device", "cpu"])
    assert done.exit_code == 0 and "other models" in done.output
    assert not (tmp_path / "out").exists()
    # Written as a file, the options are those of a run and not of a plan.
    CliRunner().invoke(app, ["plan", "--output_config", "--config_file", str(tmp_path / "o.toml")])
    assert "plan_memory" not in (tmp_path / "o.toml").read_text("utf-8")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["--vram=0.5", "--device=cpu"], "0.0 GiB can be used"),
        ("train", ["--vram=0"], "at least 0.1"),
        ("train", ["--vram=8GB"], "expected a number"),
        ("plan", ["--network_dimm=8"], "did you mean 'network_dim'"),
        ("plan", ["--mlp_lr=1"], "full fine-tuning"),
        ("plan", ["--vae=nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(world, tmp_path, command, words, message):
    done = run_cli(command, world, f"--output_dir={tmp_path}", *words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*.safetensors"))
