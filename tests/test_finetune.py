"""Full fine-tuning on a tiny stack: what is trained and saved, and equal ways to compute it."""

import pytest
import torch
from full_stack import full_options, log_lines, make_full_world
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stack import assert_close_files, same_tensors

from anima_fast.data.encode import choose_text_mode
from anima_fast.data.seeding import seeded
from anima_fast.errors import UserError
from anima_fast.inspection.file import inspect_file
from anima_fast.models.dit import load_dit
from anima_fast.models.flow import sample_sigma
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.training.finetune.full_network import part_of
from anima_fast.training.loop import train
from anima_fast.training.setup import prepare
from anima_fast.training.step import micro_step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_full_world(tmp_path_factory.mktemp("world"))


def prepared(options):
    return prepare(options, seed=7, say=lambda text: None)


def moved(world, result):
    """Names of the tensors that training has changed, without prefix."""
    before, after = load_file(world["pretrained_model_name_or_path"]), load_file(result.output)
    assert before.keys() == after.keys()
    return {k.removeprefix("net.") for k in before if not torch.equal(before[k].float(), after[k])}


def test_the_loss_falls_on_one_image(tmp_path):
    world = make_full_world(tmp_path / "world", subset="num_repeats = 10")
    result = train(full_options(world, tmp_path / "out", max_train_epochs=2, learning_rate=5e-3))
    losses = [line["loss"] for line in log_lines(result)]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


def test_everything_is_trained_and_the_file_has_the_names_of_the_base(world, tmp_path):
    result = train(full_options(world, tmp_path))
    names = {k.removeprefix("net.") for k in load_file(result.output)}
    # The query and key norms of an adapter layer whose only key is the end token get no gradient.
    assert moved(world, result) >= {n for n in names if not n.startswith("llm_adapter.")}
    assert any(name.startswith("llm_adapter.") for name in moved(world, result))
    assert all(t.dtype == torch.float32 for t in load_file(result.output).values())
    with safe_open(result.output, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "anima-preview"
    assert metadata["modelspec.title"] == "full"
    assert not any(key.startswith("ss_") for key in metadata)
    assert "Full fine-tuning" in (tmp_path / "report.html").read_text(encoding="utf-8")
    # The written options repeat the run.
    assert "network" not in (tmp_path / "full.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llm_adapter.blocks.0.self_attn.q_proj.weight", "llm_adapter"),
        ("blocks.3.self_attn.q_norm.weight", "self_attn"),
        ("blocks.3.cross_attn.k_proj.weight", "cross_attn"),
        ("blocks.3.mlp.layer1.weight", "mlp"),
        ("blocks.3.adaln_modulation_self_attn.1.weight", "mod"),
        ("blocks.3.adaln_modulation_mlp.2.weight", "mod"),
        ("final_layer.adaln_modulation.1.weight", "mod"),
        ("final_layer.linear.weight", "base"),
        ("x_embedder.proj.1.weight", "base"),
        ("t_embedder.1.linear_1.weight", "base"),
    ],
)
def test_parts_by_name(name, part):
    assert part_of(name) == part


def test_parts_have_their_own_rates_and_rate_0_freezes(world, tmp_path):
    options = full_options(
        world, tmp_path, self_attn_lr=0.0, mlp_lr=2e-3, llm_adapter_lr=0.0, mod_lr=0.0
    )
    result = train(options)
    rates = log_lines(result)[0]["lr"]
    assert rates == {"cross_attn": 1e-3, "mlp": 2e-3, "base": 1e-3}
    assert {part_of(name) for name in moved(world, result)} == {"cross_attn", "mlp", "base"}


def test_rate_0_for_all_but_one_part(world, tmp_path):
    result = train(full_options(world, tmp_path, learning_rate=0.0, mlp_lr=1e-3))
    assert {part_of(name) for name in moved(world, result)} == {"mlp"}
    # What is frozen is saved as it was.
    only_adapter = train(
        full_options(world, tmp_path / "adapter", learning_rate=0.0, llm_adapter_lr=1e-3)
    )
    assert {part_of(name) for name in moved(world, only_adapter)} == {"llm_adapter"}


def test_a_saved_model_loads_and_computes_what_was_trained(world, tmp_path):
    run = prepared(full_options(world, tmp_path, max_train_epochs=2))
    result = train(full_options(world, tmp_path))
    latents, sigma = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.7])
    context = torch.randn(2, 5, 32)
    run.network.load(result.output)
    expected = run.dit(latents, sigma, context, zero_keys=7)
    loaded = load_dit(result.output, dtype=torch.float32)
    assert torch.equal(loaded(latents, sigma, context, zero_keys=7), expected)
    adapter = load_llm_adapter(result.output, dtype=torch.float32)
    ids, ones = torch.tensor([[3, 4, 1]]), torch.ones(1, 3, dtype=torch.long)
    inputs = (ids, ones, torch.randn(1, 3, 32), ones)
    assert torch.equal(adapter(*inputs), run.conditioning.adapter(*inputs))
    assert "DiT" in str(inspect_file(result.output))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "float"])
def test_the_precision_of_the_file(world, tmp_path, precision):
    result = train(full_options(world, tmp_path, save_precision=precision))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float": torch.float32}[precision]
    assert {t.dtype for t in load_file(result.output).values()} == {dtype}


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"full_bf16": True}, torch.bfloat16),
        ({"full_fp16": True}, torch.float16),
        ({"mixed_precision": "bf16"}, torch.float32),
    ],
    ids=["full_bf16", "full_fp16", "bf16"],
)
def test_the_file_has_the_dtype_of_training(world, tmp_path, changes, dtype):
    result = train(full_options(world, tmp_path, **changes))
    assert {t.dtype for t in load_file(result.output).values()} == {dtype}


SWAPPED = {
    "fp32": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "stochastic": {"full_bf16": True},
    "plain": {"full_bf16": True, "weight_update": "plain"},
    "masters": {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
    "masters in bf16": {"full_bf16": True, "weight_update": "fp32"},
    "8bit": {"optimizer_type": "AdamW8bit", "full_bf16": True},
    "adafactor": {"optimizer_type": "AdaFactor"},
    "frozen part": {"self_attn_lr": 0.0},
    "fused": {"fused_backward_pass": True, "full_bf16": True},
    "no clipping": {"max_grad_norm": 0.0},
}


@pytest.mark.parametrize("case", SWAPPED)
def test_block_swap_changes_nothing(world, tmp_path, case):
    changes = {"recompute": "block", **SWAPPED[case]}
    plain = train(full_options(world, tmp_path / "plain", **changes))
    swapped = train(full_options(world, tmp_path / "swap", blocks_to_swap=2, **changes))
    assert [line["loss"] for line in log_lines(plain)] == [
        line["loss"] for line in log_lines(swapped)
    ]
    assert same_tensors(plain.output, swapped.output)


FUSED = {
    "AdamW": {},
    "AdaFactor": {"optimizer_type": "AdaFactor"},
    "AdaFactor with a rate": {
        "optimizer_type": "AdaFactor",
        "optimizer_args": ("relative_step=False", "scale_parameter=False", "warmup_init=False"),
    },
    "AdamW8bit": {"optimizer_type": "AdamW8bit"},
    "Lion": {"optimizer_type": "Lion"},
    "stochastic": {"full_bf16": True},
    "masters": {"mixed_precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", FUSED)
def test_a_fused_backward_pass_changes_nothing_without_clipping(world, tmp_path, case):
    if "Lion" in case:
        pytest.importorskip("lion_pytorch")
    changes = {"max_grad_norm": 0.0, **FUSED[case]}
    plain = train(full_options(world, tmp_path / "plain", **changes))
    fused = train(full_options(world, tmp_path / "fused", fused_backward_pass=True, **changes))
    assert same_tensors(plain.output, fused.output)
    norms = [[line["grad_norm"] for line in log_lines(run)] for run in (plain, fused)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_blocks_may_be_compiled(world, tmp_path):
    torch._dynamo.reset()
    plain = train(full_options(world, tmp_path / "plain", max_train_epochs=None, max_train_steps=2))
    other = train(
        full_options(
            world, tmp_path / "other", compile=True, compile_backend="aot_eager",
            max_train_epochs=None, max_train_steps=2,
        )
    )  # fmt: skip
    assert_close_files(plain.output, other.output, atol=1e-4)


def test_captions_that_are_not_cached_train_the_adapter_too(world, tmp_path):
    result = train(full_options(world, tmp_path, cache_text_encoder_outputs=False))
    assert any(name.startswith("llm_adapter.") for name in moved(world, result))


def test_a_separate_adapter_is_trained_from_its_own_file(world, tmp_path):
    dit = load_file(world["pretrained_model_name_or_path"])
    own = {k: v for k, v in dit.items() if "llm_adapter" in k}
    save_file({k: v * 1.01 for k, v in own.items()}, tmp_path / "adapter.safetensors")
    save_file({k: v for k, v in dit.items() if k not in own}, tmp_path / "dit.safetensors")
    split = world | {
        "pretrained_model_name_or_path": str(tmp_path / "dit.safetensors"),
        "llm_adapter_path": str(tmp_path / "adapter.safetensors"),
        "cache_dir": str(tmp_path / "cache"),
    }
    trained = train(full_options(split, tmp_path / "trained"))
    assert load_file(trained.output).keys() == dit.keys()
    # A frozen adapter that came from elsewhere stays elsewhere.
    frozen = train(full_options(split, tmp_path / "frozen", llm_adapter_lr=0.0))
    assert load_file(frozen.output).keys() == dit.keys() - own.keys()
    # One that is inside the base is saved as it was used.
    both = split | {"pretrained_model_name_or_path": world["pretrained_model_name_or_path"]}
    result = load_file(train(full_options(both, tmp_path / "both", llm_adapter_lr=0.0)).output)
    key = "net.llm_adapter.embed.weight"
    assert torch.equal(result[key], (own[key] * 1.01).float())


def test_each_sample_has_its_own_weight(world, tmp_path):
    """`weighting_scheme` with batches of two: w(σ) multiplies the sample that it belongs to."""
    run = prepared(full_options(world, tmp_path, weighting_scheme="sigma_sqrt"))
    order = next(b for b in run.plan.epoch_batches(1, run.seed) if len(b) == 2)
    batch = run.batches.load(order, epoch=1, step=0)
    losses = micro_step(run, batch, step=0, micro=0)
    # The generator is as the micro-step left it: the same draws again.
    torch.manual_seed(seeded("step", run.seed, 0, 0).getrandbits(63))
    noise = torch.randn_like(batch.latents)
    sigma = sample_sigma(run.flow, 2, batch.latents.shape[-2:])
    assert sigma[0] != sigma[1]
    s = sigma[:, None, None, None]
    context, zero_keys = run.conditioning(batch.text)
    velocity = run.dit((1 - s) * batch.latents + s * noise, sigma, context, zero_keys=zero_keys)
    plain = (velocity - (noise - batch.latents)).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, plain / sigma**2)


def test_clipping_scales_all_gradients_by_one_factor(world, tmp_path):
    """With plain SGD a weight's change is its gradient, times the rate and the factor."""
    changes = {
        "optimizer_type": "SGD", "learning_rate": 0.5, "max_train_epochs": None,
        "max_train_steps": 1,
    }  # fmt: skip
    before = load_file(world["pretrained_model_name_or_path"])
    deltas, norms = [], []
    for limit in (0.0, 0.01):
        result = train(full_options(world, tmp_path / str(limit), max_grad_norm=limit, **changes))
        after = load_file(result.output)
        deltas.append({k: after[k] - before[k].float() for k in after})
        norms.append(log_lines(result)[0]["grad_norm"])
    assert norms[0] == norms[1] > 0.01
    total = torch.cat([d.flatten() for d in deltas[0].values()]).norm() / 0.5
    assert total.item() == pytest.approx(norms[0], rel=1e-4)
    for key, delta in deltas[0].items():
        torch.testing.assert_close(deltas[1][key], delta * 0.01 / norms[0], atol=2e-7, rtol=1e-2)


def test_accumulated_gradients_are_the_mean(world, tmp_path):
    run = prepared(full_options(world, tmp_path, gradient_accumulation_steps=2))
    batches = [run.batches.load(b, epoch=1, step=0) for b in run.plan.epoch_batches(1, 7)[:2]]
    weight = run.network.weights[0]
    for micro, batch in enumerate(batches):
        (micro_step(run, batch, step=0, micro=micro).mean() / 2).backward()
        assert weight.param.grad is None
    both = run.optimizer.gradients.kept[weight].clone()
    parts = []
    for micro, batch in enumerate(batches):
        run.network.zero_grad_flat()
        (micro_step(run, batch, step=0, micro=micro).mean() / 2).backward()
        parts.append(run.optimizer.gradients.kept[weight].clone())
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_numbers_that_are_not_finite_are_never_saved(world, tmp_path):
    run = prepared(full_options(world, tmp_path))
    run.network.save(tmp_path / "good.safetensors")
    run.network.weights[3].param.data[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        run.network.save(tmp_path / "bad.safetensors")
    run.network.weights[3].param.data[0] = 1e30
    with pytest.raises(UserError, match="not finite in float16"):
        run.network.save(tmp_path / "bad.safetensors", dtype=torch.float16)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["good.safetensors"]


def test_cached_states_are_those_that_the_adapter_reads(world, tmp_path):
    """A trained adapter runs in every step; a frozen one has left its outputs in the cache."""
    for rate, mode in ((None, "states"), (0.0, "context")):
        run = prepared(full_options(world, tmp_path, llm_adapter_lr=rate))
        assert choose_text_mode(run.options) == mode
        assert (run.conditioning.adapter is None) == (mode == "context")


def test_diffusers_opens_a_saved_model(world, tmp_path):
    """Its own converter makes its names of ours, and its transformer computes the same."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import (
        convert_cosmos_transformer_checkpoint_to_diffusers as convert,
    )
    from diffusers_dit import make_transformer

    result = train(full_options(world, tmp_path))
    dit = load_dit(result.output, dtype=torch.float32)
    theirs = make_transformer(dit.config)
    # The adapter is a model of its own there, and taken out first.
    tensors = {k: v for k, v in load_file(result.output).items() if ".llm_adapter." not in k}
    theirs.load_state_dict(convert(tensors), strict=True)
    latents, sigma = torch.randn(2, 16, 8, 8), torch.tensor([0.2, 0.7])
    context = torch.randn(2, 6, 32)
    image = torch.cat([latents[:, :, None], torch.zeros(2, 1, 1, 8, 8)], 1)
    with torch.no_grad():
        expected = theirs(image, sigma, context).sample[:, :, 0]
        torch.testing.assert_close(dit(latents, sigma, context), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_batch_changes_nothing(world, tmp_path, monkeypatch, fused):
    """Weights and optimizer state after a loss that is not finite are those before it."""
    seen = {}

    def poisoned(run, batch, *, step, micro):
        losses = micro_step(run, batch, step=step, micro=micro)
        weights = torch.cat([w.truth.flatten() for w in run.network.weights]).clone()
        state = [v.clone() for s in run.optimizer.state.values() for v in s.values()]
        seen[step] = weights, state
        return losses * float("nan") if step == 1 else losses

    monkeypatch.setattr("anima_fast.training.step.micro_step", poisoned)
    result = train(full_options(world, tmp_path, fused_backward_pass=fused))
    assert [line["loss"] is None for line in log_lines(result)] == [False, True, False, False]
    assert torch.equal(seen[1][0], seen[2][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[1][1], seen[2][1], strict=True))
    assert not torch.equal(seen[2][0], seen[3][0])


def test_a_late_gradient_that_is_not_finite_leaves_weights_finite(world, tmp_path):
    """Inside a fused backward pass other weights are updated already when it comes."""
    run = prepared(full_options(world, tmp_path, fused_backward_pass=True))
    batch = run.batches.load(run.plan.epoch_batches(1, 7)[0], epoch=1, step=0)
    run.dit.blocks[0].mlp.layer1.weight.register_hook(lambda grad: grad * float("inf"))
    losses = micro_step(run, batch, step=0, micro=0)
    losses.mean().backward()
    assert not torch.isfinite(run.optimizer.clip_gradients(1.0))
    assert all(w.truth.isfinite().all() for w in run.network.weights)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes",
    [
        {"full_bf16": True},
        {"full_bf16": True, "optimizer_type": "AdamW8bit"},
        {"full_bf16": True, "optimizer_type": "AdaFactor", "fused_backward_pass": True},
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
    ],
    ids=["stochastic", "8bit", "fused", "masters"],
)
def test_block_swap_on_a_card(world, tmp_path, changes):
    """The same numbers, and everything of a swapped block in pinned host memory."""
    changes = {"device": "cuda", "recompute": "block", "max_grad_norm": 0.0, **changes}
    plain = train(full_options(world, tmp_path / "plain", **changes))
    swapped = train(full_options(world, tmp_path / "swap", blocks_to_swap=2, **changes))
    assert_close_files(plain.output, swapped.output, atol=1e-3, rtol=1e-2)
    run = prepared(full_options(world, tmp_path / "run", blocks_to_swap=2, **changes))
    batch = run.batches.load(run.plan.epoch_batches(1, 7)[0], epoch=1, step=0)
    micro_step(run, batch, step=0, micro=0).mean().backward()
    run.optimizer.clip_gradients(0.0)
    run.optimizer.step()
    for weight in (w for w in run.network.weights if w.swapped):
        assert not weight.param.is_cuda and weight.param.data.is_pinned()
        assert weight.master is None or not weight.master.is_cuda
        large = [v for v in weight.state_home.values() if v.numel() >= 4096]
        assert not any(v.is_cuda for v in large)
