"""Importing files of kohya_ss' GUI: which panel's field counts, and what is not for Anima."""

import json
from pathlib import Path

import pytest
from migrate_fakes import enter_sources

from anima_fast.errors import UserError
from anima_fast.migrate.importer import convert
from anima_fast.migrate.ledger import DROPPED
from anima_fast.migrate.source import open_source


@pytest.fixture
def gui(tmp_path, monkeypatch):
    """A function that converts the GUI's file after changes; None takes a field out."""
    enter_sources(tmp_path, monkeypatch)
    config = json.loads(Path("gui.json").read_text(encoding="utf-8"))

    def converted(**changes):
        changed = {k: v for k, v in {**config, **changes}.items() if v is not None}
        Path("changed.json").write_text(json.dumps(changed), encoding="utf-8")
        return convert(open_source("changed.json"))

    return converted


@pytest.mark.parametrize(
    ("lora_type", "module"),
    [
        ("Anima", "networks.lora_anima"),
        ("Kohya LoHa", "networks.loha"),
        ("Kohya LoKr", "networks.lokr"),
        ("LyCORIS/LoHa", "lycoris.kohya"),
    ],
)
def test_the_type_of_network(gui, lora_type, module):
    assert gui(LoRA_type=lora_type).ledger.options["network_module"] == module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LoRA_type": "iA3"}, "'iA3' does not exist here"),
        ({"LoRA_type": None, "lllite_mlp_dim": 64}, "a ControlNet"),
        ({"LoRA_type": None, "token_string": "x"}, "textual inversion"),
    ],
)
def test_what_is_not_for_anima_is_refused(gui, changes, message):
    with pytest.raises(UserError, match=message):
        gui(**changes)


def test_fields_of_the_anima_panel_beat_those_of_others(gui):
    others = {"discrete_flow_shift": 7.0, "timestep_sampling": "sigma", "vae": "/m/sd.pt",
              "weighting_scheme": "cosmap", "guidance_scale": 3.5}  # fmt: skip
    ledger = gui(**others, anima_discrete_flow_shift=3.0, anima_timestep_sampling="shift").ledger
    found = ledger.options
    assert (found["discrete_flow_shift"], found["timestep_sampling"]) == (3.0, "shift")
    assert found["vae"] == "/m/v.safetensors" and "weighting_scheme" not in found
    assert set(others) <= {entry.key for entry in ledger.listed(DROPPED)}


def test_zero_is_not_given(gui):
    assert "seed" not in gui(seed=0).ledger.options


def test_presets_of_layers_are_to_do(gui):
    assert not any("LyCORIS_preset" in text for text in gui(LyCORIS_preset="full").ledger.todo)
    assert any("attn-mlp" in text for text in gui(LyCORIS_preset="attn-mlp").ledger.todo)


def test_the_panel_for_fine_tuning(gui):
    imported = gui(
        LoRA_type=None, train_data_dir=None, image_folder="/d/i", train_dir="/d/m",
        caption_metadata_filename="c.json", latent_metadata_filename="l.json",
        use_latent_files="No",
    )  # fmt: skip
    found = imported.ledger.options
    assert imported.command == "finetune"
    assert (found["train_data_dir"], found["in_json"]) == ("/d/i", "/d/m/c.json")


def test_names_of_the_next_lora_scripts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(
        'model_type = "anima"\nanima_training_mode = "finetune"\nqwen3 = "/m/q"\n'
        'anima_checkpoint_mode = "unsloth"\nanima_finetune_learning_rate = "1e-5"\n'
        'optimizer_type = "AdaFactor"\noptimizer_args_custom = ["relative_step=False"]\n'
    )
    imported = convert(open_source("x.toml"))
    found = imported.ledger.options
    assert imported.command == "finetune" and found["learning_rate"] == 1e-5
    assert found["unsloth_offload_checkpointing"] is True
    assert found["optimizer_args"] == ["relative_step=False"]
