"""run.json and console.log: what others learn of a run from plain files."""

import json
import os

import pytest
from stack import make_world, train_options

from anima_fast.console import ConsoleLog
from anima_fast.errors import UserError
from anima_fast.training import loop
from anima_fast.training.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def facts(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def console(folder):
    return (folder / "console.log").read_text(encoding="utf-8").splitlines()


def test_a_finished_run(world, tmp_path, monkeypatch):
    during = []
    real = loop.run_steps

    def watched(*args, **kwargs):
        during.append(facts(tmp_path))
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "run_steps", watched)
    result = train(train_options(world, tmp_path))
    found = facts(tmp_path)
    assert (during[0]["state"], found["state"]) == ("running", "finished")
    assert found["final"] == result.output.name and found["error"] is None
    assert found["pid"] == os.getpid() and found["steps"] == result.steps
    assert found["updated_at"] > found["started_at"] == during[0]["started_at"]
    assert found["images"] == 5 and found["base_model"] == "dit.safetensors"
    lines = console(tmp_path)
    assert all(line[4] == "-" and line[10] == " " and line[19] == " " for line in lines)
    assert any("loading the DiT" in line for line in lines)
    assert any(f"step {result.steps}/{result.steps}" in line for line in lines)


def test_a_failed_run_names_its_error(world, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise UserError("the disk is\nfull")

    monkeypatch.setattr(loop, "run_steps", broken)
    with pytest.raises(UserError):
        train(train_options(world, tmp_path))
    found = facts(tmp_path)
    assert found["state"] == "failed" and found["error"] == "the disk is full"
    assert console(tmp_path)[-1][20:] == "error: the disk is full"


@pytest.mark.parametrize(
    ("error", "words"),
    [(UserError("a file\nis missing"), "error: a file is missing"),
     (KeyError("x"), "error: KeyError: 'x'"), (KeyboardInterrupt(), "interrupted")],
)  # fmt: skip
def test_a_run_that_ends_while_it_prepares_says_so(world, tmp_path, monkeypatch, error, words):
    def broken(_options, *, seed, say, saved):
        say("reading the dataset")
        raise error

    monkeypatch.setattr(loop, "prepare", broken)
    with pytest.raises(type(error)):
        train(train_options(world, tmp_path))
    assert [line[20:] for line in console(tmp_path)] == ["reading the dataset", words]


def test_a_command_refused_at_once_makes_no_folder(world, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        train(train_options({**world, "vae": "absent.safetensors"}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_fresh_run_moves_the_old_lines_aside_and_a_resumed_one_adds(world, tmp_path):
    train(train_options(world, tmp_path, max_train_epochs=1, save_state_on_train_end=True))
    first = console(tmp_path)
    state = str(tmp_path / "lora-state")
    train(train_options(world, tmp_path, max_train_epochs=2, resume=state))
    assert console(tmp_path)[: len(first)] == first and len(console(tmp_path)) > len(first)
    assert facts(tmp_path)["first_step"] > 0
    train(train_options(world, tmp_path, max_train_epochs=1))
    assert (tmp_path / "console.previous.log").exists()
    assert not any("resumed from" in line for line in console(tmp_path))


def test_a_folder_that_refuses_stops_nothing(tmp_path):
    (tmp_path / "console.log").mkdir()
    log = ConsoleLog(str(tmp_path), fresh=False)
    log.write("one\ntwo")
    assert (tmp_path / "console.log").is_dir()
