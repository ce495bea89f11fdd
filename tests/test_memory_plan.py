"""The prediction of memory: against bytes of a tiny run, counted units, and what is refused."""

import dataclasses
import json
import struct
import types
from pathlib import Path

import pytest
import torch
from full_stack import full_options, make_full_world

from anima_fast.errors import UserError
from anima_fast.memory.finetune import ADAPTER_UNITS, ROW_UNITS, TOKEN_UNITS
from anima_fast.memory.fit import Budget, memory_plan
from anima_fast.memory.free import _limit, host_free
from anima_fast.memory.plan import CPU_PROGRAM_BYTES, GIB, LargestBatch
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_config import DitConfig
from anima_fast.models.llm_adapter import AdapterConfig, LLMAdapter
from anima_fast.options.files import resolve_train_options
from anima_fast.options.run import FinetuneOptions
from anima_fast.training.planning import check_memory, finetune_needs, memory_needs, show_memory
from anima_fast.training.setup import prepare
from anima_fast.training.step import micro_step

CPU = torch.device("cpu")
KEYS = Path(__file__).parent / "golden" / "keys_dit.json"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_full_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file with the published names and shapes, and holes instead of numbers."""
    header, end = {}, 0
    for name, shape in json.loads(KEYS.read_text(encoding="utf-8")).items():
        size = 2 * torch.Size(shape).numel()
        header[f"net.{name}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("published") / "dit.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return str(path)


def large(published, **changes):
    values = {"cache_latents": True, "cache_text_encoder_outputs": True, **changes}
    return FinetuneOptions(pretrained_model_name_or_path=published, **values)


def images(side=1024, batch=1):
    dataset = types.SimpleNamespace(batch_size=batch)
    return types.SimpleNamespace(
        items=[types.SimpleNamespace(dataset=dataset, bucket=(side, side))]
    )


def needs_of(options, batch=1):
    return finetune_needs(options, LargestBatch(batch, 4096), CPU)


def sizes_of(options):
    return needs_of(options).sizes(options)


def plan_lines(options):
    return memory_plan(options, needs_of(options), CPU)


MEASURED = {
    "fp32": {},
    "masters": {"mixed_precision": "bf16"},
    "accumulation in fp32": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
    "stochastic": {"full_bf16": True},
    "plain": {"full_bf16": True, "weight_update": "plain"},
    "frozen adapter": {"llm_adapter_lr": 0.0},
    "frozen part": {"mlp_lr": 0.0, "llm_adapter_lr": 0.0},
    "swap": {"blocks_to_swap": 2, "recompute": "block"},
    "swap with masters": {"blocks_to_swap": 2, "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("case", MEASURED)
def test_predicted_bytes_are_those_of_a_run(world, tmp_path, case):
    """Weights, masters, gradients and optimizer state of a real step, added up tensor by tensor."""
    options = full_options(world, tmp_path, **MEASURED[case])
    run = prepare(options, seed=7, say=lambda text: None)
    order = run.plan.epoch_batches(1, run.seed)
    for micro in range(options.gradient_accumulation_steps):
        batch = run.batches.load(order[micro], epoch=1, step=0)
        micro_step(run, batch, step=0, micro=micro).mean().backward()
    gradients = dict(run.optimizer.gradients.kept)
    run.optimizer.clip_gradients(1.0)
    run.optimizer.step()

    need = memory_needs(options, run.plan, CPU)(options)
    every = [*run.dit.parameters()]
    if options.trains_llm_adapter:
        every += run.conditioning.adapter.parameters()
    swapped = {id(w.param) for w in run.network.weights if w.swapped}
    here = [w for w in run.network.weights if not w.swapped]
    weights = sum(p.nbytes for p in every if id(p) not in swapped)
    # Two swapped blocks visit the device.
    visiting = sum(w.param.nbytes for w in run.network.weights if w.swapped)
    assert need["weights"] == weights + visiting
    assert need["masters"] == sum(w.master.nbytes for w in here if w.master is not None)
    kept = sum(gradients[w].nbytes for w in here)
    block = sum(p.nbytes for p in run.dit.blocks[0].parameters()) if swapped else 0
    assert need["gradients"] == kept + block
    assert need["state"] == pytest.approx(state_bytes(run, here), rel=0.01)
    if swapped:
        there = [w for w in run.network.weights if w.swapped]
        held = sum(w.param.nbytes + gradients[w].nbytes for w in there)
        held += sum(w.master.nbytes for w in there if w.master is not None)
        assert need.host - CPU_PROGRAM_BYTES == pytest.approx(
            held + state_bytes(run, there), rel=0.01
        )


def state_bytes(run, weights):
    states = [run.optimizer.state[w.param] for w in weights]
    return sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor))


REAL = DitConfig(2048, 1, 16, 128, 1024, 256, 8192)


def kept_bytes(model, run):
    """Bytes that autograd keeps of a call, parameters and result left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    alive.pop(out.untyped_storage().data_ptr(), None)
    return sum(alive.values())


def random_model(make, dtype):
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_units_of_a_trained_block_at_the_real_width(dtype):
    torch.manual_seed(0)
    dit = random_model(lambda: AnimaDiT(REAL), dtype)
    tokens, rows, size = 256, 64, dtype.itemsize
    context = torch.randn(1, rows, 1024).to(dtype)
    shared = dit._shared(torch.rand(1), context, 16, 16, 512 - rows)
    x = torch.randn(1, tokens, 2048).to(dtype).requires_grad_()
    found = kept_bytes(dit, lambda: dit.blocks[0](x, shared))
    predicted = 2048 * size * (TOKEN_UNITS[size] * tokens + ROW_UNITS[size] * rows)
    assert found == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_units_of_a_trained_adapter(dtype):
    config = AdapterConfig(256, 256, 6, 64, 1024, 100, 256)
    adapter = random_model(lambda: LLMAdapter(config), dtype)
    rows, ones = 64, torch.ones(1, 64)
    states = torch.randn(1, rows, 256).to(dtype)
    found = kept_bytes(
        adapter, lambda: adapter(torch.randint(0, 100, (1, rows)), ones, states, ones)
    )
    predicted = 6 * rows * 256 * dtype.itemsize * ADAPTER_UNITS[dtype.itemsize]
    assert found == pytest.approx(predicted, rel=0.05)


def test_sizes_of_the_published_model(published):
    sizes = sizes_of(large(published))
    total = sizes.blocks * sizes.block_trained + sizes.rest_trained
    assert (sizes.blocks, sizes.width, sizes.adapter_layers) == (28, 2048, 6)
    assert total == 2_091_068_928
    assert sizes.block_trained == 69_206_528
    assert sizes.largest == 32128 * 1024
    frozen = sizes_of(large(published, llm_adapter_lr=0.0, mlp_lr=0.0))
    assert frozen.rest_frozen == 0 and frozen.block_frozen == 2 * 2048 * 8192
    assert frozen.rest_trained == total - 134_663_680 - 28 * sizes.block_trained
    # Captions that are not cached keep the frozen adapter in memory.
    live = sizes_of(large(published, llm_adapter_lr=0.0, cache_text_encoder_outputs=False,
                          cache_text_encoder_outputs_to_disk=False))  # fmt: skip
    assert live.rest_frozen == 134_663_680


@pytest.mark.parametrize(
    ("changes", "low", "high"),
    [
        # 2.09e9 numbers: 2 + 4 + 8 bytes of weights, masters, moments are 27.3 GiB.
        ({"gradient_checkpointing": True}, 31.0, 33.0),
        ({"gradient_checkpointing": True, "full_bf16": True}, 23.0, 25.0),
        # 3.9 of weights, 3.9 of gradients, 4 of state.
        (
            {"gradient_checkpointing": True, "full_bf16": True, "optimizer_type": "AdamW8bit"},
            12.0, 14.0,
        ),
        (
            {
                "gradient_checkpointing": True, "full_bf16": True, "fused_backward_pass": True,
                "optimizer_type": "AdaFactor", "optimizer_args": ("relative_step=False",),
            },
            5.0, 8.0,
        ),
    ],
)  # fmt: skip
def test_totals_of_the_published_model(published, changes, low, high):
    assert low * GIB < needs_of(large(published))(large(published, **changes)).device < high * GIB


def test_each_option_saves_what_it_says(published):
    base = large(published)
    needs = needs_of(base)
    plain = needs(base)
    assert needs(dataclasses.replace(base, gradient_checkpointing=True)).device < plain.device
    few, many = (needs(dataclasses.replace(base, blocks_to_swap=n)) for n in (5, 20))
    assert many.device < few.device < plain.device
    assert many.host > few.host > plain.host
    # A block in host memory: 2 + 4 + 2 + 8 bytes for each of its numbers.
    assert many.host - few.host == pytest.approx(15 * 69_206_528 * 16, rel=0.001)
    larger = needs_of(base, 2)(base)
    assert larger["activations"] == pytest.approx(2 * plain["activations"], rel=0.01)
    once = needs(dataclasses.replace(base, full_bf16=True, gradient_checkpointing=True))
    fused = needs(dataclasses.replace(base, full_bf16=True, gradient_checkpointing=True,
                                      fused_backward_pass=True))  # fmt: skip
    assert once["gradients"] > 3.8 * GIB and fused["gradients"] < 0.1 * GIB
    assert fused.device < once.device


def test_a_card_that_is_too_small_is_refused_with_numbers(published):
    said = []
    options = large(published, vram=24.0, gradient_checkpointing=True)
    with pytest.raises(UserError) as caught:
        check_memory(options, images(), CPU, say=said.append)
    text = str(caught.value)
    assert "needs about 32." in text and "22.0 GiB can be used" in text
    assert "--optimizer_type AdamW8bit (2" in text
    assert "--full_bf16 (" not in text and "\n" not in text
    # What is named does fit.
    helped = dataclasses.replace(options, optimizer_type="AdamW8bit")
    check_memory(helped, images(), CPU, say=said.append)
    assert said[0].startswith("memory: about 20.")


def test_several_options_are_named_when_one_is_not_enough(published):
    with pytest.raises(UserError) as caught:
        check_memory(large(published, vram=12.0), images(), CPU, say=print)
    words = str(caught.value).split(": use ")[1]
    assert words.startswith(
        "--gradient_checkpointing --llm_adapter_lr 0 --optimizer_type AdamW8bit"
    )
    given = words.rsplit(" (", 1)[0].replace("--", "\n--").split("\n")[1:]
    changes = {w.split()[0][2:]: [*w.split(), "true"][1] for w in given}
    needed = {
        "pretrained_model_name_or_path": published, "qwen3": "q", "vae": "v", "output_dir": "o",
        "dataset_config": "d", "cache_latents": "true", "cache_text_encoder_outputs": "true",
        "vram": "12",
    }  # fmt: skip
    options, _ = resolve_train_options(needed | changes, cls=FinetuneOptions)
    check_memory(options, images(), CPU, say=lambda text: None)


def test_nothing_helps_on_a_tiny_card(published):
    with pytest.raises(UserError, match=r"even --gradient_checkpointing .* train a LoRA"):
        check_memory(large(published, vram=2.0), images(2048, 4), CPU, say=print)


def test_little_host_memory_is_refused(published, monkeypatch):
    monkeypatch.setattr("anima_fast.memory.fit.host_free", lambda: 6 * GIB)
    options = large(published, vram=24.0, full_bf16=True, blocks_to_swap=26)
    with pytest.raises(UserError, match=r"needs about .* of host memory, 6\.0 GiB are free"):
        check_memory(options, images(), CPU, say=print)
    # On the CPU all of it is host memory.
    with pytest.raises(UserError, match=r"needs about 48\..*, 6\.0 GiB are free.*needs 9\."):
        check_memory(large(published), images(), CPU, say=print)


def test_the_plan_in_words(published, world, tmp_path):
    lines = plan_lines(large(published, vram=80.0))
    assert any("it fits" in line for line in lines)
    assert any("with --blocks_to_swap 26" in line for line in lines)
    said = []
    show_memory(full_options(world, tmp_path / "out", plan_memory=True), say=said.append)
    assert any("optimizer state" in line or "in the host" in line for line in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "low", "high"),
    [
        ("AdamW", {}, 8.0, 8.001),
        ("AdamW", {"full_bf16": True, "weight_update": "plain"}, 4.0, 4.001),
        ("AdamW8bit", {"full_bf16": True}, 2.0, 2.1),
        ("AdaFactor", {}, 0.0, 0.05),
        ("torch.optim.RMSprop", {}, 4.0, 4.001),
    ],
)
def test_optimizer_state_is_measured(published, kind, changes, low, high):
    """Any class, by a step on a matrix; as many bytes for each trained number."""
    options = large(published, optimizer_type=kind, **changes)
    state = needs_of(options)(options)["state"]
    assert low <= state / 2_091_068_928 <= high


def test_host_memory_is_known_here():
    free = host_free()
    assert free is None or 2**20 < free < 2**50


def test_what_a_container_leaves(tmp_path):
    """Files in its cache are no use of memory, and nothing left is not "no limit"."""
    assert _limit(tmp_path) is None
    (tmp_path / "memory.current").write_text("900\n", encoding="utf-8")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 500\n", encoding="utf-8")
    for limit, left in (("1000", 600), ("300", 0), ("max", None)):
        (tmp_path / "memory.max").write_text(f"{limit}\n", encoding="utf-8")
        assert _limit(tmp_path) == left


def test_a_full_container_is_not_one_without_a_limit(monkeypatch):
    monkeypatch.setattr("anima_fast.memory.free._limit", lambda: 0)
    assert host_free() in (0, None)


def test_a_tiny_model_on_a_small_machine_is_not_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr("anima_fast.memory.fit.host_free", lambda: GIB)
    check_memory(full_options(world, tmp_path), images(64), CPU, say=print)


def test_budgets():
    need = types.SimpleNamespace(device=5, host=3)
    assert Budget(5, 3).fits(need) and Budget(None, None).fits(need)
    assert not Budget(4, 3).fits(need) and not Budget(5, 2).fits(need)
    assert Budget(None, 8, same=True).fits(need) and not Budget(None, 7, same=True).fits(need)
