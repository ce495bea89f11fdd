"""Options of full fine-tuning: what is shared, refused, settled, and how the command answers."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from full_stack import full_options, log_lines, make_full_world
from safetensors.torch import load_file
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.options.declare import specs
from anima_fast.options.docs_table import finetune_table_markdown
from anima_fast.options.files import resolve_train_options, to_toml
from anima_fast.options.finetune import FinetuneGroup, network_options
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.training.finetune.start import model_bytes, resume_bytes
from anima_fast.training.loop import train

PACKAGE = Path(__file__).parent.parent / "anima_fast"
NEEDED = {
    "pretrained_model_name_or_path": "dit.safetensors", "qwen3": "qwen3", "vae": "vae.safetensors",
    "dataset_config": "data.toml", "output_dir": "out",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_full_world(tmp_path_factory.mktemp("world"))


def test_it_has_every_option_of_a_lora_run_but_those_of_the_network():
    both = specs(TrainOptions).keys() & specs(FinetuneOptions).keys()
    assert specs(TrainOptions).keys() - both == set(network_options())
    assert specs(FinetuneOptions).keys() - both == specs(FinetuneGroup).keys()
    assert len(both) > 80


@pytest.mark.parametrize("name", sorted(network_options()))
def test_network_options_are_refused_with_the_remedy(name):
    with pytest.raises(UserError, match=rf"--{name}: .*remove it"):
        resolve_train_options(NEEDED | {name: "1"}, cls=FinetuneOptions)


@pytest.mark.parametrize("name", sorted(specs(FinetuneGroup)))
def test_a_lora_run_points_to_the_command(name):
    with pytest.raises(UserError, match=r"anima-fast finetune"):
        resolve_train_options(NEEDED | {name: "1"})


def test_every_option_of_its_own_is_read():
    files = [p for room in ("training", "memory") for p in (PACKAGE / room).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    text += (PACKAGE / "commands" / "train.py").read_text(encoding="utf-8")
    rates = {option for option in specs(FinetuneGroup) if option.endswith("_lr")}
    for name in specs(FinetuneGroup).keys() - rates:
        assert re.search(rf"options\.{name}\b|\"{name}\"", text), name
    assert "part_rates" in text


def test_code_that_both_kinds_run_reads_no_option_of_the_network():
    """Only LoRA training does, and what has looked which kind it is."""
    for path in (PACKAGE / "training").rglob("*.py"):
        if path.name in ("lora.py", "adapter_setup.py", "planning.py", "arithmetic.py"):
            continue
        read = set(re.findall(r"\boptions\.([a-z_0-9]+)\b", path.read_text(encoding="utf-8")))
        network = read & set(network_options())
        assert all(hasattr(FinetuneOptions, name) for name in network), (path.name, network)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 0.0}, "nothing would be trained"),
        ({"mlp_lr": -1.0}, "at least 0"),
        ({"weight_update": "stochastic"}, "add --full_bf16"),
        ({"weight_update": "plain"}, "add --full_bf16"),
        ({"weight_update": "random"}, "not one of plain"),
        ({"weight_update": "stochastic", "full_fp16": True}, "rounds to bfloat16"),
        ({"kernels": "triton"}, "needs frozen weights"),
        ({"recompute": "mlp"}, "needs the fused kernels"),
        ({"fused_backward_pass": True, "gradient_accumulation_steps": 2}, "drop one of them"),
        ({"fused_backward_pass": True, "mixed_precision": "fp16"}, "loss scale"),
        ({"vram": 0.0}, "at least 0.1"),
        ({"blocks_to_swap": 2, "cpu_offload_checkpointing": True}, "exclude each other"),
        ({"full_bf16": True, "full_fp16": True}, "choose one"),
    ],
)
def test_refused_combinations(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        FinetuneOptions(**given)


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({}, {"weight_update": "fp32", "kernels": "eager"}),
        ({"full_bf16": True}, {"weight_update": "stochastic", "mixed_precision": "bf16"}),
        ({"full_fp16": True}, {"weight_update": "fp32", "mixed_precision": "fp16"}),
        ({"full_bf16": True, "weight_update": "plain"}, {"weight_update": "plain"}),
        ({"cache_text_encoder_outputs": True}, {"cache_text_encoder_outputs": True}),
        ({"learning_rate": 0.0, "mlp_lr": 1e-5}, {"trains_llm_adapter": False}),
        ({"llm_adapter_lr": 1e-6}, {"trains_llm_adapter": True, "trains_text_encoder": False}),
    ],
)
def test_settled_combinations(given, settled):
    options = FinetuneOptions(**given)
    assert {name: getattr(options, name) for name in settled} == settled
    assert dataclasses.replace(options) == options


def test_notices():
    assert any("llm_adapter_lr 0" in notice for notice in FinetuneOptions().notices)
    assert FinetuneOptions(llm_adapter_lr=0.0).notices == ()
    half = {"llm_adapter_lr": 0.0, "full_fp16": True, "mixed_precision": "fp16"}
    assert FinetuneOptions(**half).notices == ()
    plain = FinetuneOptions(**half, weight_update="plain")
    assert any("may explode" in notice for notice in plain.notices)
    fused = FinetuneOptions(llm_adapter_lr=0.0, fused_backward_pass=True)
    assert any("by itself" in notice for notice in fused.notices)
    assert not FinetuneOptions(
        llm_adapter_lr=0.0, fused_backward_pass=True, max_grad_norm=0.0
    ).notices


def test_the_written_options_repeat_the_run(tmp_path):
    options, _ = resolve_train_options(
        NEEDED | {"mlp_lr": "1e-5", "full_bf16": "true"}, cls=FinetuneOptions
    )
    (tmp_path / "run.toml").write_text(to_toml(options), encoding="utf-8")
    again, _ = resolve_train_options({}, tmp_path / "run.toml", cls=FinetuneOptions)
    assert again == options


def test_the_table_of_the_documentation():
    table = finetune_table_markdown()
    for name in (*specs(FinetuneGroup), *network_options()):
        assert table.count(f"| `--{name}` |") == 1, name
    assert "`--output_dir`" not in table


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer_type": "Prodigy", "fused_backward_pass": True}, "may look at all of them"),
        ({"optimizer_type": "Prodigy", "blocks_to_swap": 1}, "may look at all of them"),
        ({"optimizer_type": "AdamWScheduleFree", "full_bf16": True}, "--mixed_precision no"),
        ({"optimizer_type": "AdamWScheduleFree", "blocks_to_swap": 1}, "--mixed_precision no"),
        ({"optimizer_type": "Prodigy", "mlp_lr": 0.5}, "one rate for all parameters"),
        ({"optimizer_type": "AdamW", "optimizer_args": ("beta=1",)}, "refused its arguments"),
        ({"optimizer_type": "Adamm"}, "did you mean Adam"),
        ({"blocks_to_swap": 3}, "give 0 to 2"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refused_before_the_first_step(world, tmp_path, changes, words):
    for package in ("prodigyopt", "schedulefree"):
        pytest.importorskip(package)
    with pytest.raises(UserError, match=words):
        train(full_options(world, tmp_path, **changes))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(
    world, tmp_path, monkeypatch
):
    import shutil

    options = full_options(world, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    model, state = model_bytes(options), resume_bytes(options, torch.device("cpu"))
    whole = load_file(world["pretrained_model_name_or_path"])
    assert model == sum(4 * t.numel() for t in whole.values())
    frozen = dataclasses.replace(options, llm_adapter_lr=0.0)
    assert model_bytes(frozen) == model, "a frozen adapter is saved too"
    assert state == pytest.approx(3 * model, rel=0.01)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=model - 1))
    with pytest.raises(UserError, match=r"the trained model takes .* free some space"):
        train(options)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_little_room_for_states_is_told(world, tmp_path, monkeypatch, capsys):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    options = full_options(world, tmp_path)
    free = 2 * model_bytes(options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    train(options)
    assert "a resume state takes" in capsys.readouterr().err
    train(dataclasses.replace(options, autosave_minutes=0.0))
    assert "a resume state takes" not in capsys.readouterr().err


def test_the_base_model_is_never_overwritten(world, tmp_path):
    base = Path(world["pretrained_model_name_or_path"])
    before = base.read_bytes()
    with pytest.raises(UserError, match="is the base model itself"):
        train(full_options(world, base.parent, output_name=base.stem))
    assert base.read_bytes() == before


def test_small_rates_move_weights_only_without_plain_rounding(world, tmp_path):
    """Weights near 1 have steps of 1/128: updates of 1e-4 need more than rounding to nearest."""
    changed = {}
    for update in ("plain", "stochastic", "fp32"):
        result = train(
            full_options(
                world, tmp_path / update, full_bf16=True, weight_update=update,
                optimizer_args=("weight_decay=0",), learning_rate=1e-4, max_train_epochs=2,
            )
        )  # fmt: skip
        before = load_file(world["pretrained_model_name_or_path"])
        after = load_file(result.output)
        norms = [k for k in before if k.endswith("norm.weight")]
        changed[update] = sum((before[k] != after[k]).sum().item() for k in norms)
        assert all(line["loss"] > 0 for line in log_lines(result))
    assert changed["plain"] == 0
    assert changed["stochastic"] > 0


def run_cli(*words):
    return CliRunner().invoke(app, ["finetune", *words])


def test_the_command_trains(world, tmp_path):
    words = [f"--{name}={value}" for name, value in world.items()]
    done = run_cli(
        *words, f"--output_dir={tmp_path}", "--output-name=full", "--max_train_steps=2",
        "--mixed_precision=no", "--cache_latents", "--cache_text_encoder_outputs",
        "--llm_adapter_lr=0", "--device=cpu", "--seed=1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert load_file(tmp_path / "full.safetensors")
    # The options file of the run is enough to repeat it.
    (tmp_path / "full.safetensors").unlink()
    done = run_cli(f"--config_file={tmp_path / 'full.toml'}")
    assert done.exit_code == 0 and (tmp_path / "full.safetensors").exists()


def test_the_command_plans(world, tmp_path):
    words = [f"--{name}={value}" for name, value in world.items()]
    done = run_cli(
        *words, f"--output_dir={tmp_path / 'out'}", "--plan_memory", "--vram=24", "--device=cpu"
    )
    assert done.exit_code == 0, done.output
    assert "it fits" in done.output and "on the device" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network_dim=8"], "--network_dim"),
        (["--mlp_lrr=8"], "did you mean 'mlp_lr'"),
        (["--mlp_lr"], "needs a value"),
        (["--mlp_lr=fast"], "expected a number"),
        (["--vram=1000GB"], "expected a number"),
        ([], "--pretrained_model_name_or_path is required"),
    ],
)
def test_mistakes_end_with_one_line(words, message):
    done = run_cli(*words)
    assert done.exit_code == 2
    shown = done.stderr.strip()
    assert message in shown and len(shown.splitlines()) == 1


def test_no_room_ends_with_one_line_and_status_2(world, tmp_path):
    words = [f"--{name}={value}" for name, value in world.items()]
    done = run_cli(*words, f"--output_dir={tmp_path}", "--vram=0.5", "--device=cpu")
    assert done.exit_code == 2
    assert "GiB of device memory, 0.0 GiB can" in done.stderr.strip().splitlines()[-1]
