"""diffusion-pipe's TOML as options.

What it does without being asked is written down: alpha is the rank, latents and captions are
cached, AdaLN layers get adapters too, and the LLM adapter is trained unless its rate is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.diffusion_pipe_data import BatchSizes, convert_dataset
from anima_fast.migrate.diffusion_pipe_learning import (
    convert_length,
    convert_loss,
    convert_memory,
    convert_noise,
    convert_optimizer,
    convert_schedule,
)
from anima_fast.migrate.diffusion_pipe_network import convert_adapter, convert_part_rates
from anima_fast.migrate.diffusion_pipe_tables import (
    DROPPED,
    FORK_CAPTIONS,
    MODELS,
    PATHS,
    SAME,
)
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.onetrainer_run import KERNELS
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.sd_scripts import CLASSES
from anima_fast.migrate.source import Source, parse_file
from anima_fast.migrate.values import is_nothing, is_off, plain
from anima_fast.options.declare import specs

# Options whose 0 or false says nothing.
OFF_AT_ZERO = ("blocks_to_swap", "compile", "caption_dropout_rate")


def convert(source: Source, ledger: Ledger) -> str:
    """Fill the ledger from a configuration and the dataset file that it names.

    Returns:
        the command here: `train` with an [adapter], `finetune` without.
    Raises:
        UserError: another model, or a value that is no number where one belongs.
    """
    config = source.config
    _check_model(config["model"])
    command = "train" if ledger.table("adapter", config) else "finetune"
    ledger.extend(config)
    texts = [str(ledger.get(key, "")) for key in ("dataset", *PATHS)]
    paths = Paths.find(texts, source.folders)
    sizes = BatchSizes.read(ledger)
    _files(ledger, paths)
    examples = sizes.largest * max(1, int(ledger.number("gradient_accumulation_steps", 1)))
    convert_length(ledger, examples)
    convert_memory(ledger)
    convert_schedule(ledger)
    convert_optimizer(ledger, examples, command)
    if command == "train":
        convert_adapter(ledger, paths, config)
    else:
        convert_part_rates(ledger)
    convert_noise(ledger)
    convert_loss(ledger)
    _captions(ledger)
    _same(ledger, command)
    _dataset(source, ledger, paths, sizes)
    for key in ledger.open_keys():
        if key in DROPPED or key.split("[")[0] in DROPPED:
            ledger.drop(key, DROPPED[key.split("[")[0]])
    _always(source, ledger, command)
    return command


def _check_model(model: Mapping[str, Any]) -> None:
    kind = str(model.get("type"))
    qwen = any(key in model for key in ("llm_path", "qwen_path"))
    if kind == "anima" or (kind == "cosmos_predict2" and qwen):
        return
    if kind == "cosmos_predict2":
        raise UserError(
            "this file is for Cosmos-Predict2 itself, with a T5 encoder (t5_path): anima_fast "
            "trains the Anima image model only, whose encoder is Qwen3 (llm_path)"
        )
    name = MODELS.get(kind, f"the model {kind!r}")
    raise UserError(f"this file is for {name}: anima_fast trains the Anima image model only")


def _files(ledger: Ledger, paths: Paths) -> None:
    for key, option in PATHS.items():
        if not ledger.has(key):
            continue
        path, why = paths.resolve(str(ledger.get(key)))
        if option in ledger.options:
            ledger.drop(key, f"another key gives {option}")
        elif why:
            ledger.change(key, option, path, why)
        else:
            ledger.take(key, option, path)
    if ledger.has("output_dir"):
        path, why = paths.resolve(str(ledger.get("output_dir")))
        why = f"{why}; " if why else ""
        why += "files go right into it, there into a folder with a date"
        ledger.change("output_dir", "output_dir", path, why)
    ledger.take_elsewhere("model.type", "Anima, the only model here")


def _captions(ledger: Ledger) -> None:
    """What the bluvoll fork has in [model] about captions."""
    for key, option in FORK_CAPTIONS.items():
        if ledger.has(key) and is_off(ledger.get(key)):
            ledger.drop(key, "it is off")
        elif ledger.has(key) and key.endswith("_percent") and ledger.number(key) > 1:
            ledger.change(key, option, ledger.number(key) / 100, "a fraction of 1 here")
        elif ledger.has(key):
            ledger.take(key, option)
    key = "model.tag_delimiter"
    if ledger.has(key):
        ledger.take(key, "caption_separator", str(ledger.get(key)).strip() or ",")
    key = "model.caption_mode"
    if ledger.has(key):
        whole = ledger.get(key) == "tags"
        ledger.drop(key, "captions are one file here" if whole else "only its .txt files are read")
        if not whole:
            ledger.todo.append(f"caption_mode {ledger.get(key)}: write one caption file each image")


def _same(ledger: Ledger, command: str) -> None:
    known = specs(CLASSES[command])
    for key, option in SAME.items():
        if not ledger.has(key):
            continue
        value = plain(known[option], ledger.get(key))
        if is_nothing(known[option], value) or (not value and option in OFF_AT_ZERO):
            ledger.drop(key, "it is off")
        elif option in ledger.options:
            ledger.drop(key, f"{option} is given by another key")
        elif option == "compile" and command == "train":
            ledger.drop(key, KERNELS)
        else:
            ledger.take(key, option, value)
    key = "monitoring.enable_wandb"
    if ledger.has(key) and ledger.get(key):
        ledger.take(key, "log_with", "wandb")
    elif ledger.has(key):
        ledger.drop(key, "it is off")


def _dataset(source: Source, ledger: Ledger, paths: Paths, sizes: BatchSizes) -> None:
    if not ledger.has("dataset"):
        return
    named, _ = paths.resolve(str(ledger.get("dataset")))
    found = next((f / named for f in source.folders if (f / named).is_file()), None)
    if found is None:
        ledger.drop("dataset", "it was not found")
        ledger.add("train_batch_size", sizes.pairs[0][1], "the batch size of the main file")
        ledger.todo.append(
            f"the dataset file {named} was not found: give --cwd FOLDER, the folder that "
            "diffusion-pipe is started in, or write dataset_config by hand"
        )
        return
    ledger.take_elsewhere("dataset", "a dataset file of ours")
    convert_dataset(parse_file(found), found.name, ledger, source.folders, sizes)


def _always(source: Source, ledger: Ledger, command: str) -> None:
    """What happens there whatever the file says."""
    stem = source.file.stem if source.file else "imported"
    ledger.add("output_name", stem, "files have no name of their own there")
    ledger.add("caption_extension", ".txt", "the only one there")
    for name in ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"):
        ledger.add(name, True, "always so there")
    if command == "train":
        ledger.add("lora_format", "comfyui", "the names that its files have")
    elif ledger.options.get("mixed_precision") == "bf16":
        ledger.add("full_bf16", True, "weights are trained in 16 bit there")
