"""What a LoRA file says about itself: `ss_` keys and hashes for user interfaces, `modelspec.` keys.

All values are strings. With `no_metadata` only the keys that loaders need are written. Reading the
base files for their hashes takes seconds, so the SHA-256 is remembered (files.cached_sha256).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from anima_fast import __version__
from anima_fast.files import cached_sha256

if TYPE_CHECKING:
    from anima_fast.options.run import FinetuneOptions, TrainOptions

# The legacy hash reads 64 KiB at 1 MiB.
LEGACY_OFFSET, LEGACY_LENGTH = 0x100000, 0x10000
# Bytes of metadata that a file gets at most; the format allows 100 MB of header in all.
METADATA_BYTES = 32_000_000
IMPLEMENTATION = "https://huggingface.co/circlestone-labs/Anima"
# Options that are written unchanged, under their own name.
PLAIN_OPTIONS = (
    "learning_rate", "unet_lr", "text_encoder_lr", "lr_scheduler", "lr_warmup_steps",
    "max_grad_norm", "gradient_checkpointing", "gradient_accumulation_steps", "mixed_precision",
    "sums", "full_fp16", "full_bf16", "cache_latents", "prior_loss_weight", "scale_weight_norms",
    "ip_noise_gamma", "ip_noise_gamma_random_strength", "loss_type", "huber_schedule", "huber_c",
    "huber_scale", "caption_dropout_rate", "caption_dropout_every_n_epochs",
    "caption_tag_dropout_rate", "face_crop_aug_range", "resize_interpolation", "validation_seed",
    "validation_split", "max_validation_steps", "validate_every_n_epochs",
    "validate_every_n_steps", "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
    "timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "training_comment",
    "network_dropout", "output_name",
)  # fmt: skip
# Options that sd-scripts writes and that have one fixed value here.
FIXED = {
    "fp8_base": "False", "fp8_base_unet": "False", "lowram": "False", "min_snr_gamma": "None",
    "noise_offset": "None", "multires_noise_iterations": "None", "multires_noise_discount": "None",
    "adaptive_noise_scale": "None", "zero_terminal_snr": "False", "debiased_estimation": "False",
    "clip_skip": "None", "max_token_length": "None",
}  # fmt: skip
# Options that describe the one dataset of a run without a dataset file, under their own name.
DATASET_OPTIONS = (
    "resolution", "enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso",
    "bucket_reso_steps", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens",
)  # fmt: skip
MODELSPEC_OPTIONS = (
    "metadata_author", "metadata_description", "metadata_license", "metadata_tags",
    "metadata_usage_hint", "metadata_thumbnail", "metadata_merged_from",
    "metadata_trigger_phrase", "metadata_preprocessor",
)  # fmt: skip


def loader_metadata(options: TrainOptions) -> dict[str, str]:
    """The keys that loaders need; all that a file gets with `no_metadata`."""
    return {
        "ss_v2": "False",
        "ss_base_model_version": "anima",
        "ss_network_module": options.network_module,
        "ss_network_dim": str(options.network_dim),
        "ss_network_alpha": f"{options.network_alpha:g}",
        "ss_network_args": json.dumps(
            dict(word.partition("=")[::2] for word in options.network_args)
        ),
    }


def training_metadata(
    options: TrainOptions, summary: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, str]:
    """The header metadata of a LoRA file; the two `sshs_` hashes are added when it is written.

    Args:
        summary: `data.summary.summarise` of the run's plan.
        run: facts of the moment: `steps`, `epoch`, `num_epochs`, `max_train_steps`,
            `num_batches_per_epoch`, `seed`, `run_id`, `session_id`, `started_at`, `finished_at`,
            `optimizer`.
    """
    minimal = loader_metadata(options)
    if options.no_metadata:
        return minimal
    facts = {name: getattr(options, name) for name in PLAIN_OPTIONS} | FIXED | dict(summary)
    if not options.dataset_config:
        size = options.train_batch_size
        facts["batch_size_per_device"] = size
        facts["total_batch_size"] = size * options.gradient_accumulation_steps
        facts |= {name: getattr(options, name) for name in DATASET_OPTIONS}
    facts |= run
    facts["training_started_at"] = facts.pop("started_at")
    facts["training_finished_at"] = facts.pop("finished_at")
    facts["sd_scripts_commit_hash"] = f"anima_fast-{__version__}"
    facts |= _model_hashes(options)
    facts["output_name"] = options.output_stem
    texts = {f"ss_{name}": _text(value) for name, value in facts.items()}
    return minimal | texts | modelspec(options)


def _model_hashes(options: TrainOptions) -> dict[str, str]:
    """Names and hashes of the DiT and VAE files."""
    found = {}
    for name, option in (("sd_model", "pretrained_model_name_or_path"), ("vae", "vae")):
        path = Path(getattr(options, option))
        if path.is_file():
            found[f"{name}_name"] = path.name
            found[f"{name}_hash"] = legacy_file_hash(path)
            found[f"new_{name}_hash"] = cached_sha256(path)
    return found


def modelspec(options: TrainOptions | FinetuneOptions) -> dict[str, str]:
    """The `modelspec.` keys (Stability AI's model specification, as sd-scripts fills it in)."""
    sides = (options.resolution or "1024").split(",")
    spec = {
        **lora_spec(options.metadata_title or options.output_stem),
        "resolution": f"{sides[0]}x{sides[-1]}",
        # Wrong for a flow model, but what every other Anima LoRA says.
        "prediction_type": "epsilon",
    }
    for name in MODELSPEC_OPTIONS:
        if value := getattr(options, name):
            spec[name.removeprefix("metadata_")] = value
    if options.min_timestep is not None or options.max_timestep is not None:
        high = 1000 if options.max_timestep is None else options.max_timestep
        spec["timestep_range"] = f"{options.min_timestep or 0},{high}"
    return {f"modelspec.{name}": value for name, value in spec.items()}


def lora_spec(title: str) -> dict[str, str]:
    """The entries of the model specification that every LoRA has, without `modelspec.`."""
    return {
        "sai_model_spec": "1.0.1",
        "architecture": "anima-preview/lora",
        "implementation": IMPLEMENTATION,
        "implementation_version": f"anima_fast/{__version__}",
        "title": title,
        "date": datetime.datetime.now().replace(microsecond=0).isoformat(),
    }


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else (json.dumps(value) if value else "None")
    return str(value)


def bounded(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata that a safetensors header can hold.

    While it is larger than `METADATA_BYTES` its longest value is replaced by a text that says so;
    what is no Unicode (names of files from another system) is written with backslashes.
    """
    plain = {k: v.encode("utf-8", "backslashreplace").decode("utf-8") for k, v in metadata.items()}
    sizes = {k: len(json.dumps(v)) for k, v in plain.items()}
    total = sum(sizes.values())
    for key in sorted(plain, key=lambda key: -sizes[key]):
        if total <= METADATA_BYTES:
            break
        plain[key] = f"left out: {sizes[key]} bytes are too many for the header of a file"
        total -= sizes[key]
    return plain


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata, `bounded`, with `sshs_model_hash` and `sshs_legacy_hash` of these tensors.

    Both are taken over a safetensors serialisation that holds only the `ss_` metadata: the first is
    SHA-256 of the bytes after the header, the second the start of SHA-256 over 64 KiB at 1 MiB.
    """
    metadata = bounded(metadata)
    plain = {k: t.detach().to("cpu").contiguous() for k, t in tensors.items()}
    ss_only = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    data = save(plain, metadata=ss_only)
    header = 8 + int.from_bytes(data[:8], "little")
    legacy = data[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_LENGTH]
    return {
        **metadata,
        "sshs_model_hash": hashlib.sha256(memoryview(data)[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def legacy_file_hash(path: str | os.PathLike) -> str:
    """First 8 hex digits of SHA-256 over 64 KiB at 1 MiB of a file (`ss_sd_model_hash`)."""
    with open(path, "rb") as file:
        file.seek(LEGACY_OFFSET)
        return hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]
