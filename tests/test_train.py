"""The whole run on a tiny stack: learning, saving, exact resuming, surviving bad data."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stack import (
    make_config,
    make_images,
    make_world,
    records,
    same_tensors,
    spawn,
    train_options,
    wait_for_steps,
)

from anima_fast.demo.tiny_stack import build_stack
from anima_fast.errors import UserError
from anima_fast.models.vae import VaeConfig
from anima_fast.models.vae_checkpoint import published_names
from anima_fast.options.run import TrainOptions
from anima_fast.training import step
from anima_fast.training.checkpoints import without_effect
from anima_fast.training.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_run_writes_the_lora_the_log_and_the_resolved_options(world, tmp_path):
    result = train(train_options(world, tmp_path))
    assert result.output == tmp_path / "lora.safetensors"
    tensors = load_file(result.output)
    # Two blocks with ten targets each, three tensors a target.
    assert len(tensors) == 2 * 10 * 3
    assert any(t.abs().max() > 0 for k, t in tensors.items() if "lora_up" in k)
    steps = records(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, result.steps + 1))
    assert all(0 < line["wait_s"] < line["step_s"] for line in steps)
    assert (tmp_path / "lora.toml").exists()
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*autosave*"))


def test_the_loss_falls_on_one_image(tmp_path):
    world = make_world(tmp_path / "world", subset="num_repeats = 10")
    train(
        train_options(
            world, tmp_path / "out", max_train_epochs=8, learning_rate=2e-2, network_dim=16
        )
    )
    losses = [line["loss"] for line in records(tmp_path / "out")]
    early, late = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
    assert late < 0.97 * early


def test_gradient_accumulation_counts_and_steps(world, tmp_path):
    result = train(train_options(world, tmp_path, gradient_accumulation_steps=3))
    # Five images in three buckets (3, 1, 1) at batch size 2: four batches, two updates an epoch.
    assert result.steps == 2 * 2
    assert [line["step"] for line in records(tmp_path)] == [1, 2, 3, 4]


def test_epoch_and_step_checkpoints_have_the_known_names(world, tmp_path):
    train(
        train_options(
            world, tmp_path, max_train_epochs=3, save_every_n_epochs=1, save_every_n_steps=5
        )
    )
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [
        "lora-000001.safetensors",
        "lora-000002.safetensors",
        "lora-step00000005.safetensors",
        "lora-step00000010.safetensors",
        "lora.safetensors",
    ]


def test_old_checkpoints_are_removed(world, tmp_path):
    train(
        train_options(
            world,
            tmp_path,
            max_train_epochs=5,
            save_every_n_epochs=1,
            save_last_n_epochs=2,
            save_state=True,
        )
    )
    names = sorted(path.name for path in tmp_path.glob("lora-0*"))
    assert names == [
        "lora-000003-state",
        "lora-000003.safetensors",
        "lora-000004-state",
        "lora-000004.safetensors",
    ]


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
def test_resuming_from_any_state_gives_the_same_file(world, tmp_path, optimizer):
    options = train_options(
        world,
        tmp_path / "whole",
        max_train_epochs=3,
        save_every_n_steps=1,
        save_state=True,
        optimizer_type=optimizer,
        network_dropout=0.1,
        gradient_accumulation_steps=2,
    )
    whole = train(options)
    states = sorted((tmp_path / "whole").glob("lora-step*-state"))
    assert len(states) == whole.steps - 1
    for state in (states[0], states[2], states[-1]):
        again = dataclasses.replace(
            options, output_dir=str(tmp_path / state.name), resume=str(state)
        )
        assert same_tensors(train(again).output, whole.output)
        bins = [records(tmp_path / name, "sigma_bins") for name in ("whole", state.name)]
        assert bins[1] == bins[0][-len(bins[1]) :], "of the epoch that was cut too"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL and terminates unasked")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_stopped_run_goes_on_to_the_same_file(world, tmp_path, name):
    changes = {"max_train_epochs": 8, "save_every_n_epochs": 1}
    whole = train(train_options(world, tmp_path / "whole", **changes))
    options = train_options(world, tmp_path / "cut", **changes)
    process = spawn(options)
    wait_for_steps(tmp_path / "cut", 9)
    process.send_signal(getattr(signal, name))
    process.wait(timeout=60)
    assert not (tmp_path / "cut" / "lora.safetensors").exists()
    assert list((tmp_path / "cut").glob("lora-autosave-state*"))
    result = train(dataclasses.replace(options, resume="auto"))
    assert same_tensors(result.output, whole.output)
    steps = [line["step"] for line in records(tmp_path / "cut")]
    assert steps == list(range(1, whole.steps + 1))


def test_the_seed_of_a_run_is_recorded_and_stays(world, tmp_path, capsys):
    options = train_options(world, tmp_path, seed=None, save_state=True, max_train_epochs=1)
    first = train(options)
    (line,) = [x for x in (tmp_path / "lora.toml").read_text().splitlines() if "seed" in x[:5]]
    seed = int(line.split("=")[1])
    again = dataclasses.replace(options, seed=seed, output_dir=str(tmp_path / "again"))
    assert same_tensors(train(again).output, first.output)
    changed = dataclasses.replace(options, seed=seed + 1, resume=str(tmp_path / "lora-state"))
    train(changed)
    assert f"the seed stays {seed}" in capsys.readouterr().err
    assert line in (tmp_path / "lora.toml").read_text().splitlines()


def test_patterns_that_match_nothing_are_told(world, tmp_path, capsys):
    words = (r"network_reg_dims=mlp=2,blocks\.0\..*=3", "exclude_patterns=['.*mlp.*', 'attn']")
    train(train_options(world, tmp_path, network_args=words, max_train_epochs=1))
    lines = [x for x in capsys.readouterr().err.splitlines() if "matches no layer" in x]
    assert [line.split()[:3] for line in lines] == [
        ["network_args", "exclude_patterns:", "attn"], ["network_args", "network_reg_dims:", "mlp"]
    ]  # fmt: skip


def test_what_a_kill_left_half_written_is_removed(world, tmp_path):
    ours = (
        ".lora.safetensors",
        ".lora.toml",
        ".dataset.json",
        ".lora-step00000003-ema.safetensors",
        ".lora-best.safetensors",
    )
    others = (".lora2.safetensors.0123abcd.tmp", "lora.safetensors.0123abcd.tmp")
    for name in (*(f"{name}.0123abcd.tmp" for name in ours), *others):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".lora-autosave-state.0123abcd.tmp").mkdir()
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    (tmp_path / ".lora.toml.89abcdef.tmp").write_bytes(b"of another run that is under way")
    train(train_options(world, tmp_path, max_train_epochs=1))
    assert sorted(p.name for p in tmp_path.glob("*.tmp")) == sorted(
        (*others, ".lora.toml.89abcdef.tmp")
    )


def test_a_finished_run_goes_on_with_more_steps(world, tmp_path, capsys):
    options = train_options(world, tmp_path / "cut", max_train_epochs=1, save_every_n_steps=3)
    first = train(options)
    before = load_file(first.output)
    again = train(dataclasses.replace(options, resume="auto"))
    told = capsys.readouterr().err
    assert "all 4 steps are done: raise --max_train_epochs (now 1) to go on" in told
    assert again.steps == 4 and all(
        torch.equal(tensor, before[name]) for name, tensor in load_file(again.output).items()
    )
    more = train(dataclasses.replace(options, resume="auto", max_train_epochs=3))
    whole = train(train_options(world, tmp_path / "whole", max_train_epochs=3))
    assert same_tensors(more.output, whole.output)
    with pytest.raises(UserError, match=r"is at step 12, this run has 4: raise --max_train_epochs"):
        train(dataclasses.replace(options, resume="auto"))


def test_pruning_counts_what_is_there(world, tmp_path):
    """Also what a kill left half deleted, and the files of a run that was extended."""
    options = train_options(
        world, tmp_path, max_train_epochs=1, save_every_n_steps=3, save_last_n_steps=1,
        save_state=True,
    )  # fmt: skip
    train(options)
    (tmp_path / "lora-step00000001-state").mkdir()
    for name in ("lora-step00000001", "lora-step00000001-ema", "lora-000001", "lora-step1"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    train(dataclasses.replace(options, max_train_epochs=2, resume="auto"))
    assert sorted(path.name for path in tmp_path.glob("lora-*")) == [
        "lora-000001.safetensors", "lora-state", "lora-step00000006-state",
        "lora-step00000006.safetensors", "lora-step1.safetensors",
    ]  # fmt: skip


def test_pruning_that_cannot_act_says_so():
    def told(**options):
        return list(without_effect(TrainOptions(**options)))

    assert told(save_last_n_steps=3, save_every_n_epochs=1) == [
        "save_last_n_steps has no effect without save_every_n_steps"
    ]
    assert told(save_last_n_epochs=2, save_n_epoch_ratio=3) == []
    assert told(save_last_n_epochs_state=2, save_every_n_epochs=1) == [
        "save_last_n_epochs_state has no effect without save_state"
    ]


def test_a_step_that_drops_every_module_changes_nothing(world, tmp_path):
    """One module, left out of about half of the forwards."""
    words = ("module_dropout=0.5", "exclude_patterns=.*", "include_patterns=blocks.1.mlp.layer1")
    train(train_options(world, tmp_path, network_args=words, max_train_epochs=3))
    norms = [record["grad_norm"] for record in records(tmp_path)]
    assert 0.0 in norms and max(norms) > 0


def test_resume_auto_without_a_state_starts_at_the_beginning(world, tmp_path):
    result = train(train_options(world, tmp_path, resume="auto"))
    assert result.output.exists()
    assert "starts from the beginning" in (tmp_path / "console.log").read_text(encoding="utf-8")


def test_a_corrupt_state_offers_the_one_before(world, tmp_path):
    options = train_options(
        world, tmp_path, save_every_n_epochs=1, save_state=True, max_train_epochs=4
    )
    train(options)
    newest, older = tmp_path / "lora-000003-state", tmp_path / "lora-000002-state"
    tensors = newest / "network.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(UserError, match=older.name):
        train(dataclasses.replace(options, resume=str(newest)))


def test_resuming_with_another_rank_is_refused_with_the_reason(world, tmp_path):
    options = train_options(world, tmp_path, save_state=True)
    train(options)
    with pytest.raises(UserError, match=r"rank|network"):
        train(dataclasses.replace(options, network_dim=8, resume=str(tmp_path / "lora-state")))


def test_a_bad_batch_is_skipped_and_many_stop_the_run(world, tmp_path, monkeypatch):
    real = step.micro_step

    def poisoned(run, batch, *args, **kwargs):
        losses = real(run, batch, *args, **kwargs)
        bad = any(item.path.stem == "image2" for item in batch.items)
        return losses * float("nan") if bad else losses

    monkeypatch.setattr(step, "micro_step", poisoned)
    result = train(train_options(world, tmp_path / "few"))
    assert all(t.isfinite().all() for t in load_file(result.output).values())
    losses = [line["loss"] for line in records(tmp_path / "few")]
    assert losses.count(None) == 2
    options = train_options(world, tmp_path / "many", max_train_epochs=20, max_bad_batches=3)
    with pytest.raises(UserError, match="image2"):
        train(options)
    assert not (tmp_path / "many" / "lora.safetensors").exists()


def test_a_base_that_is_not_finite_is_named_at_the_first_batch(world, tmp_path):
    path = tmp_path / "dit.safetensors"
    tensors = load_file(world["pretrained_model_name_or_path"])
    name = next(key for key in tensors if key.endswith("blocks.0.mlp.layer1.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    damaged = {**world, "pretrained_model_name_or_path": str(path)}
    with pytest.raises(UserError, match=f"{name} in .* has 1 values that are no numbers") as found:
        train(train_options(damaged, tmp_path / "out"))
    assert found.value.status == 3 and not list((tmp_path / "out").glob("lora*.safetensors"))


def test_a_run_that_made_no_step_saves_nothing(world, tmp_path, monkeypatch):
    real = step.micro_step
    monkeypatch.setattr(step, "micro_step", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(UserError, match="not one step was made") as found:
        train(train_options(world, tmp_path, max_train_epochs=1))
    assert found.value.status == 3 and not list(tmp_path.glob("lora*.safetensors"))
    with pytest.raises(UserError, match="the rate is not the reason"):
        train(train_options(world, tmp_path, max_train_epochs=9))


def test_validation_is_logged_and_does_not_change_training(tmp_path):
    world = make_world(tmp_path / "world", subset="validation_split = 0.4")
    plain = train(train_options(world, tmp_path / "a", validate_every_n_epochs=100))
    often = train(train_options(world, tmp_path / "b", validate_every_n_steps=1))
    assert same_tensors(plain.output, often.output)
    values = [line["loss"] for line in records(tmp_path / "b", "validation")]
    assert len(values) == often.steps and all(value > 0 for value in values)


@pytest.mark.parametrize(
    "changes",
    [
        {"network_args": ("train_llm_adapter=True",)},
        {"cache_text_encoder_outputs": False},
        {"optimizer_type": "AdaFactor"},
        {"full_bf16": True, "mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "optimizer_type": "AdamW8bit"},
        {"mixed_precision": "fp16"},
        {"full_fp16": True, "mixed_precision": "fp16"},
        {"scale_weight_norms": 0.5},
        {"ip_noise_gamma": 0.1, "loss_type": "huber", "weighting_scheme": "cosmap"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 0.2},
        {"save_precision": "bf16", "lora_format": "comfyui", "fold_alpha": True},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_other_ways_to_train_end_with_a_finite_file(world, tmp_path, changes):
    result = train(train_options(world, tmp_path, **changes))
    tensors = load_file(result.output)
    assert tensors and all(t.isfinite().all() for t in tensors.values())


def test_text_encoder_and_adapter_get_their_own_modules(world, tmp_path):
    result = train(
        train_options(
            world,
            tmp_path,
            cache_text_encoder_outputs=False,
            network_args=("train_llm_adapter=True",),
        )
    )
    keys = load_file(result.output)
    assert any(k.startswith("lora_te_") for k in keys)
    assert any(k.startswith("lora_unet_llm_adapter_") for k in keys)
    moved = [k for k, t in keys.items() if "lora_up" in k and t.abs().max() > 0]
    assert any(k.startswith("lora_te_") for k in moved)
    assert any("llm_adapter" in k for k in moved)


def test_an_unwritable_output_folder_is_refused_before_anything_is_loaded(world, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match="cannot write"):
        train(train_options(world, blocked / "out"))


def test_a_model_of_the_wrong_kind_is_named(world, tmp_path):
    with pytest.raises(UserError, match="VAE"):
        train(train_options({**world, "pretrained_model_name_or_path": world["vae"]}, tmp_path))


def test_block_swap_needs_enough_blocks(world, tmp_path):
    with pytest.raises(UserError, match="blocks_to_swap"):
        train(train_options(world, tmp_path, blocks_to_swap=5))


def test_masks_reach_the_loss(tmp_path):
    world = make_world(tmp_path / "world")
    images = tmp_path / "world" / "images"
    from PIL import Image

    masks = tmp_path / "masks"
    masks.mkdir()
    for path in images.glob("*.png"):
        with Image.open(path) as image:
            Image.new("RGB", image.size, (0, 0, 0)).save(masks / path.name)
    make_config(tmp_path / "m.toml", images, subset=f"conditioning_data_dir = {str(masks)!r}")
    masked = {**world, "dataset_config": str(tmp_path / "m.toml")}
    train(train_options(masked, tmp_path / "out", masked_loss=True))
    losses = [line["loss"] for line in records(tmp_path / "out")]
    assert losses and all(loss == 0 for loss in losses)


def test_folder_layout_trains_without_a_dataset_file(world, tmp_path):
    make_images(tmp_path / "data" / "2_cat", count=2)
    plain = {k: v for k, v in world.items() if k != "dataset_config"}
    result = train(
        train_options(
            plain,
            tmp_path / "out",
            train_data_dir=str(tmp_path / "data"),
            resolution="64",
            caption_extension=".txt",
        )
    )
    # Two images, two repeats, batch size 1, two epochs.
    assert result.steps == 8


def test_debug_dataset_lists_the_first_epoch_and_trains_nothing(world, tmp_path, capsys):
    assert train(train_options(world, tmp_path, debug_dataset=True)) is None
    shown = capsys.readouterr().err
    assert "batch 4" in shown
    assert all(f"image{i}.png: 'picture {i}, red tree" in shown for i in range(5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "source", "words"),
    [
        ("pretrained_model_name_or_path", "vae", "give it to --vae"),
        ("vae", "pretrained_model_name_or_path", "this is an Anima DiT"),
        ("qwen3", "vae", "this is a Qwen-Image VAE"),
        ("vae", "dataset_config", "data.toml"),
        ("network_weights", "vae", "not a LoRA: this is a Qwen-Image VAE"),
    ],
)
def test_a_wrong_model_file_is_refused_before_anything_is_written(
    world, tmp_path, option, source, words
):
    options = train_options(world, tmp_path / "out", **{option: world[source]})
    with pytest.raises(UserError, match=words):
        train(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Adan", "absent_package.Adam"])
def test_an_unknown_optimizer_is_refused_before_anything_is_encoded(world, tmp_path, kind):
    with pytest.raises(UserError, match=f"--optimizer_type {kind}"):
        train(train_options(world, tmp_path / "out", optimizer_type=kind))
    assert not (tmp_path / "out").exists()


def test_too_many_swapped_blocks_are_refused_before_anything_is_written(world, tmp_path):
    with pytest.raises(UserError, match="does not fit a DiT of 2 blocks"):
        train(train_options(world, tmp_path / "out", blocks_to_swap=1))
    assert not (tmp_path / "out").exists()


def test_models_of_different_widths_are_refused(world, tmp_path):
    other = build_stack(
        tmp_path / "other", blocks=1, width=64, head_dim=32, context_dim=64, adapter_layers=1
    )
    with pytest.raises(UserError, match="states of width 64, the LLM adapter expects 32"):
        train(train_options(world, tmp_path / "out", qwen3=str(other.qwen3)))
    with pytest.raises(UserError, match="gives 64 numbers per token, the DiT expects 32"):
        train(train_options(world, tmp_path / "out", llm_adapter_path=str(other.dit)))


def test_other_forms_of_the_same_files_train_the_same_lora(world, tmp_path):
    """Another prefix, one file for Qwen3, a .pth VAE under diffusers names."""
    dit = load_file(world["pretrained_model_name_or_path"])
    renamed = {k.replace("net.", "model.diffusion_model.", 1): v for k, v in dit.items()}
    save_file(renamed, tmp_path / "dit.safetensors")
    qwen3 = load_file(Path(world["qwen3"]) / "model.safetensors")
    save_file({f"model.{k}": v for k, v in qwen3.items()}, tmp_path / "qwen3.safetensors")
    vae = load_file(world["vae"])
    config = VaeConfig(width=16)
    wan, diffusers = (published_names(config, naming) for naming in ("wan", "diffusers"))
    torch.save({diffusers[k]: vae[wan[k]] for k in wan}, tmp_path / "vae.pth")
    other = world | {
        "pretrained_model_name_or_path": str(tmp_path / "dit.safetensors"),
        "qwen3": str(tmp_path / "qwen3.safetensors"),
        "qwen3_tokenizer_path": world["qwen3"],
        "vae": str(tmp_path / "vae.pth"),
    }
    first = train(train_options(world, tmp_path / "first", max_train_epochs=1))
    second = train(
        train_options(
            other, tmp_path / "second", max_train_epochs=1, cache_dir=str(tmp_path / "cache")
        )
    )
    assert same_tensors(first.output, second.output)
