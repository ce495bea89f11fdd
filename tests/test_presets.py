"""Presets: what they set, who wins, what is said, and that their numbers are the project's own."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anima_fast.bench.model import memory_gib
from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.memory.finetune import FinetuneNeeds
from anima_fast.memory.lora import published_step
from anima_fast.memory.plan import CONTEXT_BYTES, GIB, USABLE_SHARE, LargestBatch, Modes
from anima_fast.models.dit import AnimaDiT
from anima_fast.models.dit_config import PUBLISHED
from anima_fast.options.declare import specs
from anima_fast.options.files import resolve_train_options, to_toml
from anima_fast.options.presets import FOLDER, RIVALS, load_preset, preset_names, split_names
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.training.optimizers.weight_updates import CHUNK

NAMES = preset_names()
CARDS = [name for name in NAMES if name.endswith("gb")]
PURPOSES = [name for name in NAMES if name not in CARDS]
NEEDED = {
    "pretrained_model_name_or_path": "d", "qwen3": "q", "vae": "v", "dataset_config": "c.toml",
    "output_dir": "o", "kernels": "triton",
}  # fmt: skip


def resolve(*presets, cls=TrainOptions, **given):
    needed = NEEDED if cls is TrainOptions else {k: v for k, v in NEEDED.items() if k != "kernels"}
    return resolve_train_options(needed | {"preset": list(presets)} | given, cls=cls)


def test_the_presets_that_are_promised():
    assert NAMES == ["character", "concept", "style", "8gb", "12gb", "16gb", "24gb"]


@pytest.mark.parametrize("name", NAMES)
def test_every_line_has_its_reason(name):
    preset = load_preset(name)
    assert preset.about and preset.settings
    for setting in preset.settings:
        assert len(setting.reason) > 20, setting.name
    assert not any(spec.secret for s in preset.settings for spec in [_spec(s.name)])


def _spec(name):
    return specs(TrainOptions).get(name) or specs(FinetuneOptions)[name]


@pytest.mark.parametrize("card", ["", *CARDS])
@pytest.mark.parametrize("purpose", ["", *PURPOSES])
@pytest.mark.parametrize("cls", [TrainOptions, FinetuneOptions])
def test_every_combination_runs_in_both_orders(purpose, card, cls):
    names = [name for name in (purpose, card) if name]
    options, _ = resolve(*names, cls=cls)
    turned, _ = resolve(*names[::-1], cls=cls)
    for name in specs(cls):
        if name != "preset":
            assert getattr(options, name) == getattr(turned, name), name


@pytest.mark.parametrize("purpose", PURPOSES)
def test_llm_adapter_and_text_encoder_are_left_alone(purpose):
    options, _ = resolve(purpose)
    assert not options.trains_llm_adapter and not options.trains_text_encoder
    assert not resolve(purpose, cls=FinetuneOptions)[0].trains_llm_adapter
    assert options.network_alpha == options.network_dim
    assert options.max_train_epochs is None


def predicted(policy, batch):
    """GiB of a LoRA step of rank 32 at 1024x1024."""
    return memory_gib(published_step(policy, tokens=4096, batch=batch, rank=32))["total"]


@pytest.mark.parametrize("card", CARDS)
def test_a_lora_fits_the_card_by_the_projects_own_prediction(card):
    """At 1024x1024 and rank 32; the number in the comment is that prediction."""
    options, _ = resolve(card)
    policy = "block" if options.gradient_checkpointing else options.recompute
    total = predicted(policy, options.train_batch_size)
    assert total <= USABLE_SHARE * int(card.removesuffix("gb"))
    reasons = {s.name: s.reason for s in load_preset(card).settings if s.command == "train"}
    said = reasons.get("recompute") or reasons["gradient_checkpointing"]
    assert f"Predicted {total:.1f} GiB" in said
    # Every further number in the comments is the model's as well.
    known = {f"{predicted(p, b):.1f}" for p in ("none", "mlp", "block") for b in (1, 2, 4)}
    text = load_preset(card).text
    train = text[text.index("[train]") : text.index("[finetune]")]
    assert set(re.findall(r"([\d.]+) GiB", train)) <= known


@pytest.fixture(scope="module")
def shapes():
    """Of the 2B model without its LLM adapter."""
    with torch.device("meta"):
        return {name: p.shape for name, p in AnimaDiT(PUBLISHED).named_parameters()}


@pytest.mark.parametrize("card", CARDS)
def test_full_fine_tuning_fits_the_card_by_the_projects_own_prediction(card, shapes):
    options, _ = resolve(card, cls=FinetuneOptions, llm_adapter_lr="0")
    # Bytes a number: AdamW8bit has two moments of 8 bit and their scales, AdaFactor next to none.
    state = {"AdamW8bit": 2.05, "AdaFactor": 0.01}[options.optimizer_type]
    needs = FinetuneNeeds(
        LargestBatch(options.train_batch_size, 4096), torch.device("cuda"),
        lambda run: Modes("cached", "context"), lambda run: state, shapes,
        looks_at_all=lambda run: False, chunk=CHUNK,
    )  # fmt: skip
    need = needs(options)
    whole = (need.device + CONTEXT_BYTES) / GIB
    assert whole <= USABLE_SHARE * int(card.removesuffix("gb"))
    reasons = [s.reason for s in load_preset(card).settings if s.command == "finetune"]
    said = re.search(r"predicted ([\d.]+) GiB", " ".join(reasons))
    assert float(said[1]) == pytest.approx(whole, abs=0.06)


def test_memory_presets_never_claim_a_measurement():
    for card in CARDS:
        text = load_preset(card).text.lower()
        assert "predicted" in text and "has not been measured" in " ".join(
            text.replace("#", "").split()
        )


def test_by_hand_wins_from_the_command_line_and_from_a_file(tmp_path):
    options, notices = resolve("character", network_dim="4", optimizer_type="Prodigy")
    # The scale stays 1.
    assert options.network_dim == 4 and options.network_alpha == 4.0
    # The arguments belong to the optimizer that was replaced.
    assert options.optimizer_args == ()
    assert "preset character: network_dim = 4 as given, instead of 16" in notices
    assert "preset character: optimizer_args is left out, as optimizer_type is given" in notices
    path = tmp_path / "run.toml"
    path.write_text('preset = ["character", "12gb"]\nlearning_rate = 0.5\nrecompute = "none"\n')
    options, notices = resolve_train_options(NEEDED, path)
    assert options.learning_rate == 0.5 and options.recompute == "none"
    assert options.network_dim == 16 and options.cache_latents_to_disk
    assert any(n.startswith("preset 12gb: recompute = none as given") for n in notices)
    # A preset of the command line takes the place of the file's, and the file still wins over it.
    options, _ = resolve_train_options(NEEDED | {"preset": ["style"]}, path)
    assert options.network_dim == 32 and options.learning_rate == 0.5
    assert not options.cache_latents_to_disk


@pytest.mark.parametrize(
    ("preset", "given", "expected"),
    [
        ("8gb", {"recompute": "none"}, {"gradient_checkpointing": False, "recompute": "none"}),
        ("8gb", {"cpu_offload_checkpointing": "true"}, {"cpu_offload_checkpointing": True}),
        ("12gb", {"gradient_checkpointing": "true"}, {"recompute": "block"}),
        ("12gb", {"gradient_checkpointing": "false"}, {"recompute": None}),
        ("12gb", {"unsloth_offload_checkpointing": "true"}, {"gradient_checkpointing": True}),
        ("12gb", {"full_fp16": "true"}, {"mixed_precision": "fp16"}),
        ("style", {"max_train_epochs": "3"}, {"max_train_epochs": 3, "max_train_steps": 1600}),
        ("style", {"lr_scheduler": "constant"}, {"lr_warmup_steps": 0}),
        ("style", {"text_encoder_lr": ["1e-5"]}, {"network_train_unet_only": False}),
        ("8gb", {"text_encoder_lr": ["1e-5"]}, {"cache_text_encoder_outputs": False}),
        ("8gb", {"random_crop": "true"}, {"cache_latents": False}),
    ],
)
def test_what_contradicts_options_given_by_hand_is_left_out(preset, given, expected):
    options, _ = resolve(preset, **given)
    assert {name: getattr(options, name) for name in expected} == expected


def test_the_fused_backward_pass_is_left_out_for_whole_fp16():
    options, _ = resolve("8gb", cls=FinetuneOptions, full_fp16="true")
    assert options.full_fp16 and not options.fused_backward_pass


def test_rivals_are_options():
    known = {*specs(TrainOptions), *specs(FinetuneOptions)}
    assert known >= {*RIVALS, *(name for names in RIVALS.values() for name in names)}


def test_the_later_preset_wins_and_it_is_said():
    options, notices = resolve("style", "character")
    assert options.network_dim == 16
    said = [n for n in notices if n.startswith("preset character: network_dim")]
    assert "instead of network_dim = 32 of style" in said[0]
    options, notices = resolve("8gb", "16gb")
    assert options.recompute == "none" and not options.gradient_checkpointing
    assert any("instead of gradient_checkpointing = true of 8gb" in n for n in notices)
    assert resolve("16gb", "8gb")[0].gradient_checkpointing


def test_every_setting_is_said_with_its_reason():
    _, notices = resolve("character")
    for setting in load_preset("character").settings:
        if setting.command != "finetune":
            lines = [n for n in notices if n.startswith(f"preset character: {setting.name} = ")]
            assert len(lines) == 1 and setting.reason in lines[0]


def test_what_a_dataset_file_may_say_is_told():
    said = " unless the dataset file has batch_size"
    _, notices = resolve("8gb")
    assert any("train_batch_size = 1," + said in notice for notice in notices)
    _, notices = resolve("8gb", dataset_config=None, train_data_dir="d", resolution="1024")
    assert not any(said in notice for notice in notices)


def test_without_the_fused_kernels_mlp_means_block():
    options, notices = resolve("12gb", kernels="eager")
    assert options.recompute == "block" and options.gradient_checkpointing
    assert any("preset 12gb: recompute = block" in n for n in notices)
    assert resolve("12gb", kernels="auto", device="cpu")[0].recompute == "block"


def test_lora_options_of_a_users_preset_are_left_out_of_full_fine_tuning(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "network_dim = 8\n[any]\nseed = 3\n[finetune]\nmlp_lr = 0.0\n[train]\nunet_lr = 1.0\n"
    )
    options, notices = resolve(str(path), cls=FinetuneOptions)
    assert options.seed == 3 and options.mlp_lr == 0.0
    assert f"preset {path}: network_dim: not options of finetune, left out" in notices
    options, _ = resolve(str(path))
    assert (options.seed, options.network_dim, options.unet_lr) == (3, 8, 1.0)


def test_names_with_commas_and_spaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a,b.toml").write_text("seed = 1\n")
    assert split_names(["character, 12gb", "a,b.toml"]) == ["character", "12gb", "a,b.toml"]
    assert resolve("STYLE,16GB")[0].preset == ("STYLE,16GB",)


def test_the_written_run_repeats_itself(tmp_path):
    options, _ = resolve("character,12gb", seed="1")
    path = tmp_path / "run.toml"
    path.write_text(to_toml(options), encoding="utf-8")
    again, notices = resolve_train_options({}, path)
    assert again == options and again.preset == ("character,12gb",)
    assert [n for n in notices if "as given" in n] == []
    assert "preset character: nothing is left to set" in notices


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("charakter", None, "did you mean 'character'?"),
        ("48gb", None, "use one of character, concept, style, 8gb"),
        ("no.toml", None, "does not exist"),
        ("bad.toml", "a = [", "not valid TOML"),
        ("odd.toml", "netwrk_dim = 3", "did you mean 'network_dim'?"),
        ("type.toml", 'network_dim = "8"', "expected a whole number"),
        ("nest.toml", 'preset = ["style"]', "preset is not an option"),
    ],
)
def test_bad_presets_are_one_line(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content:
        Path(name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(name)
    words = [f"--{key}={value}" for key, value in NEEDED.items()]
    done = CliRunner().invoke(app, ["train", *words, "--preset", name])
    assert done.exit_code == 2 and done.output.count("\n") == 1


def test_the_command_lists_and_prints_them():
    done = CliRunner().invoke(app, ["presets"])
    assert done.exit_code == 0 and all(f"{name} " in done.output for name in NAMES)
    done = CliRunner().invoke(app, ["presets", "8gb"])
    assert done.output == (FOLDER / "8gb.toml").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["presets", "9gb"]).exit_code == 2


def test_the_files_are_part_of_the_package():
    project = (FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"anima_fast.options.presets" = ["*.toml"]' in project
