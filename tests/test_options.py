"""Options: types, ranges, rules, TOML files and the tables of other names."""

import dataclasses
import re
from pathlib import Path

import pytest

from anima_fast.errors import UserError
from anima_fast.models.flow_settings import FlowSettings
from anima_fast.options.dataset_keys import KEYS
from anima_fast.options.declare import specs
from anima_fast.options.docs_table import option_page, option_table_markdown
from anima_fast.options.files import (
    OTHER_NAMES,
    config_path,
    resolve_train_options,
    to_toml,
    write_config,
)
from anima_fast.options.other_names import ALIASES, BARE_FLAGS, IGNORED, REFUSED
from anima_fast.options.run import TrainOptions
from anima_fast.options.sample import SampleOptions

PACKAGE = Path(__file__).parent.parent / "anima_fast"
NEEDED = {
    "pretrained_model_name_or_path": "dit.safetensors", "qwen3": "qwen3", "vae": "vae.safetensors",
    "dataset_config": "data.toml", "output_dir": "out",
}  # fmt: skip

# Accepted, and without an effect by their nature.
NO_OPS = {"vae_disable_cache", "qwen_image_vae_2d"}
# Obeyed in rules.py: only one value is possible.
ONE_VALUE = {"save_model_as"}


def resolve(**given):
    return resolve_train_options(NEEDED | given)


def test_defaults_are_ours():
    options = TrainOptions()
    assert options.learning_rate == 1e-4
    assert options.mixed_precision == "auto"
    assert options.caption_extension is None
    assert options.attn_mode == "torch"
    assert options.network_dim == 4 and options.network_alpha == 1.0
    assert options.notices == ()


def test_every_option_has_a_sentence_and_a_group_and_no_double():
    for cls in (TrainOptions, SampleOptions):
        for name, spec in specs(cls).items():
            assert spec.help.endswith("."), name
            # Square brackets would be taken as markup on the help page.
            assert "[" not in spec.help, name
            assert spec.group, name
    named = [*specs(TrainOptions), *ALIASES, *IGNORED, *REFUSED]
    assert len(named) == len(set(named))
    assert set(named) >= BARE_FLAGS
    assert {alias.target for alias in ALIASES.values()} <= set(specs(TrainOptions))


def test_every_option_is_read_somewhere():
    """An option that no code outside the option files names is parsed and not obeyed."""
    sources = [
        path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
        if "options" not in path.relative_to(PACKAGE).parts
    ]
    # Properties of TrainOptions stand for the options that they read.
    through = {
        "network_train_unet_only": "trains_text_encoder",
        "network_args": "network_kwargs", "optimizer_args": "optimizer_kwargs",
        "lr_scheduler_args": "scheduler_kwargs", "qwen3_max_token_length": "token_limits",
        "t5_max_token_length": "token_limits",
    }  # fmt: skip
    text = "\n".join(sources)
    # `FlowSettings.from_options` copies the options of its own field names.
    copied = FlowSettings.__dataclass_fields__
    # What the keys of a dataset file have as their default is read under the key's name.
    keys = {key.option: name for name, key in KEYS.items()}
    unread = [
        name
        for name in specs(TrainOptions)
        if name not in copied
        and not re.search(rf"(\b(_?options|caches)\.|[\"']){through.get(name, name)}\b", text)
        and not re.search(rf"\b(self|dataset|subset)\.{keys.get(name, '-')}\b", text)
    ]
    assert set(unread) <= NO_OPS | ONE_VALUE, sorted(set(unread) - NO_OPS - ONE_VALUE)


def test_every_attribute_that_code_reads_exists():
    known = set(dir(TrainOptions())) | set(dir(SampleOptions()))
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "TrainOptions" not in text:
            continue
        read = set(re.findall(r"(?<![./\"])\boptions\.([a-z_0-9]+)\b", text)) - {"md"}
        assert read <= known, (path.name, read - known)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network_dim": 0}, "at least 1"),
        ({"learning_rate": -1}, "--learning_rate: -1 is out of range: use a number of at least 0"),
        ({"learning_rate": float("nan")}, "expected a number"),
        ({"max_train_steps": 0}, "at least 1"),
        ({"train_batch_size": 1.5}, "expected a whole number"),
        ({"caption_dropout_rate": 1.1}, "from 0 to 1"),
        ({"seed": -1}, "out of range"),
        ({"network_dim": "8"}, "expected a whole number, got '8', a text"),
        ({"bucket_reso_steps": 24}, "multiple of 16, such as 64"),
        ({"min_bucket_reso": 8}, "from 16 to"),
        ({"max_bucket_reso": 8, "min_bucket_reso": 8}, "from 16 to"),
        ({"cache_latents": 1}, "expected true or false"),
        ({"loss_type": "l3"}, "not one of l2"),
        ({"lr_scheduler": "cosin"}, "not one of"),
        ({"lr_warmup_steps": 1.5}, "expected a number of steps"),
        ({"lr_warmup_steps": -3}, "at least 0"),
        ({"resolution": "1024*1024"}, "such as 1024"),
        ({"text_encoder_lr": (1e-4, -1.0)}, "at least 0"),
        ({"base_weights": (1,)}, "list of words"),
        ({"max_timestep": 1001}, "from 0 to 1000"),
        ({"output_name": "a/b"}, "not a file name"),
    ],
)
def test_wrong_values(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainOptions(**given)


def test_a_resolution_may_be_written_with_a_fraction_of_zero():
    assert TrainOptions(resolution="64.0", dataset_config="data.toml").resolution == "64.0"
    with pytest.raises(UserError, match="a whole number or two"):
        TrainOptions(resolution="64.5")


@pytest.mark.parametrize(
    ("text", "value"), [("100", 100), ("0.1", 0.1), ("5%", 0.05), ("0", 0), ("1", 1), ("100%", 1)]
)
def test_warmup_in_steps_fraction_and_percent(text, value):
    options, _ = resolve(lr_warmup_steps=text, lr_scheduler="linear")
    assert options.lr_warmup_steps == value
    assert isinstance(options.lr_warmup_steps, type(value))


# Every row of the table of conflicts: values and what is refused.
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache_text_encoder_outputs": True, "token_warmup_step": 0.5}, "token_warmup_step"),
        (
            {"cache_text_encoder_outputs": True, "network_train_text_encoder_only": True},
            "drop one of them",
        ),
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            "exclude each other",
        ),
        ({"cache_latents": True, "color_aug": True}, "--color_aug"),
        ({"cache_latents_to_disk": True, "random_crop": True}, "--random_crop"),
        ({"bucket_reso_steps": 40}, "multiple of 16"),
        ({"min_bucket_reso": 2048}, "above --max_bucket_reso"),
        ({"blocks_to_swap": 2, "cpu_offload_checkpointing": True}, "exclude each other"),
        ({"blocks_to_swap": 2, "unsloth_offload_checkpointing": True}, "exclude each other"),
        (
            {"cpu_offload_checkpointing": True, "unsloth_offload_checkpointing": True},
            "exclude each other",
        ),
        ({"full_bf16": True, "full_fp16": True}, "choose one"),
        ({"attn_mode": "sageattn"}, "no backward pass"),
        ({"compile_fullgraph": True, "split_attn": True}, "exclude each other"),
        ({"compile_fullgraph": True, "attn_mode": "xformers"}, "exclude each other"),
        ({"lr_warmup_steps": 10}, "constant_with_warmup"),
        ({"min_timestep": 600, "max_timestep": 600}, "must be below"),
        ({"dim_from_weights": True}, "--network_weights"),
        ({"network_train_text_encoder_only": True, "text_encoder_lr": (0.0,)}, "trains nothing"),
        ({"base_weights_multiplier": (1.0,)}, "at most one each"),
        ({"save_model_as": "ckpt"}, "pickle"),
        ({"save_model_as": "pt"}, "pickle"),
        ({"network_module": "lycoris.kohya", "network_args": ("algo=boft",)}, "use lora, locon"),
        ({"network_module": "networks.loha", "network_args": ("algo=loha",)}, "one algorithm"),
        ({"network_module": "networks.loha", "network_args": ("factor=4",)}, "only networks.lokr"),
        ({"network_module": "networks.lokr", "network_args": ("factor=0",)}, "-1"),
        ({"network_module": "networks.lokr", "tlora_min_rank": 2}, "masks ranks of a LoRA"),
        ({"network_module": "networks.lokr", "lora_format": "diffusers"}, "plain LoRA only"),
        ({"network_args": ("dora_wd=True",), "lora_format": "diffusers"}, "plain LoRA only"),
        ({"lora_format": "diffusers"}, "--network_train_unet_only"),
        ({"network_dim": 4, "tlora_min_rank": 5}, "above --network_dim"),
        ({"network_module": "networks.lora"}, "unknown"),
    ],
)
def test_refused_combinations(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainOptions(**given)


# Every row that is settled instead: values, what they become, and whether the user is told.
@pytest.mark.parametrize(
    ("given", "settled", "told"),
    [
        ({"cache_text_encoder_outputs": True}, {"network_train_unet_only": True}, True),
        (
            {"cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True},
            {"cache_text_encoder_outputs": True},
            False,
        ),
        ({"cache_latents_to_disk": True}, {"cache_latents": True}, False),
        ({"vae_chunk_size": 63}, {"vae_chunk_size": 64}, True),
        ({"vae_chunk_size": 64}, {"vae_chunk_size": 64}, False),
        ({"unsloth_offload_checkpointing": True}, {"gradient_checkpointing": True}, True),
        ({"cpu_offload_checkpointing": True}, {"gradient_checkpointing": True}, True),
        ({"full_fp16": True}, {"mixed_precision": "fp16"}, True),
        ({"full_fp16": True, "mixed_precision": "fp16"}, {"mixed_precision": "fp16"}, True),
        ({"full_bf16": True, "mixed_precision": "no"}, {"mixed_precision": "bf16"}, True),
        ({"full_bf16": True}, {"mixed_precision": "bf16"}, False),
        ({"loss_type": "huber"}, {"huber_schedule": "constant"}, True),
        ({"loss_type": "smooth_l1"}, {"huber_schedule": "constant"}, True),
        ({"attn_mode": "sdpa"}, {"attn_mode": "torch"}, False),
        ({"attn_mode": "xformers"}, {"split_attn": True}, True),
        ({"log_with": "tensorboard", "output_dir": "out"}, {"logging_dir": "out/logs"}, False),
        ({"logging_dir": "logs"}, {"log_with": "tensorboard"}, False),
        (
            {"dataset_config": "d.toml", "train_data_dir": "x"},
            {"train_data_dir": None, "dataset_config": "d.toml"},
            True,
        ),
        ({"network_alpha": 0.0, "network_dim": 16}, {"network_alpha": 16.0}, False),
        ({"network_alpha": None}, {"network_alpha": 4.0}, False),
        ({"optimizer_type": ""}, {"optimizer_type": "AdamW"}, False),
        ({"blocks_to_swap": 0}, {"blocks_to_swap": None}, False),
        ({"vae_disable_cache": True}, {"vae_disable_cache": True}, True),
    ],
)
def test_settled_combinations(given, settled, told):
    options = TrainOptions(**given)
    assert {name: getattr(options, name) for name in settled} == settled
    assert bool(options.notices) == told, options.notices
    # Settled values settle to themselves.
    assert dataclasses.replace(options) == options


def test_shuffling_with_cached_captions_is_allowed():
    options = TrainOptions(cache_text_encoder_outputs=True, shuffle_caption=True)
    assert any("8 renderings" in notice for notice in options.notices)


def test_network_args():
    options = TrainOptions(
        network_args=(
            "train_llm_adapter=True",
            "exclude_patterns=['.*mlp.*', 'blocks.0.*']",
            "include_patterns=blocks\\.1\\..*",
            "network_reg_dims=.*self_attn.*=8,.*mlp.*=2",
            "network_reg_lrs=.*mlp.*=0",
            "rank_dropout=0.1",
            "loraplus_lr_ratio=16",
        )
    )
    assert options.trains_llm_adapter
    assert options.network_kwargs == {
        "exclude_patterns": (".*mlp.*", "blocks.0.*"),
        "include_patterns": ("blocks\\.1\\..*",),
        "reg_dims": {".*self_attn.*": 8, ".*mlp.*": 2},
        "reg_lrs": {".*mlp.*": 0.0},
        "rank_dropout": 0.1,
        "loraplus_ratio": 16.0,
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train_llm_adaptor=True", "train_llm_adapter"),
        ("train_llm_adapter=maybe", "true or false"),
        ("rank_dropout=2", "from 0 to 1"),
        ("rank_dropout=nan", "expected a number"),
        ("module_dropout=1", "below 1"),
        ("network_reg_dims=a=0", "at least 1"),
        ("network_reg_dims=a", "pattern=number"),
        ("exclude_patterns=(", "regular expression"),
        ("exclude_patterns=[1]", "expected regular expressions"),
        ("network_reg_alphas=.*=1", "not supported"),
        ("preset=full", "include_patterns"),
        ("train_block_indices=9-3", "such as 14-27"),
        ("train_block_indices=", "got none"),
        ("dropout=0.1", "--network_dropout"),
        ("train_block_indices=0-99999999", "no block"),
        ("nothing", "key=value"),
    ],
)
def test_wrong_network_args(word, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainOptions(network_args=(word,))


@pytest.mark.parametrize(
    ("module", "words", "kind", "kwargs"),
    [
        ("networks.loha", (), "loha", {"kind": "loha"}),
        ("networks.lokr", ("factor=8", "decompose_both=True"), "lokr",
         {"kind": "lokr", "lokr": {"factor": 8, "decompose_both": True}}),
        ("lycoris.kohya", ("algo=lokr", "full_matrix=1", "factor=-1"), "lokr",
         {"kind": "lokr", "lokr": {"factor": -1, "full_matrix": True}}),
        ("lycoris.kohya", ("algo=locon", "dora_wd=True"), "lora", {"dora": "outputs"}),
        # As graphical interfaces write it, with all that is off.
        ("lycoris.kohya", ("algo=loha", "use_scalar=False", "rs_lora=False", "train_norm=False",
         "bypass_mode=False", "rank_dropout_scale=False", "dora_wd=False"), "loha",
         {"kind": "loha"}),
        ("networks.lora_anima", ("dora_wd=True", "wd_on_output=False"), "lora",
         {"dora": "inputs"}),
        ("networks.lora_anima", ("train_block_indices=0-2, 5",), "lora", {"blocks": (0, 1, 2, 5)}),
    ],
)  # fmt: skip
def test_networks_and_their_arguments(module, words, kind, kwargs):
    options = TrainOptions(network_module=module, network_args=words)
    assert options.network_arguments.kind == kind
    assert options.network_kwargs == kwargs


def test_what_has_no_effect_on_other_networks_is_said_and_off():
    options = TrainOptions(
        network_module="networks.lokr",
        network_args=("conv_dim=4", "bypass_mode=True"),
        network_dropout=0.1,
        scale_weight_norms=1.0,
    )
    assert options.network_dropout is None and options.scale_weight_norms is None
    said = " ".join(options.notices)
    for word in ("conv_dim", "bypass_mode", "network_dropout", "scale_weight_norms"):
        assert word in said


@pytest.mark.parametrize(
    ("given", "unread"),
    [
        ({"lr_scheduler": "cosine", "lr_scheduler_args": ("T_max=10",)}, "lr_scheduler_args"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_args": ("step_size=3",)}, None),
        ({"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ("step_rules=1",)}, None),
        ({"lr_scheduler": "cosine", "lr_decay_steps": 5}, "lr_decay_steps"),
        ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 3}, "lr_scheduler_num_cycles"),
        ({"lr_scheduler_type": "StepLR", "lr_scheduler_power": 2.0}, "lr_scheduler_power"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0}, None),
        ({"discrete_flow_shift": 3.0}, "discrete_flow_shift"),
        ({"discrete_flow_shift": 3.0, "timestep_sampling": "flux_shift"}, "discrete_flow_shift"),
        ({"discrete_flow_shift": 3.0, "timestep_sampling": "shift"}, None),
        ({"sigmoid_scale": 2.0, "timestep_sampling": "uniform"}, "sigmoid_scale"),
    ],
)
def test_what_nothing_reads_is_said(given, unread):
    said = [n for n in TrainOptions(**given).notices if "has no effect with" in n]
    assert [n.split()[0] for n in said] == ([unread] if unread else [])


def test_a_warmup_without_one_names_that_of_a_schedule_free_optimizer():
    with pytest.raises(UserError, match="--optimizer_args warmup_steps=N"):
        TrainOptions(lr_scheduler="constant", lr_warmup_steps=5)


def test_optimizer_args_are_literals():
    options = TrainOptions(
        optimizer_args=("betas=0.9,0.99", "weight_decay=0.01", "decouple=true", "name=x")
    )
    assert options.optimizer_kwargs == {
        "betas": (0.9, 0.99), "weight_decay": 0.01, "decouple": True, "name": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ({}, True),
        ({"network_train_unet_only": True}, False),
        ({"cache_text_encoder_outputs": True}, False),
        ({"text_encoder_lr": (0.0,)}, False),
        ({"text_encoder_lr": (1e-5,)}, True),
    ],
)
def test_whether_the_text_encoder_is_trained(given, trained):
    assert TrainOptions(**given).trains_text_encoder is trained


@pytest.mark.parametrize("name", [*NEEDED])
def test_what_a_run_needs(name):
    given = {key: value for key, value in NEEDED.items() if key != name}
    with pytest.raises(UserError, match=r"required|no data"):
        resolve_train_options(given)


def test_folders_need_a_resolution():
    given = {k: v for k, v in NEEDED.items() if k != "dataset_config"} | {"train_data_dir": "d"}
    with pytest.raises(UserError, match="--resolution"):
        resolve_train_options(given)
    assert resolve_train_options(given | {"resolution": "512"})[0].resolution == "512"


def config(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_toml_sections_precedence_and_ending(tmp_path):
    config(
        tmp_path,
        '[any]\nnetwork_dim = 32\nlearning-rate = 1\n[other]\nnetwork_args = ["verbose=True"]\n'
        'resolution = [832, 1216]\ncache_latents = true\nlr_warmup_steps = "10%"\n'
        'lr_scheduler = "cosine"\n',
    )
    given = NEEDED | {"network_dim": "8"}
    options, _ = resolve_train_options(given, tmp_path / "run")
    assert options.network_dim == 8
    assert options.learning_rate == 1.0
    assert options.network_args == ("verbose=True",)
    assert options.resolution == "832,1216"
    assert options.lr_warmup_steps == 0.1
    assert options.cache_latents
    # False on the command line beats true in the file.
    options, _ = resolve_train_options(NEEDED | {"cache_latents": "false"}, tmp_path / "run.toml")
    assert not options.cache_latents


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("netwrk_dim = 8", "did you mean 'network_dim'"),
        ("zzzzqqq = 8", "unknown option"),
        ('network_dim = "8"', "network_dim: expected a whole number, got '8'"),
        ("cache_latents = 1", "expected true or false"),
        ("network_args = [1]", "expected a list of words"),
        ("sample_every_n_steps = 5", "previews need"),
        ("fp8_base = true", "8-bit"),
        ("a = [", "not valid TOML"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "two sections"),
    ],
)
def test_wrong_toml(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_train_options(NEEDED, config(tmp_path, text))


def test_missing_toml(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        resolve_train_options(NEEDED, tmp_path / "nothing.toml")


def test_refused_and_ignored_options_that_are_off_pass(tmp_path):
    path = config(tmp_path, 'fp8_base = false\nsample_prompts = ""\nv2 = false\nclip_skip = 0\n')
    assert resolve_train_options(NEEDED, path)[1] == []


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name):
    with pytest.raises(UserError, match=f"--{name}: "):
        resolve(**{name: "something"})


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_ignored_with_one_warning(name):
    _, notices = resolve(**{name: "1"})
    assert len(notices) == 1 and notices[0].startswith(f"{name} is ignored")


def test_aliases():
    assert resolve(use_8bit_adam="true")[0].optimizer_type == "AdamW8bit"
    assert resolve(use_lion_optimizer="true")[0].optimizer_type == "Lion"
    assert resolve(caption_extention=".cap")[0].caption_extension == ".cap"
    assert resolve(xformers="true")[0].attn_mode == "xformers"
    assert resolve(xformers="true", attn_mode="flash")[0].attn_mode == "flash"
    assert resolve(sdpa="true")[0].attn_mode == "torch"


def test_toml_round_trip_keeps_every_value_and_no_secret(tmp_path):
    options, _ = resolve(
        network_args=["verbose=True"], text_encoder_lr=["1e-5", "2e-5"], wandb_api_key="s3cret",
        resolution="832,1216", lr_warmup_steps="0.25", lr_scheduler="linear", seed="7",
    )  # fmt: skip
    text = to_toml(options)
    assert "s3cret" not in text
    again, _ = resolve_train_options({}, config(tmp_path, text))
    assert again == dataclasses.replace(options, wandb_api_key=None)


def test_output_config(tmp_path):
    options, _ = resolve_train_options({"network_dim": "16"}, complete=False)
    path = write_config(options, tmp_path / "new")
    assert path == tmp_path / "new.toml"
    assert path.read_text() == "[network]\nnetwork_dim = 16\n"
    with pytest.raises(UserError, match="exists"):
        write_config(options, path)
    with pytest.raises(UserError, match="--config_file"):
        write_config(options, None)


def test_config_path():
    assert config_path("a/b") == Path("a/b.toml")
    assert config_path("a/b.v2") == Path("a/b.v2.toml")
    assert config_path("a/b.toml") == Path("a/b.toml")


def test_the_table_names_everything_once():
    table = option_table_markdown()
    for name in [*specs(TrainOptions), *OTHER_NAMES]:
        assert table.count(f"| `--{name}` |") == 1, name
    assert "`--prompt`" in option_table_markdown(SampleOptions)


def test_the_page_in_the_documentation_is_up_to_date():
    path = PACKAGE.parent / "docs" / "options.md"
    assert path.read_text(encoding="utf-8") == option_page(), (
        "run: python -m anima_fast.options.docs_table > docs/options.md"
    )


def test_sample_options():
    options = SampleOptions(lora=("a.safetensors", "C:\\b.safetensors:0.5", "C:\\c"), lora_weight=2)
    assert options.loras == (
        ("a.safetensors", 2.0), ("C:\\b.safetensors", 0.5), ("C:\\c", 2.0),
    )  # fmt: skip
    with pytest.raises(UserError, match="multiple of 16"):
        SampleOptions(width=1000)
