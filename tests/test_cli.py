"""The command line: the words that existing users type, help pages, exit statuses."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.options import files as option_files
from anima_fast.options.command_line import read_words
from anima_fast.options.declare import specs
from anima_fast.options.other_names import BARE_FLAGS
from anima_fast.options.run import TrainOptions
from anima_fast.options.sample import SampleOptions

ROOT = Path(__file__).parent.parent

DOCUMENTED = """
--pretrained_model_name_or_path=DIT --qwen3=DIR --vae=VAE --dataset_config=data.toml
--output_dir=OUT --output_name=my_anima_lora --save_model_as=safetensors
--network_module=networks.lora_anima --network_dim=8 --learning_rate=1e-4
--optimizer_type="AdamW8bit" --lr_scheduler="constant" --timestep_sampling="sigmoid"
--discrete_flow_shift=1.0 --max_train_epochs=10 --save_every_n_epochs=1 --mixed_precision="bf16"
--gradient_checkpointing --cache_latents --cache_text_encoder_outputs --vae_chunk_size=64
--vae_disable_cache
"""
NEEDED = (
    "--pretrained_model_name_or_path=d --qwen3=q --vae=v --dataset_config=c.toml --output_dir=o"
)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def fake(monkeypatch, name, **members):
    """Put a module with these members in the place of a real one."""
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def trained(monkeypatch):
    """The options that `anima-fast train` hands to the loop."""
    calls = []

    def record(options):
        calls.append(options)
        return SimpleNamespace(interrupted_by=None)

    # The loop itself is tested elsewhere; here only what it is given counts.
    fake(monkeypatch, "anima_fast.training.loop", train=record)
    return calls


def train(words, *more):
    return invoke("train", *shlex.split(words), *more)


def test_the_documented_command_unchanged(trained):
    done = train(DOCUMENTED)
    assert done.exit_code == 0, done.output
    (options,) = trained
    expected = TrainOptions(
        pretrained_model_name_or_path="DIT",
        qwen3="DIR",
        vae="VAE",
        dataset_config="data.toml",
        output_dir="OUT",
        output_name="my_anima_lora",
        save_model_as="safetensors",
        network_module="networks.lora_anima",
        network_dim=8,
        learning_rate=1e-4,
        optimizer_type="AdamW8bit",
        lr_scheduler="constant",
        timestep_sampling="sigmoid",
        discrete_flow_shift=1.0,
        max_train_epochs=10,
        save_every_n_epochs=1,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        cache_latents=True,
        cache_text_encoder_outputs=True,
        vae_chunk_size=64,
        vae_disable_cache=True,
    )
    assert options == expected
    assert options.network_train_unet_only
    assert "only the DiT is trained" in " ".join(done.output.split())


def test_hyphens_do_the_same(trained):
    hyphened = " ".join(
        word.split("=")[0].replace("_", "-") + ("=" + word.split("=")[1] if "=" in word else "")
        for word in shlex.split(DOCUMENTED)
    )
    assert train(DOCUMENTED).exit_code == 0
    assert train(hyphened).exit_code == 0
    assert trained[0] == trained[1]


def test_command_line_beats_file(trained, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[a]\nnetwork_dim = 32\nlearning-rate = 0.5\ncache_latents = true\n")
    done = train(NEEDED, "--config_file", path, "--network-dim", "8", "--cache_latents=false")
    assert done.exit_code == 0, done.output
    assert trained[0].network_dim == 8
    assert trained[0].learning_rate == 0.5
    assert trained[0].cache_latents is False


def test_word_lists(trained):
    done = train(
        NEEDED + " --network_args verbose=True rank_dropout=0.1 --optimizer-args betas=0.9,0.99"
        " weight_decay=0 --text_encoder_lr 1e-5 2e-5 --network_args module_dropout=0.2 --seed 3"
    )
    assert done.exit_code == 0, done.output
    assert trained[0].network_args == ("verbose=True", "rank_dropout=0.1", "module_dropout=0.2")
    assert trained[0].optimizer_kwargs == {"betas": (0.9, 0.99), "weight_decay": 0}
    assert trained[0].text_encoder_lr == (1e-5, 2e-5)
    assert trained[0].seed == 3


KNOWN = specs(TrainOptions)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--network_dim 8", {"network_dim": "8"}),
        ("--network_dim 8 --network-dim=9", {"network_dim": "9"}),
        ("--cache_latents", {"cache_latents": "true"}),
        ("--cache_latents=True --seed 1", {"cache_latents": "True", "seed": "1"}),
        ("--cache_latents false --seed 1", {"cache_latents": "false", "seed": "1"}),
        ("--logit_mean -0.5", {"logit_mean": "-0.5"}),
        ("--caption_prefix=--x", {"caption_prefix": "--x"}),
        ("--caption_prefix '-- a'", {"caption_prefix": "-- a"}),
        ("--output_name=a=b", {"output_name": "a=b"}),
        ("--network_args=a=1 b=2", {"network_args": ["a=1", "b=2"]}),
        ("--network_args a=1 --seed 1", {"network_args": ["a=1"], "seed": "1"}),
        ("--v2 --clip_skip 2 --seed 1", {"v2": "true", "clip_skip": "2", "seed": "1"}),
        ("", {}),
    ],
)
def test_words(words, values):
    others = option_files.OTHER_NAMES
    assert read_words(shlex.split(words), KNOWN, others=others, flags=BARE_FLAGS) == values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--netwrk_dim 8", "did you mean 'network_dim'"),
        ("--network_dim", "needs a value"),
        ("--network_dim --seed 1", "needs a value"),
        ("--network_args --seed 1", "at least one value"),
        ("--seed 1 2", "unexpected word '2'"),
        ("--v2 2", "unexpected word '2'"),
        ("data.toml", "unexpected word 'data.toml'"),
        ("-x", "unexpected word '-x'"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(UserError, match=message):
        read_words(shlex.split(words), KNOWN, others=option_files.OTHER_NAMES, flags=BARE_FLAGS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--pretrained_model_name_or_path is required"),
        (NEEDED + " --netwrk_dim=8", "did you mean 'network_dim'"),
        (NEEDED + " --fp8_base", "--fp8_base: 8-bit base weights are not supported yet"),
        (NEEDED + " --sample_every_n_steps 5", "previews need --sample_prompts"),
        (NEEDED + " --torch_compile", "use --compile"),
        (NEEDED + " --network_dim=eight", "expected a whole number, got 'eight'"),
        (NEEDED + " --loss_type l9", "is not one of l2, l1, huber, smooth_l1"),
        (NEEDED + " --config_file nothing", "nothing.toml does not exist"),
        (NEEDED + " --network_module networks.locon", "use one of networks.lora_anima"),
        (NEEDED + " --lr_warmup_steps 5", "constant_with_warmup"),
        (NEEDED + " --attn_mode sageattn", "no backward pass"),
    ],
)
def test_bad_input_is_one_line_and_status_2(trained, words, message):
    done = train(words)
    assert done.exit_code == 2, done.output
    assert trained == []
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and message in lines[0]


def test_ignored_option_warns_and_trains(trained):
    done = train(NEEDED + " --clip_skip 2 --xformers")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("clip_skip is ignored") == 1
    assert trained[0].attn_mode == "xformers"


def test_output_config_writes_and_stops(trained, tmp_path):
    path = tmp_path / "saved"
    done = train(f"--network_dim=8 --output_config --config_file {path}")
    assert done.exit_code == 0, done.output
    assert trained == []
    assert "network_dim = 8" in (tmp_path / "saved.toml").read_text()
    done = train(f"--network_dim=8 --output_config --config_file {path}")
    assert done.exit_code == 2 and "exists" in done.stderr


def test_a_ctrl_c_before_the_loop_is_130(monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    fake(monkeypatch, "anima_fast.training.loop", train=interrupt)
    done = train(NEEDED)
    assert done.exit_code == 130
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("signal", "status"), [(2, 130), (15, 143)])
def test_a_run_that_saved_and_left_on_a_signal(monkeypatch, signal, status):
    result = SimpleNamespace(interrupted_by=signal)
    fake(monkeypatch, "anima_fast.training.loop", train=lambda _: result)
    assert train(NEEDED).exit_code == status


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(_):
        raise RuntimeError("a defect")

    fake(monkeypatch, "anima_fast.training.loop", train=fail)
    done = train(NEEDED)
    assert isinstance(done.exception, RuntimeError)


def test_train_help_has_every_option_and_group(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    done = invoke("train", "--help")
    assert done.exit_code == 0
    text = done.output
    for name, spec in KNOWN.items():
        assert f"--{name} " in text, name
        assert f" {spec.group} ─" in text, spec.group
    assert "--config_file" in text


@pytest.mark.parametrize(
    "command", ["train", "convert", "inspect", "sample", "download", "doctor", "demo"]
)
def test_every_command_has_help(command):
    assert command in invoke("--help").output
    done = invoke(command, "--help")
    assert done.exit_code == 0 and "Usage" in done.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a b", ("a", "b", None, False, False)),
        ("--input a --output b", ("a", "b", None, False, False)),
        ("--input a b --to comfyui", ("a", "b", "comfyui", False, False)),
        ("a --output b --reverse", ("a", "b", None, True, False)),
        ("--fold-alpha a b", ("a", "b", None, False, True)),
        ("--fold_alpha a b", ("a", "b", None, False, True)),
    ],
)
def test_convert_takes_both_spellings(monkeypatch, words, expected):
    calls = []

    def convert_file(src, dst, to=None, reverse=False, fold_alpha=False):
        calls.append((str(src), str(dst), to, reverse, fold_alpha))

    fake(monkeypatch, "anima_fast.tools.convert", convert_file=convert_file)
    done = invoke("convert", *words.split())
    assert done.exit_code == 0, done.output
    assert calls == [expected]


@pytest.mark.parametrize(
    "words",
    ["a", "", "--input a", "a b --to x", "a b --to comfyui --reverse", "a b --input c --output d"],
)
def test_convert_refuses(monkeypatch, words):
    fake(monkeypatch, "anima_fast.tools.convert", convert_file=None)
    done = invoke("convert", *words.split())
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "words", ["merge --foo", "extract a", "tarin", "resize a --rank x", "bench foo", "inspect a b"]
)
def test_words_that_no_command_knows_are_one_line(words):
    done = invoke(*words.split())
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "--help`" in done.stderr


@pytest.mark.parametrize("words", ["-h", "merge -h", "train -h", "bench model -h"])
def test_a_short_word_for_help(words):
    done = invoke(*words.split())
    assert done.exit_code == 0 and "Usage" in done.output


def test_a_group_without_a_command_shows_its_page():
    assert "Usage" in invoke("bench").output


def test_sample(monkeypatch):
    calls = []
    fake(monkeypatch, "anima_fast.sampling", run_sample=calls.append)
    models = "--dit d --qwen3 q --vae v"
    done = invoke(
        "sample", *shlex.split(models + " --prompt 'a [red] fox' --lora a.st:0.5 b.st --cfg=1"),
        "--negative-prompt", "blur", "--seed", "3", "--width", "512",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert calls[0] == SampleOptions(
        dit="d", qwen3="q", vae="v", prompt="a [red] fox", lora=("a.st:0.5", "b.st"), cfg=1.0,
        negative_prompt="blur", seed=3, width=512,
    )  # fmt: skip
    done = invoke("sample", "--dit", "d", "--prompt", "x")
    assert done.exit_code == 2 and "--qwen3 is required" in done.stderr
    done = invoke("sample", "--promt", "x")
    assert done.exit_code == 2 and "did you mean 'prompt'" in done.stderr


def run(*words, **more):
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
        timeout=120, **more,
    )  # fmt: skip


def test_the_module_runs_and_nothing_heavy_is_imported_for_help():
    check = (
        "import sys, anima_fast.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'PIL', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for words in (["--help"], ["train", "--help"], ["--version"]):
        done = run("-c", check, *words)
        assert done.returncode == 0, done.stderr
        assert "anima-fast" in done.stdout
    done = run("-m", "anima_fast", "--version")
    assert done.returncode == 0 and done.stdout.startswith("anima-fast ")


def test_an_error_in_a_process_of_its_own():
    done = run("-m", "anima_fast", "train", "--fp8_base")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --fp8_base") and done.stderr.count("\n") == 1


def test_lazy_exports():
    done = run(
        "-c",
        "import sys, anima_fast\n"
        "assert 'torch' not in sys.modules\n"
        "assert anima_fast.TrainOptions().network_dim == 4\n"
        "assert issubclass(anima_fast.UserError, ValueError)\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(anima_fast.__all__) <= set(dir(anima_fast))\n"
        "try: anima_fast.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise SystemExit('no AttributeError')\n",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["load_dit", "load_llm_adapter", "load_vae", "load_text_encoder"])
def test_exported_loaders_exist(name):
    import anima_fast

    assert callable(getattr(anima_fast, name))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk as a device")
def test_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "anima_fast", "presets"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "error: the output cannot be written: No space left on device\n"
    assert done.returncode == 2
