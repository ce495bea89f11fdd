"""A new run destroys nothing of the one before it."""

import dataclasses
from pathlib import Path

import pytest
from safetensors import safe_open
from stack import make_world, train_options

from anima_fast.errors import UserError
from anima_fast.training import previous
from anima_fast.training.loop import train
from anima_fast.training.previous import left_behind, run_of, set_aside
from anima_fast.training.state_files import state_record


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_run_moves_the_last_one_aside(world, tmp_path, capsys):
    options = train_options(world, tmp_path, max_train_epochs=2, save_every_n_epochs=1)
    train(options)
    names = ("lora.safetensors", "lora-000001.safetensors", "lora-state")
    before = {k: v for k, v in contents(tmp_path).items() if k.startswith(names)}
    capsys.readouterr()
    result = train(dataclasses.replace(options, max_train_epochs=1, learning_rate=1e-4))
    told = capsys.readouterr().err
    assert "a finished run of 8 steps is here: --resume auto goes on with it" in told
    (aside,) = (tmp_path / "previous").iterdir()
    assert contents(aside) == before and str(aside) in told
    assert not (tmp_path / "lora-000001.safetensors").exists()
    with safe_open(result.output, framework="pt") as file:
        assert file.metadata()["ss_run_id"] == run_of(tmp_path / "lora-state")
    assert run_of(aside / "lora.safetensors") == run_of(aside / "lora-state") is not None
    assert state_record(tmp_path / "lora-state")["position"]["step"] == 4


def test_an_unfinished_run_is_told_and_a_refused_one_moves_nothing(world, tmp_path, capsys):
    options = train_options(world, tmp_path, max_train_epochs=1, save_every_n_steps=3)
    train(dataclasses.replace(options, save_state=True))
    for path in (tmp_path / "lora-state").iterdir():
        path.unlink()
    before = contents(tmp_path)
    capsys.readouterr()
    with pytest.raises(UserError, match="does not exist"):
        train(dataclasses.replace(options, vae="absent.safetensors"))
    assert "an unfinished run at step 3 is here" in capsys.readouterr().err
    kept = {k: v for k, v in contents(tmp_path).items() if not k.startswith("console")}
    assert kept == {k: v for k, v in before.items() if not k.startswith("console")}


def test_a_run_that_resumes_moves_only_what_is_of_another(world, tmp_path):
    options = train_options(world, tmp_path, max_train_epochs=1)
    train(options)
    own = run_of(tmp_path / "lora-state")
    (tmp_path / "lora-000009.safetensors").write_bytes(b"of nobody")
    set_aside(options, own, fresh=False, say=print)
    assert not (tmp_path / "previous").exists()
    set_aside(options, "another", fresh=False, say=print)
    (aside,) = (tmp_path / "previous").iterdir()
    assert sorted(p.name for p in aside.iterdir()) == ["lora-state", "lora.safetensors"]
    assert (tmp_path / "lora-000009.safetensors").exists()


def test_a_file_with_more_steps_than_the_state_is_named(world, tmp_path, capsys):
    options = train_options(world, tmp_path, max_train_epochs=1, save_every_n_steps=2)
    train(dataclasses.replace(options, save_state=True))
    for path in (tmp_path / "lora-state").iterdir():
        path.unlink()
    capsys.readouterr()
    train(dataclasses.replace(options, resume="auto"))
    told = "lora.safetensors is of step 4: the steps after 2 had no state and are made again"
    assert told in capsys.readouterr().err


def test_the_state_of_another_network_is_refused_with_the_ways_on(world, tmp_path):
    options = train_options(world, tmp_path, max_train_epochs=1)
    train(options)
    before = contents(tmp_path / "lora-state")
    with pytest.raises(UserError, match=r"rank.*or no --resume: a new run moves the old one aside"):
        train(dataclasses.replace(options, network_dim=8, max_train_epochs=2, resume="auto"))
    assert contents(tmp_path / "lora-state") == before


def test_what_the_new_run_starts_from_stays(tmp_path):
    for name in ("lora.safetensors", "lora-best.safetensors", "lora2.safetensors", "x-state"):
        (tmp_path / name).write_bytes(b"")
    options = train_options({}, tmp_path, network_weights=str(tmp_path / "lora.safetensors"))
    assert [path.name for path in left_behind(options)] == ["lora-best.safetensors"]


def test_a_large_size_is_told_and_no_folder_is_used_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(previous, "LARGE", 1)
    monkeypatch.setattr(previous.time, "strftime", lambda _form: "now")
    said, options = [], train_options({}, tmp_path)
    for _ in range(2):
        (tmp_path / "lora.safetensors").write_bytes(bytes(2))
        set_aside(options, "x", fresh=True, say=said.append)
    assert [p.name for p in sorted((tmp_path / "previous").iterdir())] == ["lora-now", "lora-now-2"]
    assert "(0.0 GB)" in said[0]
