"""Whole runs with LoHa, LoKr and DoRA: they learn, resume exactly, and start from files."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from stack import make_world, train_options
from tiny_dit import relative_error

from anima_fast.adapters.formats import read_lora
from anima_fast.adapters.lora import merge_lora
from anima_fast.errors import UserError
from anima_fast.models.adapter_kinds import LOHA
from anima_fast.models.dit import load_dit
from anima_fast.training.loop import train

NETWORKS = {
    "loha": {"network_module": "networks.loha"},
    "lokr": {"network_module": "networks.lokr", "network_args": ("factor=4",)},
    "dora": {"network_args": ("dora_wd=True",)},
    "lycoris": {
        "network_module": "lycoris.kohya",
        "network_args": ("algo=lokr", "decompose_both=True", "dora_wd=True", "rank_dropout=0.2"),
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def losses(folder):
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [r["loss"] for r in map(json.loads, lines) if r["kind"] == "step"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_resumed_run_is_the_uninterrupted_one(world, tmp_path, name):
    given = {**NETWORKS[name], "network_alpha": 2.0, "learning_rate": 1e-2, "max_train_epochs": 4}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(train_options(world, whole, save_every_n_epochs=2, save_state=True, **given))
    state = whole / "lora-000002-state"
    train(train_options(world, resumed, resume=str(state), **given))
    one, other = load_file(whole / "lora.safetensors"), load_file(resumed / "lora.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert losses(resumed) == losses(whole)[-len(losses(resumed)) :]
    assert losses(whole)[-1] < losses(whole)[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_its_metadata_names_it(world, tmp_path, name):
    given = {"max_train_epochs": 1, **NETWORKS[name]}
    path = train(train_options(world, tmp_path, **given)).output
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    module = given.get("network_module", "networks.lora_anima")
    assert metadata["ss_network_module"] == module
    pairs = [word.split("=", 1) for word in given.get("network_args", ())]
    assert json.loads(metadata["ss_network_args"]) == dict(pairs)


def test_a_finished_network_is_built_in_or_gone_on_with(world, tmp_path):
    """base_weights merges a LoKr; network_weights with dim_from_weights goes on with a LoHa."""
    lokr = train(train_options(world, tmp_path / "a", learning_rate=0.1, **NETWORKS["lokr"])).output
    loha = train(train_options(world, tmp_path / "b", learning_rate=0.1, **NETWORKS["loha"])).output
    result = train(
        train_options(
            world, tmp_path / "c", base_weights=(str(lokr),), base_weights_multiplier=(0.5,),
            network_weights=str(loha), dim_from_weights=True, learning_rate=1e-9,
        )
    )  # fmt: skip
    start, end = read_lora(loha)[0], read_lora(result.output)[0]
    for name, part in start.items():
        assert end[name].kind is LOHA
        assert relative_error(end[name].matrix(), part.matrix()) < 1e-4, name
    plain = load_dit(world["pretrained_model_name_or_path"], dtype=torch.float32)
    merged = load_dit(world["pretrained_model_name_or_path"], dtype=torch.float32)
    merge_lora(merged, lokr, 0.5)
    layer = "blocks.0.self_attn.q_proj"
    change = merged.get_submodule(layer).weight - plain.get_submodule(layer).weight
    assert relative_error(change.detach(), 0.5 * read_lora(lokr)[0][layer].matrix()) < 1e-4


def test_a_state_of_another_kind_is_refused(world, tmp_path):
    given = {"save_state_on_train_end": True, "max_train_epochs": 1}
    train(train_options(world, tmp_path / "a", **given, **NETWORKS["lokr"]))
    with pytest.raises(UserError, match="another network"):
        train(
            train_options(
                world, tmp_path / "b", resume=str(tmp_path / "a" / "lora-state"),
                **NETWORKS["loha"],
            )
        )  # fmt: skip
    assert not (tmp_path / "b" / "lora.safetensors").exists()


@pytest.mark.parametrize(("words", "told"), [(("full_matrix=True",), True), ((), False)])
def test_a_rank_without_effect_is_told(world, tmp_path, words, told):
    given = {"network_module": "networks.lokr", "network_dim": 2, "network_args": words}
    train(train_options(world, tmp_path, max_train_epochs=1, **given))
    assert ("no effect" in (tmp_path / "console.log").read_text(encoding="utf-8")) is told
