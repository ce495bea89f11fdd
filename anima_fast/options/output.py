"""Length, saving, resuming, logging, validation and the metadata of the saved file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from anima_fast.options.declare import option

_length = partial(option, "Length")
_save = partial(option, "Saving and resuming")
_log = partial(option, "Logging")
_validation = partial(option, "Validation")
_preview = partial(option, "Previews")
_meta = partial(option, "Metadata of the saved file")


@dataclass(frozen=True)
class LengthOptions:
    """How long to train."""

    max_train_steps: int = _length(1600, "Optimizer steps.", low=1)
    max_train_epochs: int | None = _length(None, "Epochs; beats max_train_steps.", low=1)
    gradient_accumulation_steps: int = _length(1, "Batches per optimizer step.", low=1)
    seed: int | None = _length(
        None, "Seed of everything random (default: drawn and recorded).", low=0, high=2**63 - 1
    )
    max_bad_batches: int = _length(
        5, "Batches with a non-finite loss or gradient that are skipped before stopping.", low=0
    )


@dataclass(frozen=True)
class SaveOptions:
    """What is written where, and when."""

    output_dir: str | None = _save(None, "Folder for files, states and logs (required).")
    output_name: str | None = _save(None, "Name of the saved file (default: last).")
    save_model_as: str = _save("safetensors", "File format.")
    save_precision: str | None = _save(
        None, "Type of the saved weights (default: as trained).", choices=("float", "fp16", "bf16")
    )
    save_every_n_epochs: int | None = _save(None, "Save every so many epochs.", low=1)
    save_every_n_steps: int | None = _save(None, "Save every so many steps.", low=1)
    save_n_epoch_ratio: int | None = _save(
        None, "Save at least so many times over the epochs.", low=1
    )
    save_last_n_epochs: int | None = _save(None, "Keep only the last epoch files.", low=1)
    save_last_n_steps: int | None = _save(
        None, "Keep only step files of the last so many steps.", low=1
    )
    save_last_n_epochs_state: int | None = _save(
        None, "The same for epoch states (default: as for files).", low=1
    )
    save_last_n_steps_state: int | None = _save(
        None, "The same for step states (default: as for files).", low=1
    )
    save_state: bool = _save(False, "Save a resume state with every file and at the end.")
    save_state_on_train_end: bool = _save(False, "Save a resume state at the end only.")
    autosave_minutes: float = _save(
        10.0, "Minutes between the states of a rolling resume folder; 0 = off.", low=0
    )
    resume: str | None = _save(
        None, "State folder, output folder, or auto for the newest valid state in output_dir."
    )

    @property
    def output_stem(self) -> str:
        """The name of the final file without its ending."""
        return self.output_name or "last"


@dataclass(frozen=True)
class LogOptions:
    """Trackers and the console. `log.jsonl` is always written."""

    logging_dir: str | None = _log(None, "Folder of tracker logs (default: output_dir/logs).")
    log_with: str | None = _log(
        None, "Trackers in addition to log.jsonl.", choices=("tensorboard", "wandb", "all")
    )
    log_prefix: str | None = _log(None, "Text before the date in the name of the log folder.")
    log_tracker_name: str | None = _log(None, "Project name (default: network_train).")
    log_tracker_config: str | None = _log(None, "TOML file with arguments for the trackers.")
    wandb_run_name: str | None = _log(None, "Name of the run in wandb.")
    wandb_api_key: str | None = _log(None, "Key for wandb; never written to a file.", secret=True)
    log_config: bool = _log(False, "Record the options in the tracker.")
    console_log_level: str = _log(
        "INFO", "Least severe messages shown.",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )  # fmt: skip
    console_log_file: str | None = _log(None, "Write messages to this file too.")
    console_log_simple: bool = _log(False, "Plain messages without colours.")


@dataclass(frozen=True)
class ValidationOptions:
    """Loss on images that are held out."""

    validation_split: float = _validation(
        0.0, "Fraction of each training subset that is held out.", low=0, high=1
    )
    validation_seed: int | None = _validation(
        None, "Seed of the split (default: 0) and of validation noise (default: seed).",
        low=-(2**63), high=2**64,
    )  # fmt: skip
    validate_every_n_steps: int | None = _validation(None, "Validate every so many steps.", low=1)
    validate_every_n_epochs: int | None = _validation(
        None, "Validate every so many epochs (default: every epoch).", low=1
    )
    max_validation_steps: int | None = _validation(None, "Most batches used (default: all).", low=1)
    early_stop_patience: int | None = _validation(
        None, "Stop after so many validations in a row without a better loss.", low=1
    )
    early_stop_min_delta: float = _validation(
        0.0, "How much lower a validation loss must be to count as better.", low=0
    )


@dataclass(frozen=True)
class PreviewOptions:
    """Pictures during training."""

    sample_prompts: str | None = _preview(
        None, "File with prompts: .txt with one a line, .toml or .json. Settings behind a prompt: "
        "--n negative, --w, --h, --d seed, --s steps, --l guidance, --fs shift; by default as in "
        "ComfyUI (1024x1024, 30 steps, guidance 4, shift 3).",
    )  # fmt: skip
    sample_prompt: tuple[str, ...] = _preview(
        (), "Single prompts, in quotes, with settings as in the file."
    )
    sample_every_n_steps: int = _preview(0, "Pictures every so many steps; 0 = off.")
    sample_every_n_epochs: int = _preview(
        0, "Pictures every so many epochs; 0 = off. Wins over steps."
    )
    sample_at_first: bool = _preview(False, "Pictures before the first step.")


@dataclass(frozen=True)
class MetadataOptions:
    """Texts stored in the header of the saved file."""

    training_comment: str | None = _meta(
        None, "Stored as ss_training_comment, by finetune as modelspec.comment."
    )
    no_metadata: bool = _meta(False, "Write only the keys that programs need.")
    metadata_title: str | None = _meta(None, "Title (default: output_name).")
    metadata_author: str | None = _meta(None, "Author.")
    metadata_description: str | None = _meta(None, "Description.")
    metadata_license: str | None = _meta(None, "License.")
    metadata_tags: str | None = _meta(None, "Tags, separated by commas.")
    metadata_usage_hint: str | None = _meta(None, "Usage hint.")
    metadata_thumbnail: str | None = _meta(None, "Thumbnail as a data URL.")
    metadata_merged_from: str | None = _meta(None, "Source models of a merge.")
    metadata_trigger_phrase: str | None = _meta(None, "Trigger phrase.")
    metadata_preprocessor: str | None = _meta(None, "Preprocessor.")
