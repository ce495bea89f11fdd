"""Importing other trainers' configurations: what becomes of every key, and that the result runs."""

import json
import random
from pathlib import Path

import pytest
import torch
from migrate_fakes import enter_sources, flat

from anima_fast.data.dataset_config import load_dataset_config
from anima_fast.errors import UserError
from anima_fast.migrate import importer
from anima_fast.migrate.importer import convert, import_config
from anima_fast.migrate.ledger import DROPPED, TAKEN, Ledger, flatten, show
from anima_fast.migrate.onetrainer import distribution
from anima_fast.migrate.sd_scripts_tables import DEFAULTS
from anima_fast.migrate.source import Source, open_source, parse_file
from anima_fast.models.flow import sigma_from_draw
from anima_fast.models.flow_settings import FlowSettings
from anima_fast.options.declare import specs
from anima_fast.options.files import resolve_train_options, to_toml
from anima_fast.options.run import FinetuneOptions, TrainOptions

CLASSES = {"train": TrainOptions, "finetune": FinetuneOptions}
# File -> command, some of the options, and words that the lists must hold.
CASES = {
    "documented.sh": (
        "train",
        {"network_dim": 8, "learning_rate": 1e-4, "optimizer_type": "AdamW8bit",
         "max_train_epochs": 10, "mixed_precision": "bf16", "caption_extension": ".caption",
         "vae_chunk_size": 64, "gradient_checkpointing": True, "cache_latents": True},
        ["--num_cpu_threads_per_process", "sd-scripts' default"],
    ),
    "windows.bat": (
        "train",
        {"pretrained_model_name_or_path": "D:\\AI models\\anima\\anima-base-v1.0.safetensors",
         "train_data_dir": "D:\\training\\mia\\", "caption_extension": ".txt", "unet_lr": 1e-4,
         "optimizer_type": "AdamW8bit", "attn_mode": "xformers", "keep_tokens_separator": "|||",
         "network_args": ("exclude_patterns=['.*mlp.*', 'blocks\\.0\\..*']", "rank_dropout=0.1"),
         "text_encoder_lr": (1e-5,), "resolution": "1024,1024", "mixed_precision": "bf16"},
        ["--num_processes", "environment CUDA_VISIBLE_DEVICES", "fp8_base", "multiply"],
    ),
    "powershell.ps1": (
        "train",
        {"qwen3": "E:\\models\\qwen3", "network_alpha": 128.0, "attn_mode": "torch",
         "lr_warmup_steps": 0.05, "full_bf16": True, "compile": True, "blocks_to_swap": 8,
         "wandb_api_key": None, "resume": None},
        ["sageattn has no backward", "$vae is of your shell", "$name", "cannot be continued",
         "PYTORCH_CUDA_ALLOC_CONF", "another package"],
    ),
    "finetune.sh": (
        "finetune",
        {"self_attn_lr": 5e-6, "mlp_lr": 0.0, "llm_adapter_lr": 0.0, "full_bf16": True,
         "fused_backward_pass": True, "weight_update": "stochastic", "blocks_to_swap": 10,
         "pretrained_model_name_or_path": "/models/anima.safetensors"},
        ["--network_dim", "several devices", "HF_HOME", "--config_file"],
    ),
    "lokr.txt": (
        "train",
        {"network_module": "lycoris.kohya", "network_dim": 100000, "learning_rate": 1e-5,
         "network_args": ("algo=lokr", "factor=4", "full_matrix=True"),
         "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100,
         "save_every_n_epochs": 2, "max_train_epochs": 12, "mixed_precision": "no"},
        ["given 1. of 2", "preset=unet-transformer-only", "the last one counts"],
    ),
    "config_file.toml": (
        "train",
        {"network_module": "networks.loha", "optimizer_type": "Prodigy", "output_name": "loha",
         "output_dir": "/out/sub", "max_train_epochs": 12, "text_encoder_lr": (1e-5,),
         "save_every_n_steps": None, "resolution": "768,1024", "keep_tokens": 1},
        ["min_snr_gamma", "(hidden)", "sample_sampler"],
    ),
    "lora_scripts.toml": (
        "train",
        {"network_module": "networks.lokr", "unet_lr": 1e-4, "timestep_sampling": "sigmoid",
         "lr_scheduler": "cosine_with_restarts", "enable_bucket": True},
        ["enable_preview", "it chose the script"],
    ),
    "easy_training.toml": (
        "train",
        {"network_args": ("train_llm_adapter=False",), "network_dim": 32, "seed": 23,
         "optimizer_args": ("weight_decay=0.1", "betas=0.9,0.99"), "max_train_epochs": 12,
         "sigmoid_scale": 1.3, "learning_rate": 5e-5, "max_data_loader_n_workers": 1},
        ["subsets[0].name", "train_mode"],
    ),
    "gui.json": (
        "train",
        {"network_module": "lycoris.kohya", "network_args": ("algo=lokr", "factor=8",
         "decompose_both=True"), "network_alpha": 4.0, "max_train_epochs": 10,
         "network_train_unet_only": True, "lr_warmup_steps": 0.1, "timestep_sampling": "shift",
         "discrete_flow_shift": 3.0, "qwen3": "/m/q.safetensors", "caption_dropout_rate": 0.1,
         "sample_prompt": ("1girl, park --w 832 --h 1216",), "resolution": "1024,1024"},
        ["use_scalar", "conv_dim", "beats it"],
    ),
    "pipe_lora.toml": (
        "train",
        {"network_dim": 32, "network_alpha": 32.0, "learning_rate": 2e-5, "sigmoid_scale": 1.3,
         "unsloth_offload_checkpointing": True, "max_train_epochs": 100, "autosave_minutes": 120.0,
         "lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.05,
         "optimizer_type": "AdamW", "timestep_sampling": "sigmoid", "save_precision": "bf16",
         "optimizer_args": ("betas=0.9,0.99", "eps=1e-08", "weight_decay=0.01"),
         "lora_format": "comfyui", "log_with": "wandb", "caption_variants": 10,
         "masked_loss": True, "output_name": "pipe_lora"},
        ["a_new_key", "Kahan", "eval_every_n_epochs", "num_repeats = 2"],
    ),
    "pipe_lokr.toml": (
        "train",
        {"network_module": "networks.lokr", "max_train_steps": 2500, "max_train_epochs": None,
         "learning_rate": 1e-5, "timestep_sampling": "sigma", "discrete_flow_shift": 3.0,
         "loss_type": "huber", "huber_c": 0.5, "save_every_n_steps": 250, "blocks_to_swap": 12,
         "base_weights": ("/loras/a.safetensors",), "base_weights_multiplier": (0.5,),
         "network_weights": "/out/older/epoch50/adapter_model.safetensors",
         "train_batch_size": 4, "gradient_checkpointing": True},
        ["automagic", "was not found", "train_llm_adapter=True", "float8_e5m2", "whole matrices"],
    ),
    "pipe_full.toml": (
        "finetune",
        {"self_attn_lr": 5e-6, "mod_lr": 0.0, "llm_adapter_lr": None, "full_bf16": True,
         "weight_update": "stochastic", "optimizer_type": "AdamW8bit", "learning_rate": 6e-6,
         "timestep_sampling": "flux_shift", "caption_dropout_rate": 0.1,
         "fused_backward_pass": False, "gradient_accumulation_steps": 8},
        ["gradient_release", "stabilize"],
    ),
    "pipe_fork.toml": (
        "train",
        {"qwen3": "/m/Qwen3-0.6B", "timestep_sampling": "shift", "discrete_flow_shift": 3.0,
         "keep_tokens": 1, "caption_dropout_rate": 0.05, "shuffle_caption": True,
         "optimizer_type": "pytorch_optimizer.CAME",
         "network_args": (r"exclude_patterns=['blocks\\.\\d+\\.mlp\\..*', "
                          r"'.*adaln_modulation.*']",)},
        ["caption_mode", "pip install pytorch-optimizer"],
    ),
    "trainer_preset.json": (
        "train",
        {"network_dim": 16, "network_alpha": 1.0, "learning_rate": 3e-5, "max_train_epochs": 100,
         "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 200, "compile": False,
         "timestep_sampling": "sigmoid", "lora_format": "kohya", "mixed_precision": "bf16",
         "network_args": (), "gradient_checkpointing": True},
        ["anima-fast download", "8-bit base weights", "diffusers' form"],
    ),
    "trainer_whole.json": (
        "train",
        {"learning_rate": 2e-4, "max_train_epochs": 25, "blocks_to_swap": 14, "device": "cuda:1",
         "ema_decay": 0.997992, "timestep_sampling": "sigma", "weighting_scheme": "logit_normal",
         "logit_mean": -0.5, "logit_std": 1.3, "discrete_flow_shift": 3.0, "min_timestep": 100,
         "network_dropout": 0.1, "max_grad_norm": 0.5, "caption_dropout_rate": 0.05,
         "sample_prompt": ("mia, park --n blurry --w 768 --h 1024 --d 42 --s 20 --l 4.0",),
         "sample_every_n_epochs": 5, "autosave_minutes": 60.0, "output_name": "my_char",
         "lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
        ["masklabel", "the concept is switched off", "offset_noise_weight", "loss_weight 0.5"],
    ),
    "trainer_full.json": (
        "finetune",
        {"llm_adapter_lr": 0.0, "mlp_lr": 0.0, "mod_lr": 0.0, "self_attn_lr": None,
         "optimizer_type": "AdaFactor", "full_bf16": True, "fused_backward_pass": True,
         "weight_update": "stochastic", "learning_rate": 1e-6, "compile": True},
        ["OneTrainer does not train the LLM adapter"],
    ),
    "trainer_lokr.json": (
        "train",
        {"network_module": "networks.lokr", "network_dim": 8, "loss_type": "huber",
         "huber_c": 0.2, "optimizer_type": "Prodigy", "lr_warmup_steps": 0.05,
         "learning_rate": 0.5, "cache_latents": False, "mixed_precision": "fp16",
         "unsloth_offload_checkpointing": True, "timestep_sampling": "sigmoid"},
        ["REX", "drawn at random", "PRODIGY_ADV became Prodigy"],
    ),
}  # fmt: skip


@pytest.fixture
def sources(tmp_path, monkeypatch):
    return enter_sources(tmp_path, monkeypatch)


def run(source, **given):
    lines = []
    paths = import_config(source, say=lambda text: lines.append(str(text)), **given)
    return paths, "\n".join(lines)


def resolve(path, command):
    return resolve_train_options({}, path, complete=False, cls=CLASSES[command])[0]


@pytest.mark.parametrize("name", CASES)
def test_sources_become_options_that_the_command_accepts(sources, name):
    command, expected, words = CASES[name]
    paths, said = run(name, out=Path("imported.toml"))
    assert f"anima-fast {command} --config_file" in said
    options = resolve(paths[0], command)
    found = {key: getattr(options, key) for key in expected}
    assert found == expected
    for word in words:
        assert word in flat(said), word
        # The file tells the same.
        assert word in flat(paths[0].read_text(encoding="utf-8").replace("\n#", "\n"))
    for path in paths[1:]:
        assert options.dataset_config == str(path)
        load_dataset_config(path)


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_in_exactly_one_list(sources, name):
    ledger = convert(open_source(name)).ledger
    listed = set(ledger.settled)
    assert listed == set(ledger.source)
    if name.endswith((".toml", ".json")):
        assert listed >= {key for key, _ in flatten(parse_file(Path(name)))}
    assert all(entry.why for entry in ledger.settled.values() if entry.verdict != TAKEN)
    assert all(why for _, why in ledger.added.values())


@pytest.mark.parametrize("name", CASES)
def test_no_password_is_written_or_said(sources, name):
    paths, said = run(name, out=Path("imported.toml"))
    text = said + "".join(path.read_text(encoding="utf-8") for path in paths)
    for secret in ("secret-of-wandb", "hf_aaaa", "hf_bbbb", "very-secret", '"abc"', "= abc"):
        assert secret not in text


@pytest.mark.parametrize("name", CASES)
def test_importing_again_and_writing_again_change_nothing(sources, name):
    command = CASES[name][0]
    paths, _ = run(name, out=Path("imported.toml"))
    first = resolve(paths[0], command)
    Path("again.toml").write_text(to_toml(first), encoding="utf-8")
    assert resolve(Path("again.toml"), command) == first
    # Our own files are a form of sd-scripts'.
    once_more, _ = run("again.toml", out=Path("third.toml"))
    assert resolve(once_more[0], command) == first


@pytest.mark.parametrize("name", [n for n in CASES if n.endswith((".json", ".toml"))])
def test_any_part_of_a_source_is_settled_too(sources, name):
    """Whatever keys a file leaves out: nothing is settled twice, nothing is lost."""
    whole = parse_file(Path(name))
    keep = {"model", "model_type", "training_method", "LoRA_type", "anima_checkbox", "qwen3",
            "model_arguments", "network_arguments", "anima_args", "network_args"}  # fmt: skip
    draw = random.Random(name)
    for _ in range(25):
        part = {k: v for k, v in whole.items() if k in keep or draw.random() < 0.6}
        for key, table in part.items():
            if isinstance(table, dict) and key not in keep:
                part[key] = {k: v for k, v in table.items() if draw.random() < 0.7}
        source = open_source(name)
        source = Source(source.trainer, part, None, source.file, source.folders)
        try:
            ledger = convert(source).ledger
        except UserError:
            continue
        assert set(ledger.settled) == set(ledger.source)


def test_defaults_that_are_not_ours_are_written(sources):
    """Every default of sd-scripts that ours is not, whatever ours become."""
    line = "accelerate launch anima_train_network.py --qwen3 q --network_module=networks.lora_anima"
    ledger = convert(open_source(line)).ledger
    ours = specs(TrainOptions)
    different = {n: v for n, v in DEFAULTS.items() if n in ours and ours[n].default != v and v}
    assert different and set(ledger.added) == set(different)
    assert {n: ledger.options[n] for n in different} == different
    # With the 16-bit flag the precision is said already.
    ledger = convert(open_source(line + " --full_bf16 --learning_rate 1")).ledger
    assert [*ledger.added] == ["caption_extension"]


def test_plain_16_bit_updates_of_sd_scripts_are_kept(sources):
    line = "accelerate launch anima_train.py --qwen3 q --full_bf16 --mixed_precision bf16"
    assert convert(open_source(line)).ledger.options["weight_update"] == "plain"
    fused = line + " --fused_backward_pass --optimizer_type AdaFactor"
    assert "weight_update" not in convert(open_source(fused)).ledger.options


def test_previews_and_lycoris_of_lora_scripts(sources):
    """Its fields for both are none of sd-scripts', but say what is trained and drawn."""
    source = Path("lora_scripts.toml")
    text = source.read_text().replace("networks.lokr_anima", "lycoris.kohya")
    preview = """
lycoris_algo = "lokr"
lokr_factor = 4
network_args = ["decompose_both=True"]
sample_at_first = true
positive_prompts = "1girl, solo"
negative_prompts = "bad"
sample_width = 512
sample_cfg = 4.5
sample_seed = 0
"""
    for enabled in ("true", "false"):
        source.write_text(
            text.replace("enable_preview = false", f"enable_preview = {enabled}{preview}")
        )
        paths, _ = run(str(source), force=True)
        options = resolve(paths[0], "train")
        assert options.network_args == ("algo=lokr", "factor=4", "decompose_both=True")
        drawn = ("1girl, solo --n bad --w 512 --l 4.5",) if enabled == "true" else ()
        assert options.sample_prompt == drawn and options.sample_at_first == bool(drawn)


def test_what_nobody_there_would_do(sources):
    """No previews without prompts, no epochs beside steps in the GUI, no unknown optimizer."""
    source = Path("gui.json")
    config = json.loads(source.read_text())
    config |= {"sample_prompts": "", "max_train_steps": 1600, "optimizer": "Automagic"}
    source.write_text(json.dumps(config))
    paths, said = run(str(source))
    options = resolve(paths[0], "train")
    assert options.max_train_steps == 1600 and options.max_train_epochs is None
    assert not options.sample_every_n_epochs and "no prompts are given" in flat(said)
    assert "choose optimizer_type: Automagic does not exist here" in flat(said)


def test_a_config_file_beside_a_command_line(sources):
    line = (
        "accelerate launch anima_train_network.py --config_file config_file "
        "--learning_rate 0.5 --network_args rank_dropout=0.2"
    )
    imported = convert(open_source(line))
    assert imported.ledger.options["learning_rate"] == 0.5
    assert imported.ledger.options["network_args"] == ["rank_dropout=0.2"]
    assert imported.ledger.options["optimizer_type"] == "Prodigy"
    beaten = {e.key for e in imported.ledger.listed(DROPPED) if "beats config_file.toml" in e.why}
    assert beaten == {"optimizer_arguments.learning_rate", "network_arguments.network_args"}


def test_relative_paths_are_found_and_made_absolute(sources, tmp_path, monkeypatch):
    (sources / "sd-models").mkdir()
    (sources / "sd-models" / "anima.safetensors").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    paths, said = run(str(sources / "lora_scripts.toml"))
    options = resolve(paths[0], "train")
    base = sources.resolve()
    assert options.pretrained_model_name_or_path == str(base / "sd-models" / "anima.safetensors")
    assert options.train_data_dir == str(base / "train" / "aki")
    assert options.output_dir == str(base / "output")
    assert f"relative paths are read from {base}" in flat(said)
    assert paths[0].parent == elsewhere
    # Where nothing is found, they stay.
    (sources / "sd-models" / "anima.safetensors").unlink()
    (sources / "sd-models").rmdir()
    paths, _ = run(str(sources / "lora_scripts.toml"), force=True)
    assert resolve(paths[0], "train").output_dir == "./output"


def test_a_dataset_file_is_copied_only_where_it_must_change(sources):
    (sources / "dataset.toml").write_text(
        '[general]\nresolution = 512\n[[datasets]]\nfuture_key = 1\n[[datasets.subsets]]\n'
        'image_dir = "pictures"\ncustom_attributes = {a = {b = 1}}\nkeep_tokens = "x"\n'
        '[[datasets.subsets]]\nimage_dir = "/data/b"\nnum_repeats = 3\n'
    )  # fmt: skip
    paths, said = run("documented.sh")
    config = load_dataset_config(paths[1])
    subset = config["datasets"][0]["subsets"][0]
    assert subset["image_dir"] == str((sources / "pictures").resolve())
    assert subset["custom_attributes"] == {"a": {"b": 1}} and "keep_tokens" not in subset
    assert config["datasets"][0]["subsets"][1] == {"image_dir": "/data/b", "num_repeats": 3}
    assert "no such key of a dataset" in flat(said) and "future_key" in said
    assert "the dataset file: kept, but nothing reads it here" in flat(said)
    (sources / "dataset.toml").write_text(
        '[general]\nresolution = 512\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "/data/b"\n'
    )
    paths, _ = run("documented.sh", force=True)
    assert len(paths) == 1
    named = resolve(paths[0], "train").dataset_config
    assert Path(named) == (sources / "dataset.toml").resolve()


def test_datasets_of_diffusion_pipe(sources):
    paths, _ = run("pipe_lora.toml")
    config = load_dataset_config(paths[1])
    assert config["general"] == {"shuffle_caption": True}
    by_size = {d["resolution"]: d for d in config["datasets"]}
    assert list(by_size) == [(512, 512), (1024, 1024), (832, 1216)]
    assert [d["batch_size"] for d in config["datasets"]] == [4, 1, 1]
    small = by_size[512, 512]
    # 0.5 to 2 at an area of 512x512 is 362 to 724 pixels.
    assert (small["min_bucket_reso"], small["max_bucket_reso"]) == (320, 768)
    picture = str((sources / "pictures").resolve())
    assert small["subsets"] == [{"image_dir": picture, "num_repeats": 5}]
    assert by_size[832, 1216]["subsets"] == [
        {"image_dir": "/data/more", "conditioning_data_dir": "/data/masks", "num_repeats": 2,
         "caption_prefix": "mia,", "keep_tokens": 1}
    ]  # fmt: skip


def test_images_without_captions_of_diffusion_pipe(sources):
    file = sources / "pipe_dataset.toml"
    file.write_text("skip_empty_caption = false\n" + file.read_text())
    datasets = load_dataset_config(run("pipe_lora.toml")[0][1])["datasets"]
    assert {s["class_tokens"] for d in datasets for s in d["subsets"]} == {""}


def test_the_dataset_of_lora_easy_training_scripts(sources):
    config = load_dataset_config(run("easy_training.toml")[0][1])
    assert config["general"] == {
        "batch_size": 2, "resolution": (1024, 1024), "enable_bucket": True,
        "min_bucket_reso": 256, "max_bucket_reso": 2048, "bucket_reso_steps": 64,
    }  # fmt: skip
    assert config["datasets"][0]["subsets"] == [
        {"caption_extension": ".txt", "image_dir": str((sources / "pictures").resolve()),
         "keep_tokens": 1, "num_repeats": 4, "shuffle_caption": True}
    ]  # fmt: skip


def test_an_algorithm_of_lora_easy_training_scripts_chooses_lycoris(sources):
    """Its window saves no module, and the warm-up as a fraction."""
    source = Path("easy_training.toml")
    text = source.read_text().replace('network_module = "networks.lora_anima"\n', "")
    text = text.replace('train_llm_adapter = "False"', 'algo = "lokr"\nfactor = "4"')
    source.write_text(
        text.replace("[optimizer_args.args]", "[optimizer_args.args]\nwarmup_ratio = 0.05")
    )
    options = resolve(run(str(source))[0][0], "train")
    assert options.network_module == "lycoris.kohya"
    assert options.network_args == ("algo=lokr", "factor=4")
    assert options.lr_warmup_steps == 0.05


def test_adaln_layers_are_adapted_as_there_but_for_excluded_ones(sources):
    from anima_fast.adapters.targets import find_targets
    from anima_fast.models.dit import AnimaDiT, DitConfig

    options = resolve(run("pipe_lokr.toml")[0][0], "train")
    with torch.device("meta"):
        dit = AnimaDiT(DitConfig(64, 2, 2, 32, 64, 16, 128))
    kwargs = options.network_kwargs
    targets = find_targets(
        dit, None, None, exclude=kwargs["exclude_patterns"], include=kwargs["include_patterns"]
    )
    names = {target.name for target in targets}
    assert "blocks.1.adaln_modulation_mlp.2" in names and "blocks.1.mlp.layer1" in names
    assert "blocks.1.adaln_modulation_mlp.1" not in names
    assert "blocks.0.mlp.layer1" not in names
    assert not any("embed" in name or "final" in name for name in names)
    # Ten of attention and MLP and six of modulation each block, without the two that are excluded.
    assert len(names) == 2 * 16 - 2 - 1


def test_concepts_of_onetrainer(sources):
    (sources / "pictures" / "a.png").touch()
    paths, _ = run("trainer_whole.json")
    config = load_dataset_config(paths[1])
    sizes = [d["resolution"] for d in config["datasets"]]
    assert sizes == [(512, 512), (1024, 1024), (1536, 1536)]
    first, last = config["datasets"][0], config["datasets"][2]
    assert (first["min_bucket_reso"], first["max_bucket_reso"]) == (256, 1024)
    assert first["subsets"] == [
        {"image_dir": str((sources / "pictures").resolve()), "num_repeats": 3,
         "shuffle_caption": True, "keep_tokens": 2, "caption_tag_dropout_rate": 0.1}
    ]  # fmt: skip
    # What the concept leaves out is on there.
    assert last["subsets"] == [{"image_dir": "/data/big", "num_repeats": 1, "flip_aug": True}]


def test_samples_an_epoch_and_folders_below(sources):
    for name in ("a/1.png", "a/2.png", "b/3.png", "b/3-masklabel.png"):
        path = sources / "pictures" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    config = parse_file(Path("trainer_full.json"))
    config["concepts"] = [
        {"path": "pictures/a", "balancing": 6.0, "balancing_strategy": "SAMPLES"},
        {"path": "pictures", "include_subdirectories": True},
    ]
    Path("x.json").write_text(json.dumps(config))
    paths, _ = run("x.json")
    subsets = load_dataset_config(paths[1])["datasets"][0]["subsets"]
    folder = (sources / "pictures").resolve()
    assert [(s["image_dir"], s["num_repeats"]) for s in subsets] == [
        (str(folder / "a"), 3), (str(folder / "a"), 1), (str(folder / "b"), 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "weight", "bias", "shift"),
    [("LOGIT_NORMAL", 0.0, 0.0, 1.0), ("LOGIT_NORMAL", 0.3, 0.5, 1.0),
     ("LOGIT_NORMAL", 0.3, -0.5, 3.0), ("LOGIT_NORMAL", 0.2, 0.0, 3.0), ("UNIFORM", 0, 0, 1.0),
     ("UNIFORM", 0, 0, 2.5), ("HEAVY_TAIL", 0.8, 0, 1.0), ("HEAVY_TAIL", 0.5, 0, 2.0)],
)  # fmt: skip
def test_noise_levels_are_distributed_as_in_onetrainer(kind, weight, bias, shift):
    """Quantiles against OneTrainer's rule: draw, then shift t to s·t / ((s − 1)·t + 1)."""
    options, _ = distribution(kind, weight, bias, shift, False)
    settings = FlowSettings(**options)
    u = (torch.arange(20000) + 0.5) / 20000
    normal = torch.special.ndtri(u.double()).float()
    if kind == "LOGIT_NORMAL":
        t = torch.sigmoid(bias + (weight + 1) * normal)
    elif kind == "HEAVY_TAIL":
        t = 1 - u - weight * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)
    else:
        t = u
    wanted = (shift * t / ((shift - 1) * t + 1)).sort().values
    draw = normal if settings.timestep_sampling in ("sigmoid", "shift") else u
    if settings.weighting_scheme == "logit_normal":
        draw = settings.logit_mean + settings.logit_std * normal
    found = sigma_from_draw(settings, draw, (64, 64)).sort().values
    assert (found - wanted).abs().max() < 4e-3


def test_files_are_never_overwritten_unasked(sources):
    run("documented.sh", out=Path("x.toml"))
    before = Path("x.toml").read_bytes()
    with pytest.raises(UserError, match="exists: give --force"):
        run("lokr.txt", out=Path("x.toml"))
    assert Path("x.toml").read_bytes() == before
    run("lokr.txt", out=Path("x.toml"), force=True)
    assert Path("x.toml").read_bytes() != before
    with pytest.raises(UserError, match="is the source itself"):
        run("config_file.toml", out=Path("config_file.toml"), force=True)
    # The dataset's file stands in the way of both.
    Path("y_dataset.toml").touch()
    with pytest.raises(UserError, match=r"y_dataset\.toml exists"):
        run("pipe_lora.toml", out=Path("y.toml"))
    assert not Path("y.toml").exists()


def test_out_may_be_a_folder_and_names_come_from_the_output(sources):
    paths, _ = run("documented.sh", out=Path("new/folder"))
    assert paths[0] == sources / "new" / "folder" / "my_anima_lora_anima.toml"


def test_diffusion_pipes_own_command(sources):
    line = "NCCL_P2P_DISABLE=1 deepspeed --num_gpus=1 train.py --deepspeed --config pipe_lora.toml"
    imported = convert(open_source(line))
    assert imported.ledger.options["network_dim"] == 32
    dropped = {e.key for e in imported.ledger.listed(DROPPED)}
    assert {"deepspeed --num_gpus", "environment NCCL_P2P_DISABLE", "--deepspeed"} <= dropped


def test_a_ledger_settles_each_key_once():
    """The first word counts, and what nobody settles is dropped at the end."""
    ledger = Ledger()
    ledger.extend({"a": 1, "b": {"c": [1, 2], "d": {}}, "e": [{"f": 1}, {}]})
    assert ledger.open_keys() == ("a", "b.c", "b.d", "e[0].f", "e[1]")
    ledger.take("a", "x")
    ledger.take("a", "y", 2)
    ledger.drop("why", "a", "absent")
    assert ledger.options == {"x": 1} and not ledger.listed(DROPPED)
    for table in ("b", "e"):
        with pytest.raises(UserError, match="expected one value, got a table"):
            ledger.get(table)
    ledger.close()
    assert [e.key for e in ledger.listed(DROPPED)] == ["b.c", "b.d", "e[0].f", "e[1]"]
    assert [e.key for e in ledger.listed(TAKEN)] == ["a"]


def test_what_is_shown_is_one_short_line_without_passwords():
    assert show("a\nb\x00c") == "a b c" and show("") == "(empty)" and show(True) == "true"
    assert len(show("x" * 500)) == 120
    assert "hf_" not in show("token hf_abcdefghijklmnopqrstuvwxyz")


def test_control_characters_do_not_break_the_file(sources):
    paths, _ = run("accelerate launch anima_train_network.py --qwen3 'a\x07b' --foo 'x\x1b[0m\ny'")
    assert "\x07" in resolve(paths[0], "train").qwen3


def test_the_trainers_have_titles():
    assert set(importer.TRAINERS) == {"sd-scripts", "kohya-gui", "diffusion-pipe", "onetrainer"}
