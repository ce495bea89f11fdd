"""What importing reads: words of shells, the command itself, and everything that it refuses."""

import os
from pathlib import Path

import pytest
from migrate_fakes import enter_sources, flat
from typer.testing import CliRunner

from anima_fast.cli import app
from anima_fast.migrate.importer import convert
from anima_fast.migrate.ledger import CHANGED
from anima_fast.migrate.shell import split_commands
from anima_fast.migrate.source import open_source


@pytest.fixture
def sources(tmp_path, monkeypatch):
    return enter_sources(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("text", "words", "folder"),
    [
        ("a --x=1 \\\n  --y 'b c' # why", ["a", "--x=1", "--y", "b c"], None),
        ("a --x=1 ^\r\n --y D:\\b\\c", ["a", "--x=1", "--y", "D:\\b\\c"], None),
        ('a `\n --y "D:\\b c\\" `\n --z', ["a", "--y", "D:\\b c\\", "--z"], None),
        ("a --x=1 \\   \n --y", ["a", "--x=1", "--y"], None),
        ("a --x=1 \\ --y", ["a", "--x=1", "--y"], None),
        ("a\n--x 1\n--y 2", ["a", "--x", "1", "--y", "2"], None),
        ("cd '/b c' && a --x", ["a", "--x"], "/b c"),
        ("cd /d D:\\b\na --x", ["a", "--x"], "D:\\b"),
        ("X=/b\na --x ${X}/c '$X'", ["a", "--x", "/b/c", "$X"], None),
        ("$x = 'D:\\b'\na --x $x\\c", ["a", "--x", "D:\\b\\c"], None),
        (
            "X='--y 1  --z=2'\na --x $X $E \"$X\"",
            ["a", "--x", "--y", "1", "--z=2", "$E", "--y 1  --z=2"],
            None,
        ),
        ("!a --x", ["a", "--x"], None),
        ('set X=--y 1 --z "b c"\na %X% --d', ["a", "--y", "1", "--z", "b c", "--d"], None),
        ('set "X=D:\\b"\na --x "%x%\\c"', ["a", "--x", "D:\\b\\c"], None),
        ("a --x 2>&1 | tee log", ["a", "--x"], None),
        ("a --x > log.txt --y", ["a", "--x", "--y"], None),
        ('& "C:\\p q\\a" --x', ["C:\\p q\\a", "--x"], None),
        ("a /b\\ c", ["a", "/b c"], None),
        ("echo it's\na --x 'b'", ["a", "--x", "b"], None),
        ("a --x 'b\nc'\nd", ["a", "--x", "b\nc"], None),
        ("a --args \"k=['x', 'y']\"", ["a", "--args", "k=['x', 'y']"], None),
        ("X=1; Y=$X; export Z=3 W=4\na $X $Y $Z $W", ["a", "1", "1", "3", "4"], None),
        ("X='--y 1'\nX+=' --z'\na $X", ["a", "--y", "1", "--z"], None),
        ("nohup a --y > log &", ["nohup", "a", "--y"], None),
        ('a "k=(1)" "" "\\$Y \\"q\\""', ["a", "k=(1)", "", '$Y "q"'], None),
        (
            '$x += "1"\n$x += " 2"\n& a $x C:\\z "k=\\"v\\"" "b`"c"',
            ["a", "1 2", "C:\\z", 'k="v"', 'b"c'],
            None,
        ),
    ],
)
def test_words_of_a_shell(text, words, folder):
    command = next(c for c in split_commands(text) if c.words[0] == words[0])
    assert list(command.words) == words and command.folder == folder


@pytest.mark.parametrize(
    ("text", "construct"),
    [
        ("X=(\n  --y 'b c'\n)\na \"${X[@]}\"", "an array"),
        ("extra+=(--z)\na", "an array"),
        ("declare -a X=(1)\na", "an array"),
        ('$x = @(\n  "--y=D:\\b c"\n)\n& a @x', "an array"),
        ("X=1\nif true; then\n  X=2\nfi\na $X", "a condition"),
        ("X=1; if true; then X=2; fi\na $X", "a condition"),
        ('$x = "1"\nif ($b) {\n  $x = "2"\n}\na $x', "a condition"),
        ("if exist x.bat call x.bat\na", "a condition"),
        ("case $x in\n  1) X=2;;\nesac\na", "a condition"),
        ("for i in 1 2; do\n  a $i\ndone", "a loop"),
        ("while true; do a; done", "a loop"),
        ("foreach ($i in 1..2) {\n  a $i\n}", "a loop"),
        ("a run_$(date +%F)", "the output of another command"),
        ('cd "$(dirname "$0")"\na', "the output of another command"),
        ("a `date +%F`", "the output of another command"),
        ('DIM="${DIM:-16}"\na $DIM', "an expansion"),
        ("a ${X%/}", "an expansion"),
        ("run() {\n  a\n}\nrun", "a function"),
        ("goto end\na", "a jump"),
        ("cat <<EOF > x.toml\nEOF\na", "a here-document"),
        ("docker run x bash -lc 'cd /b && a --y'", "a shell within the shell"),
    ],
)
def test_what_only_running_a_script_could_tell_is_refused_by_name(sources, text, construct):
    script = Path("script.sh")
    script.write_text(f"{text} anima_train_network.py --qwen3 q\n")
    done = CliRunner().invoke(app, ["import-kohya", str(script), "--out", "never.toml"])
    said = flat(done.output)
    assert done.exit_code == 2 and f"the text has {construct}" in said, said
    assert "paste the training command itself" in said and done.output.count("\n") == 1
    assert not Path("never.toml").exists()


@pytest.mark.parametrize(
    "text",
    [
        "# if x; then $(y)\na",
        "a '$(b) `c` ${d:-e}' \"if\" --for",
        'a --name "b; if c" --comment "x << y" --other "\\$(d)"',
        "@echo off\ntitle It's training\npause it's\na",
    ],
)
def test_what_is_quoted_or_a_comment_is_not_refused(text):
    assert split_commands(text)[-1].words[0] == "a"


LINE = "accelerate launch anima_train_network.py --qwen3 q "


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("echo hello", "no training command in the text"),
        ("", "the source is empty"),
        ("accelerate launch sdxl_train_network.py --x", "trains SDXL"),
        ("python flux_train.py --x", "trains FLUX.1"),
        ("python train_network.py", "trains Stable Diffusion 1 and 2"),
        ("accelerate launch wan_train_network.py", "trains Wan"),
        ("python anima_train_control_net_lllite.py", "ControlNet"),
        ("python sdxl_train_textual_inversion.py", "textual inversion"),
        ("python mytrainer_train.py", "no training script that importing knows"),
        ("python anima_train.py\npython anima_train_network.py", "2 training commands"),
        (LINE + "--vae 'x", "is never closed"),
        (LINE + "--network_dim abc", "--network_dim: expected a whole number, got 'abc'"),
        (LINE + "--network_dim", "--network_dim needs a value"),
        (LINE + "--network_module networks.lora_flux", "trains FLUX.1"),
        (LINE + "--network_module my.own", "--network_module my.own is unknown"),
        (LINE + "--network_module lycoris.kohya --network_args algo=boft", "algo=boft"),
        (LINE + "--config_file nowhere", "nowhere.toml of the command line does not exist"),
        (LINE + "--blocks_to_swap 2 --cpu_offload_checkpointing", "do not work together"),
        ("nothing.toml", "does not exist"),
        ("pictures", "is a folder"),
        ("folder.toml", "is a folder"),
    ],
)
def test_texts_that_cannot_be_imported(sources, source, message):
    Path("folder.toml").mkdir()
    done = CliRunner().invoke(app, ["import-kohya", source, "--out", "never.toml"])
    assert done.exit_code == 2 and message in flat(done.output), done.output
    assert done.output.count("\n") == 1 and not Path("never.toml").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"a": ', "not valid JSON"),
        ("a.toml", "a = [", "not valid TOML"),
        ("a.toml", 'x = "D:\\a"', "single quotes"),
        ("a.toml", b"\xff\xfe\x00\xd8", "UTF-8"),
        ("a.toml", "", "holds no settings"),
        ("a.toml", "a = 1", "nothing in it is known"),
        ("a.toml", "network_dim = 4", "does not name the text encoder"),
        ("a.toml", 'network_module = "networks.lora"', "Stable Diffusion or SDXL"),
        ("a.toml", 'network_dim = 4\nt5xxl = "x"', "FLUX.1"),
        ("a.toml", 'model_train_type = "sdxl-lora"\nnetwork_dim = 4', "sdxl-lora"),
        ("a.toml", '[model]\ntype = "wan"', "is for Wan"),
        ("a.toml", '[model]\ntype = "cosmos_predict2"\nt5_path = "x"', "Cosmos-Predict2 itself"),
        ("a.toml", '[model]\ntype = "anima"\n[adapter]\ntype = "loha"', "lora and lokr"),
        ("a.toml", '[model]\ntype = "anima"\n[adapter]\nrank = "x"\n', "expected a number"),
        ("a.toml", '[[directory]]\npath = "x"', "a dataset of diffusion-pipe"),
        ("a.toml", '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "x"', "--dataset_config"),
        ("a.yaml", "job: x", "ai-toolkit"),
        ("a.json", '[{"path": "x"}]', "concepts"),
        ("a.json", '[{"prompt": "x"}]', "samples"),
        ("a.json", '{"training_method": "LORA", "model_type": "QWEN"}', "Qwen-Image"),
        ("a.json", '{"training_method": "EMBEDDING", "model_type": "ANIMA"}', "EMBEDDING"),
        ("a.json", '{"LoRA_type": "Flux1", "flux1_checkbox": true}', "flux1"),
        ("a.json", '{"training_method": "LORA", "model_type": "ANIMA", "peft_type": "OFT_2"}',
         "OFT_2"),
        ("a.json", '{"training_method": "LORA", "model_type": "ANIMA", "resolution": "big"}',
         "expected sides"),
        ("a.json", '{"training_method": "LORA", "model_type": "ANIMA", "concepts": [{"path": 1, '
         '"text": {"enable_tag_shuffling": true, "keep_tags_count": "x"}}]}', "nobody expects"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_imported(sources, name, content, message):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = CliRunner().invoke(app, ["import-kohya", name, "--out", "never.toml"])
    assert done.exit_code == 2 and message in flat(done.output), done.output
    assert done.output.count("\n") == 1 and not Path("never.toml").exists()


def test_the_command_line(sources):
    """Quoted, in words, from standard input, and under the shorter name."""
    line = Path("lokr.txt").read_text().strip()
    runner = CliRunner()
    calls = [
        (["import-kohya", line], None),
        (["import-kohya", "--force", *line.replace('"', "").split()], None),
        (["import-kohya", "-", "--force"], line),
        (["import", "lokr.txt", "--force", "--out", "imported_anima.toml"], None),
    ]
    texts = []
    for words, given in calls:
        done = runner.invoke(app, words, input=given)
        assert done.exit_code == 0, done.output
        texts.append(Path("imported_anima.toml").read_text().split("\n\n", 1)[1])
    assert len(set(texts)) == 1
    bad = runner.invoke(app, ["import-kohya", line, "--cwd", "nowhere"])
    assert bad.exit_code == 2 and "--cwd" in bad.output


def test_the_folder_of_a_script(sources):
    Path("b.bat").write_text(
        "@echo off\nset DATA=%~dp0pictures\naccelerate launch anima_train_network.py "
        '--train_data_dir="%DATA%" --output_dir=%~dp0out\n'
    )
    ledger = convert(open_source("b.bat")).ledger
    here = str(sources.resolve())
    assert ledger.options["train_data_dir"] == f"{here}{os.sep}pictures"
    assert ledger.options["output_dir"] == f"{here}{os.sep}out"


def test_limits_of_noise_levels_that_did_nothing_there(sources):
    line = "accelerate launch anima_train_network.py --min_timestep 200 --max_timestep 1000"
    ledger = convert(open_source(line)).ledger
    assert (ledger.options["min_timestep"], ledger.options["max_timestep"]) == (200, 1000)
    changed = [e for e in ledger.listed(CHANGED) if "limits the noise levels here" in e.why]
    assert [e.option for e in changed] == ["min_timestep"]


def test_a_number_that_the_shell_knows_is_to_do(sources):
    line = "accelerate launch anima_train_network.py --seed=$SEED --network_dim=8"
    ledger = convert(open_source(line)).ledger
    assert "seed" not in ledger.options and ledger.options["network_dim"] == 8
    assert "write seed into the file: $SEED is of your shell" in ledger.todo


def test_an_empty_text_is_not_given(sources):
    ledger = convert(open_source(LINE + "--sample_prompts '' --attn_mode ''")).ledger
    assert not {"sample_prompts", "attn_mode"} & ledger.options.keys()
    assert not any("attn_mode" in text for text in ledger.todo)
