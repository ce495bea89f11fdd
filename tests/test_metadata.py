"""What a trained file says about itself, read from the header of a real run's LoRA."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from stack import make_config, make_images, make_world, train_options

from anima_fast.adapters.metadata import training_metadata
from anima_fast.training.loop import train


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    world = make_world(folder / "world", subset="num_repeats = 2")
    options = train_options(
        world, folder / "out", max_train_epochs=1, network_args=("rank_dropout=0.1",),
        optimizer_args=("weight_decay=0.01",), metadata_author="me", metadata_trigger_phrase="zxc",
        training_comment="a comment", min_timestep=100, gradient_accumulation_steps=2,
    )  # fmt: skip
    return options, header(train(options).output)


def test_values_are_those_of_the_run(run):
    options, metadata = run
    assert metadata["ss_output_name"] == "lora" and metadata["ss_seed"] == "7"
    assert metadata["ss_base_model_version"] == "anima" and metadata["ss_v2"] == "False"
    assert metadata["ss_network_module"] == "networks.lora_anima"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4")
    assert json.loads(metadata["ss_network_args"]) == {"rank_dropout": "0.1"}
    assert metadata["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.01)"
    assert metadata["ss_learning_rate"] == "0.001" and metadata["ss_unet_lr"] == "None"
    assert metadata["ss_num_train_images"] == "10" and metadata["ss_epoch"] == "1"
    # Ten images in batches of two in three buckets; every second batch is stepped.
    batches = int(metadata["ss_num_batches_per_epoch"])
    assert int(metadata["ss_steps"]) == -(-batches // 2) == int(metadata["ss_max_train_steps"])
    assert metadata["ss_training_comment"] == "a comment"
    assert float(metadata["ss_training_finished_at"]) >= float(metadata["ss_training_started_at"])
    assert metadata["ss_timestep_sampling"] == options.timestep_sampling
    assert metadata["ss_discrete_flow_shift"] == str(options.discrete_flow_shift)


def test_the_data_is_described(run):
    _, metadata = run
    tags = json.loads(metadata["ss_tag_frequency"])
    assert tags == {"images": {**tags["images"], "red tree": 5, "number 3": 1}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"images": {"n_repeats": 2, "img_count": 5}}
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["subsets"][0]["custom_attributes"] == {}
    assert dataset["resolution"] == [64, 64] and dataset["subsets"][0]["num_repeats"] == 2
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"]
    assert sum(bucket["count"] for bucket in buckets.values()) == 10


def test_no_path_of_the_machine_is_written(run, tmp_path_factory):
    _, metadata = run
    assert str(tmp_path_factory.getbasetemp()) not in json.dumps(metadata)


def test_base_files_are_named_with_their_hashes(run):
    options, metadata = run
    for option, name in (("pretrained_model_name_or_path", "sd_model"), ("vae", "vae")):
        data = Path(getattr(options, option)).read_bytes()
        assert metadata[f"ss_{name}_name"] == Path(getattr(options, option)).name
        assert metadata[f"ss_new_{name}_hash"] == hashlib.sha256(data).hexdigest()
        short = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
        assert metadata[f"ss_{name}_hash"] == short


def test_modelspec(run):
    _, metadata = run
    spec = {k.removeprefix("modelspec."): v for k, v in metadata.items() if "modelspec." in k}
    assert spec["sai_model_spec"] == "1.0.1" and spec["architecture"] == "anima-preview/lora"
    assert spec["title"] == "lora" and spec["author"] == "me" and spec["trigger_phrase"] == "zxc"
    assert spec["prediction_type"] == "epsilon" and spec["timestep_range"] == "100,1000"
    assert spec["resolution"] == "1024x1024" and len(spec["date"]) == len("2026-01-01T00:00:00")
    assert "license" not in spec


def test_every_key_of_the_published_list_is_there(run):
    _, metadata = run
    names = """
        session_id training_started_at training_finished_at output_name sd_scripts_commit_hash
        seed steps epoch num_epochs max_train_steps num_train_images num_validation_images
        num_reg_images num_batches_per_epoch datasets tag_frequency dataset_dirs bucket_info
        reg_dataset_dirs caption_dropout_rate caption_dropout_every_n_epochs
        caption_tag_dropout_rate face_crop_aug_range resize_interpolation validation_seed
        validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps
        learning_rate unet_lr text_encoder_lr optimizer lr_scheduler lr_warmup_steps max_grad_norm
        gradient_checkpointing gradient_accumulation_steps mixed_precision full_fp16 fp8_base
        fp8_base_unet lowram cache_latents prior_loss_weight min_snr_gamma scale_weight_norms
        ip_noise_gamma ip_noise_gamma_random_strength noise_offset loss_type huber_schedule huber_c
        huber_scale zero_terminal_snr debiased_estimation clip_skip max_token_length network_module
        network_dim network_alpha network_dropout network_args base_model_version v2 sd_model_name
        sd_model_hash new_sd_model_hash vae_name vae_hash new_vae_hash weighting_scheme logit_mean
        logit_std mode_scale timestep_sampling sigmoid_scale discrete_flow_shift"""
    assert {f"ss_{name}" for name in names.split()} <= metadata.keys()
    assert {"sshs_model_hash", "sshs_legacy_hash"} <= metadata.keys()
    assert all(isinstance(value, str) for value in metadata.values())


def test_no_metadata_leaves_what_programs_need(run, tmp_path):
    options, _ = run
    plain = dataclasses.replace(options, output_dir=str(tmp_path), no_metadata=True)
    found = header(train(plain).output)
    assert {key for key in found if not key.startswith("sshs_")} == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim",
        "ss_network_alpha", "ss_network_args",
    }  # fmt: skip


def test_a_run_without_a_dataset_file_describes_its_one_dataset(run, tmp_path):
    options, metadata = run
    assert "ss_batch_size_per_device" not in metadata
    folder = dataclasses.replace(
        options, dataset_config=None, train_data_dir=str(tmp_path), resolution="64",
        train_batch_size=3, enable_bucket=True,
    )  # fmt: skip
    facts = dict.fromkeys(("started_at", "finished_at"), 0.0)
    found = training_metadata(folder, {}, facts)
    assert found["ss_batch_size_per_device"] == "3" and found["ss_total_batch_size"] == "6"
    assert found["ss_resolution"] == "64" and found["ss_enable_bucket"] == "True"
    assert found["modelspec.resolution"] == "64x64"


@pytest.mark.parametrize("dialect", ["comfyui", "diffusers"])
def test_a_file_saved_in_another_dialect_has_the_same_metadata(tmp_path, dialect):
    data = make_config(tmp_path / "data.toml", make_images(tmp_path / "images", 2))
    world = make_world(tmp_path / "world") | {"dataset_config": str(data)}
    options = train_options(world, tmp_path / "out", lora_format=dialect, max_train_epochs=1)
    found = header(train(options).output)
    assert found["ss_output_name"] == "lora"
    assert ("anima_fast.folded_alphas" in found) == (dialect == "diffusers")
