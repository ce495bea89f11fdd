"""OneTrainer's JSON as options.

Its files may be whole (every field) or presets (only what differs): what is left out has its
default, which is written down where ours is another one.
"""

from __future__ import annotations

from pathlib import PureWindowsPath
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.onetrainer_data import convert_concepts
from anima_fast.migrate.onetrainer_flow import convert_loss, convert_noise
from anima_fast.migrate.onetrainer_learning import convert_optimizer, convert_rate
from anima_fast.migrate.onetrainer_network import (
    convert_ema,
    convert_layers,
    convert_network,
    freeze_parts,
)
from anima_fast.migrate.onetrainer_run import convert_length, convert_memory
from anima_fast.migrate.onetrainer_samples import convert_samples
from anima_fast.migrate.onetrainer_tables import (
    DROPPED,
    DROPPED_TABLES,
    DTYPES,
    FORMATS,
    MODEL_NAMES,
)
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.source import Source
from anima_fast.migrate.values import is_off

# Our names of the files that `anima-fast download` fetches.
_DOWNLOADED = ("pretrained_model_name_or_path", "qwen3", "vae")


def convert(source: Source, ledger: Ledger) -> str:
    """Fill the ledger from a configuration and the concepts that it names.

    Returns:
        the command here.
    Raises:
        UserError: another model, or a way of training that does not exist here.
    """
    config = source.config
    command = _check(config)
    ledger.extend(config)
    for key in ("model_type", "training_method"):
        if ledger.has(key):
            what = "Anima, the only model here" if key == "model_type" else f"anima-fast {command}"
            ledger.take_elsewhere(key, what)
    names = ("base_model_name", "transformer.model_name", "vae.model_name", "concept_file_name")
    paths = Paths.find([str(ledger.get(name, "")) for name in names], source.folders)
    _models(ledger, paths)
    _output(ledger, paths, command)
    convert_memory(ledger, command)
    if command == "train":
        convert_network(ledger, paths)
        convert_layers(ledger)
        convert_ema(ledger)
    else:
        freeze_parts(ledger)
        if ledger.has("ema"):
            off = str(ledger.get("ema")) == "OFF"
            ledger.drop("ema", "it is off" if off else "only a LoRA has a running mean here")
    convert_rate(ledger)
    convert_optimizer(ledger, command)
    convert_noise(ledger)
    convert_loss(ledger)
    convert_concepts(source, ledger, command)
    convert_samples(source, ledger)
    convert_length(ledger)
    _caches(ledger)
    _rest(ledger)
    return command


def _check(config: dict[str, Any]) -> str:
    kind = str(config.get("model_type", "STABLE_DIFFUSION_15"))
    if kind != "ANIMA":
        name = MODEL_NAMES.get(kind, kind.replace("_", " ").title())
        raise UserError(f"this file is for {name}: anima_fast trains the Anima image model only")
    method = str(config.get("training_method", "FINE_TUNE"))
    if method not in ("LORA", "FINE_TUNE"):
        raise UserError(f"training_method {method} is not supported for Anima: LORA and FINE_TUNE")
    part = config.get("transformer")
    if isinstance(part, dict) and part.get("train") is False:
        raise UserError("transformer.train is false: there is nothing else to train in Anima")
    return "train" if method == "LORA" else "finetune"


def _models(ledger: Ledger, paths: Paths) -> None:
    """OneTrainer reads a folder in diffusers' form; here the three files of the model are read."""
    for key, option in (
        ("transformer.model_name", "pretrained_model_name_or_path"),
        ("base_model_name", "pretrained_model_name_or_path"),
        ("text_encoder.model_name", "qwen3"),
        ("vae.model_name", "vae"),
    ):
        text = str(ledger.get(key, "") or "")
        if not ledger.has(key):
            continue
        if not text:
            ledger.drop(key, "it is not set")
        elif not text.lower().endswith((".safetensors", ".pth")) and option != "qwen3":
            ledger.drop(key, "single files are read here, not folders in diffusers' form")
        elif option in ledger.options:
            ledger.drop(key, "transformer.model_name beats it")
        else:
            path, why = paths.resolve(text)
            if why:
                ledger.change(key, option, path, why)
            else:
                ledger.take(key, option, path)
    missing = [name for name in _DOWNLOADED if name not in ledger.options]
    if missing:
        _downloaded(ledger, missing)


def _downloaded(ledger: Ledger, missing: list[str]) -> None:
    """The files of the models folder stand for those of diffusers' form."""
    from anima_fast.models.download import TEXT_ENCODER, VAE, default_models_dir, dit_file

    folder = default_models_dir()
    files = dict(zip(_DOWNLOADED, (dit_file("base-v1.0"), TEXT_ENCODER, VAE), strict=True))
    for name in missing:
        ledger.add(name, str(folder / files[name]), "where `anima-fast download` puts it")
    if not all((folder / files[name]).exists() for name in missing):
        ledger.todo.append(f"run `anima-fast download`: it fetches {', '.join(missing)}")


def _output(ledger: Ledger, paths: Paths, command: str) -> None:
    key = "output_model_destination"
    text = str(ledger.get(key, "") or "models/model.safetensors")
    path, why = paths.resolve(text)
    where = PureWindowsPath(path)
    # A folder, or a file with an ending.
    folder, name = (where.parent, where.stem) if where.suffix else (where, "")
    parent = folder.as_posix() if "\\" not in path else str(folder)
    reason = "the folder and the name are two options" + (f"; {why}" if why else "")
    if ledger.has(key):
        ledger.change(key, "output_dir", parent, reason)
    else:
        ledger.add("output_dir", parent, "OneTrainer's default")
    ledger.add("output_name", name or "model", f"from {key}")
    _format(ledger, command)
    if ledger.has("output_dtype"):
        dtype = DTYPES.get(str(ledger.get("output_dtype")))
        if dtype:
            ledger.take("output_dtype", "save_precision", {"no": "float"}.get(dtype, dtype))
        else:
            ledger.drop("output_dtype", "this type does not exist here")
    if ledger.has("tensorboard") and ledger.get("tensorboard"):
        ledger.take("tensorboard", "log_with", "tensorboard")
    elif ledger.has("tensorboard"):
        ledger.drop("tensorboard", "it is off")


def _format(ledger: Ledger, command: str) -> None:
    key = "output_model_format"
    if not ledger.has(key):
        return
    form = FORMATS.get(str(ledger.get(key)))
    if command == "finetune":
        ledger.drop(key, "a model is saved in the form that ComfyUI loads")
    elif form:
        ledger.take(key, "lora_format", form)
    else:
        ledger.drop(key, "this form does not exist here: kohya's names are used")


def _caches(ledger: Ledger) -> None:
    shared = ledger.get("latent_caching", True)
    for key, option in (
        ("image_caching", "cache_latents_to_disk"),
        ("text_caching", "cache_text_encoder_outputs_to_disk"),
    ):
        wanted = ledger.get(key, shared)
        if ledger.has(key) and wanted:
            ledger.take(key, option, True)
        elif ledger.has(key):
            ledger.drop(key, "it is off")
        elif wanted:
            ledger.add(option, True, "its default")
    if ledger.has("latent_caching"):
        if shared:
            ledger.take_elsewhere("latent_caching", "cache_latents_to_disk and of the text too")
        else:
            ledger.drop("latent_caching", "it is off")
    if ledger.has("cache_dir"):
        ledger.drop("cache_dir", "caches lie beside the images here: --cache_dir changes that")


def _rest(ledger: Ledger) -> None:
    key = "text_encoder.dropout_probability"
    if not is_off(ledger.get(key)) and ledger.has(key):
        ledger.take(key, "caption_dropout_rate", ledger.number(key))
    if ledger.has("transformer.train"):
        ledger.take_elsewhere("transformer.train", "the DiT is what is trained")
    device = str(ledger.get("train_device", ""))
    if ledger.has("train_device"):
        if device in ("cuda", ""):
            ledger.drop("train_device", "the first card is the default")
        else:
            ledger.take("train_device", "device")
    for key in ("caching_threads", "dataloader_threads"):
        if ledger.has(key):
            ledger.take(key, "max_data_loader_n_workers", int(ledger.number(key)))
    for key in ledger.open_keys():
        name = key.split("[")[0]
        if name in DROPPED:
            ledger.drop(key, DROPPED[name])
            continue
        why = next((w for start, w in DROPPED_TABLES.items() if name.startswith(start)), None)
        if why:
            ledger.drop(key, why)
