"""Importing OneTrainer's concepts and optimizers: what would be wrong without a word."""

import json
from pathlib import Path

import pytest
from migrate_fakes import enter_sources

from anima_fast.migrate.importer import convert
from anima_fast.migrate.ledger import DROPPED, OFF
from anima_fast.migrate.source import open_source


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A function that converts a LoRA's configuration with these concepts after changes."""
    folder = enter_sources(tmp_path, monkeypatch)
    for name in ("pictures/a/1.png", "pictures/b/2.png"):
        (folder / name).parent.mkdir()
        (folder / name).touch()

    def converted(*concepts, **changes):
        config = {"model_type": "ANIMA", "training_method": "LORA", "resolution": "1024", **changes}
        Path("x.json").write_text(json.dumps(config | {"concepts": list(concepts)}))
        return convert(open_source("x.json")).ledger

    return converted


def dropped(ledger):
    return {entry.key: entry.why for entry in ledger.listed(DROPPED)}


def test_prior_prediction_is_no_training_on_the_images(whole):
    prior = {"name": "old", "path": "pictures/b", "type": "PRIOR_PREDICTION"}
    ledger = whole({"path": "pictures/a", "type": "STANDARD"}, prior)
    subsets = ledger.dataset["datasets"][0]["subsets"]
    assert [Path(subset["image_dir"]).name for subset in subsets] == ["a"]
    assert "own predictions" in dropped(ledger)["concepts[1].path"]
    assert any("old" in text and "is_reg" in text for text in ledger.todo)


def test_samples_an_epoch_count_the_folders_below(whole):
    ledger = whole({"path": "pictures", "include_subdirectories": True, "balancing": 6.0,
                    "balancing_strategy": "SAMPLES"})  # fmt: skip
    subsets = ledger.dataset["datasets"][0]["subsets"]
    assert [subset["num_repeats"] for subset in subsets] == [3, 3]


def test_what_is_off_and_what_has_no_counterpart_are_told_apart(whole):
    text = {"enable_tag_shuffling": False, "tag_dropout_enable": False,
            "tag_dropout_probability": 0.3}  # fmt: skip
    image = {"enable_crop_jitter": True, "resolution_override": "512"}
    why = dropped(whole({"path": "pictures/a", "text": text, "image": image,
                         "text_variations": 4}))  # fmt: skip
    assert "centred" in why["concepts[0].image.enable_crop_jitter"]
    for key in ("image.resolution_override", "text.tag_dropout_probability", "text_variations"):
        assert why[f"concepts[0].{key}"].endswith("belongs to what is off")


def test_variations_of_shuffled_captions(whole):
    shuffled = {"enable_tag_shuffling": True}
    ledger = whole(
        {"path": "pictures/a", "text": shuffled, "text_variations": 2},
        {"path": "pictures/b", "text": shuffled, "text_variations": 5},
    )
    assert ledger.options["caption_variants"] == 5


def test_a_concept_of_several_resolutions_makes_epochs_longer(whole):
    own = {"enable_resolution_override": True, "resolution_override": "512,768"}
    ledger = whole({"path": "pictures/a", "image": own}, epochs=50)
    assert ledger.options["max_train_epochs"] == 25
    ledger = whole({"path": "pictures/a", "image": own}, {"path": "pictures/b"}, epochs=50)
    assert ledger.options["max_train_epochs"] == 50
    assert any("adapt num_repeats" in text for text in ledger.todo)


def test_eps_of_an_unknown_optimizer_is_not_taken_over(whole):
    came = {"optimizer": "CAME", "beta1": 0.9, "beta2": 0.999, "eps": 1e-30, "weight_decay": 0.02}
    ledger = whole({"path": "pictures/a"}, optimizer=came)
    assert ledger.options["optimizer_args"] == ["weight_decay=0.02"]
    assert {"optimizer.eps", "optimizer.beta1"} <= set(dropped(ledger))


def test_what_is_not_used_is_not_called_taken_over(whole):
    sample = {"prompt": "a", "seed": 5, "random_seed": True}
    concept = {"path": "pictures/a", "text": {"prompt_source": "filename"}}
    ledger = whole(concept, samples=[sample], sample_after_unit="EPOCH")
    assert ledger.options["sample_prompt"] == ["a"]
    assert {"samples[0].seed", "concepts[0].text.prompt_source"} <= set(dropped(ledger))


def test_null_is_not_set(whole):
    ledger = whole({"path": "pictures/a"}, train_device=None)
    assert "device" not in ledger.options
    assert dropped(ledger)["train_device"] == OFF


def test_the_rate_of_the_transformer_beats_the_other(whole):
    ledger = whole({"path": "pictures/a"}, learning_rate=3e-4, transformer={"learning_rate": 1e-4})
    assert ledger.options["learning_rate"] == 1e-4
    assert dropped(ledger)["learning_rate"] == "transformer.learning_rate beats it"
