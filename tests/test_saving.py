"""Saving: neither long metadata nor a state that fails may cost the trained weights."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stack import make_world, train_options

from anima_fast.adapters.formats import with_hashes
from anima_fast.adapters.metadata import METADATA_BYTES
from anima_fast.data import summary
from anima_fast.errors import UserError
from anima_fast.training import checkpoints, lora
from anima_fast.training.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("key", ["ss_tag_frequency", "note"])
def test_metadata_larger_than_a_header_is_cut_and_says_so(key):
    found = with_hashes({"a": torch.zeros(1)}, {key: "x" * 100_000_001, "ss_steps": "4"})
    assert "left out: 100000003 bytes" in found[key] and found["ss_steps"] == "4"
    assert sum(map(len, found.values())) < METADATA_BYTES


def test_names_that_are_no_unicode_are_written_with_backslashes():
    found = with_hashes({"a": torch.zeros(1)}, {"ss_folder": "a\udc83"})
    assert found["ss_folder"] == r"a\udc83"


def test_of_very_many_tags_the_most_frequent_are_kept(world, tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "TAG_BYTES", 50)
    found = header(train(train_options(world, tmp_path, max_train_epochs=1)).output)
    (tags,) = json.loads(found["ss_tag_frequency"]).values()
    # Of "picture N", "red tree", "blue sky" and "number N" in five captions.
    assert tags == {"red tree": 5, "blue sky": 5}
    assert found["ss_tag_frequency_left_out"] == "10"
    assert json.loads(found["ss_datasets"])[0]["tag_frequency_left_out"] == 10


def test_metadata_that_cannot_be_made_is_left_out(world, tmp_path, monkeypatch, caplog):
    def broken(_plan):
        raise RuntimeError("too deep")

    monkeypatch.setattr(lora, "summarise", broken)
    monkeypatch.setattr(logging.getLogger("anima_fast"), "propagate", True)
    result = train(train_options(world, tmp_path, max_train_epochs=1))
    assert len(load_file(result.output)) == 60
    found = header(result.output)
    assert found["ss_network_dim"] == "4" and "ss_steps" not in found
    assert "lora.safetensors was saved without its metadata: RuntimeError: too deep" in caplog.text


def test_the_summary_of_the_data_is_made_once(world, tmp_path, monkeypatch):
    made, real = [], lora.summarise
    monkeypatch.setattr(lora, "summarise", lambda plan: made.append(plan) or real(plan))
    train(train_options(world, tmp_path, max_train_epochs=1, save_every_n_steps=1))
    assert len(made) == 1 and len(list(tmp_path.glob("*.safetensors"))) == 4


@pytest.mark.parametrize("save", ["final", "interrupted", "after_step"])
def test_a_state_that_fails_does_not_cost_the_weights(tmp_path, monkeypatch, save):
    saved = []

    def refused(*_args, **_kwargs):
        saved.append("state")
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoints, "save_state", refused)
    monkeypatch.setattr(
        checkpoints.Checkpoints, "_save_weights", lambda _self, stem: saved.append(stem)
    )
    options = train_options({}, tmp_path, save_state=True, save_every_n_steps=3)
    training = SimpleNamespace(saves_whole_model=False)
    run = SimpleNamespace(
        folder=tmp_path, options=options, training=training, length=SimpleNamespace(steps=9)
    )
    with pytest.raises(UserError, match="full"):
        getattr(checkpoints.Checkpoints(run, SimpleNamespace(step=3)), save)()
    assert saved == ["state", "lora" if save == "final" else "lora-step00000003"]
