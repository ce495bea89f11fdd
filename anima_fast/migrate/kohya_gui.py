"""The JSON that kohya_ss' GUI (bmaltais) saves: sd-scripts' options under the names of its fields.

The GUI writes every field, also those of other models; zero and an empty text mean "not given"
there. LyCORIS networks are described by fields of their own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.command import read_arguments
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.sd_scripts import Item
from anima_fast.migrate.values import is_off
from anima_fast.options.declare import specs
from anima_fast.options.network_args import parse_network_args
from anima_fast.options.run import FinetuneOptions, TrainOptions

# Field -> option of sd-scripts; those of the Anima panel begin with `anima_`, and beat fields of
# other panels that have the same name without it.
RENAMED = {
    "epoch": "max_train_epochs", "optimizer": "optimizer_type", "max_resolution": "resolution",
    "image_folder": "train_data_dir",
}  # fmt: skip
# Value of LoRA_type -> network module; LyCORIS ones name their algorithm after the slash.
MODULES = {
    "": "networks.lora_anima", "Anima": "networks.lora_anima", "Standard": "networks.lora_anima",
    "Kohya LoHa": "networks.loha", "Kohya LoKr": "networks.lokr",
    "LoHa": "networks.loha", "LoKr": "networks.lokr",
}  # fmt: skip
# Fields that are words of network_args.
NETWORK_FIELDS = (
    "factor", "decompose_both", "dora_wd", "rank_dropout", "module_dropout", "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "use_scalar", "train_norm",
    "train_llm_adapter", "exclude_patterns", "include_patterns", "network_reg_dims",
    "network_reg_lrs", "conv_dim", "conv_alpha", "use_tucker", "use_cp", "bypass_mode",
    "full_matrix",
)  # fmt: skip
LAUNCHER_FIELDS = (
    "num_processes", "num_machines", "num_cpu_threads_per_process", "multi_gpu", "gpu_ids",
    "main_process_port", "dynamo_backend", "dynamo_mode", "dynamo_use_dynamic",
    "dynamo_use_fullgraph", "extra_accelerate_launch_args", "same_network", "machine_rank",
)  # fmt: skip
# A rate of 0, when the other one is set, means that only the other part is trained.
ONLY = {
    "text_encoder_lr": ("unet_lr", "network_train_unet_only"),
    "unet_lr": ("text_encoder_lr", "network_train_text_encoder_only"),
}
OTHER_PANELS = ("flux1_", "sd3_", "sdxl_", "lumina_", "hunyuan_", "chroma_")
# Fields of those panels without such a beginning.
OTHER_FIELDS = frozenset({
    "guidance_scale", "model_prediction_type", "train_blocks", "t5xxl_dtype", "t5xxl_device",
    "t5xxl_max_token_length", "noise_offset_type", "train_on_input", "unit", "constrain",
    "rescaled", "split_mode", "single_blocks_to_swap", "double_blocks_to_swap", "train_t5xxl",
    "weighting_scheme", "logit_mean", "logit_std", "mode_scale",
})  # fmt: skip
WINDOW = frozenset({
    "model_list", "generate_caption_database", "generate_image_buckets", "full_path", "save_as",
    "train_dir", "caption_metadata_filename", "latent_metadata_filename", "use_latent_files",
})  # fmt: skip
# Fields that only files for something else have.
ELSE = {"lllite_mlp_dim": "a ControlNet", "token_string": "textual inversion"}


def items(config: Mapping[str, Any], ledger: Ledger) -> tuple[str, list[Item]]:
    """The command here, and the options of sd-scripts that the fields mean.

    Raises:
        UserError: a file for another model.
    """
    lora_type = str(config.get("LoRA_type") or "")
    for key, what in ELSE.items():
        if key in config:
            raise UserError(f"this file is for {what}, which is not supported for Anima")
    if not config.get("anima_checkbox") and not lora_type.startswith("Anima"):
        other = next((k[:-9] for k in config if k.endswith("_checkbox") and config[k]), "")
        if other or config.get("sdxl") or lora_type or not config.get("anima_qwen3"):
            model = other or ("SDXL" if config.get("sdxl") else lora_type or "Stable Diffusion")
            raise UserError(f"this file is for {model}: anima_fast trains the Anima model only")
    if lora_type not in MODULES and not lora_type.startswith("LyCORIS/"):
        known = ", ".join(filter(None, MODULES))
        raise UserError(f"LoRA_type {lora_type!r} does not exist here: {known}, or a LyCORIS one")
    ledger.extend(config)
    found: dict[str, Item] = {}
    keys = ledger.open_keys()
    # The extra parameters come last, as they beat the fields.
    for key in sorted(keys, key="additional_parameters".__eq__):
        _field(key, config, ledger, found)
    _metadata(config, ledger, found)
    _network(config, lora_type, ledger, found)
    return ("train" if lora_type else "finetune"), list(found.values())


def _field(key: str, config: Mapping[str, Any], ledger: Ledger, found: dict[str, Item]) -> None:
    value, lora_type = config[key], str(config.get("LoRA_type") or "")
    name = RENAMED.get(key, key.removeprefix("anima_"))
    if key in LAUNCHER_FIELDS:
        ledger.drop(key, "it is about accelerate, which is not used here")
    elif key in NETWORK_FIELDS or key in ("LoRA_type", "anima_checkbox"):
        return
    elif key == "xformers" and isinstance(value, str):
        _attention(key, value, config, ledger, found)
    elif key in ONLY and is_off(value) and not is_off(config.get(ONLY[key][0])):
        found[ONLY[key][1]] = Item(key, ONLY[key][1], True)
    elif key == "sample_prompts" and value:
        lines = [line.strip() for line in str(value).splitlines()]
        prompts = [line for line in lines if line and not line.startswith("#")]
        found["sample_prompt"] = Item(key, "sample_prompt", prompts)
    elif key == "additional_parameters" and value:
        _parameters(key, str(value), ledger, found)
    elif key == "lr_warmup":
        _warmup(key, value, ledger, found)
    elif key.startswith(OTHER_PANELS) or key in OTHER_FIELDS:
        ledger.drop(key, "it is about another model")
    elif key in WINDOW:
        ledger.drop(key, "it is about the window and what it prepares")
    elif key == "LyCORIS_preset":
        _preset(key, value, lora_type, ledger)
    elif config.get(f"anima_{key}") not in (None, ""):
        ledger.drop(key, f"anima_{key} is given, and beats it")
    elif is_off(value) and not isinstance(value, bool) and name != "network_alpha":
        # Where the GUI shows zero, it passes nothing on.
        ledger.drop(key, "it is not set")
    elif isinstance(value, bool) and not value:
        ledger.drop(key, "it is off")
    elif key == "epoch" and not is_off(config.get("max_train_steps")):
        ledger.drop(key, "max_train_steps is given, and beats it there")
    elif name in found or (key in RENAMED and not is_off(config.get(name))):
        ledger.drop(key, f"{name} is given as well, and beats it")
    else:
        words = name in ("optimizer_args", "lr_scheduler_args", "network_args")
        split = shlex.split(value) if words and isinstance(value, str) else value
        found[name] = Item(key, name, split)


def _parameters(key: str, value: str, ledger: Ledger, found: dict[str, Item]) -> None:
    """`additional_parameters` is the end of the command line, which beats the fields."""
    known = {**specs(TrainOptions), **specs(FinetuneOptions)}
    given, _ = read_arguments(tuple(shlex.split(value)), known)
    for option in given:
        label = f"{key} {option.label}"
        ledger.extend({label: option.value})
        beaten = found.pop(option.name, None)
        if beaten is not None and ledger.has(beaten.key):
            ledger.drop(beaten.key, f"{option.label} in additional_parameters beats it")
        is_list = option.name in known and known[option.name].is_list
        words = list(option.words) if is_list else option.value
        found[option.name] = Item(label, option.name, words)
    ledger.take_elsewhere(key, "the options in it")


def _preset(key: str, value: Any, lora_type: str, ledger: Ledger) -> None:
    """LyCORIS_preset chooses layers of a LyCORIS network."""
    used = lora_type.startswith("LyCORIS/")
    ledger.drop(key, "presets of layers do not exist here" if used else "it is about LyCORIS")
    if used and value not in ("", "full"):
        ledger.todo.append(
            f"LyCORIS_preset {value}: choose layers with include_patterns and exclude_patterns in "
            "network_args; attention and MLP of all blocks are trained"
        )


def _metadata(config: Mapping[str, Any], ledger: Ledger, found: dict[str, Item]) -> None:
    """The panel for fine-tuning trains on a metadata file that it writes into `train_dir`."""
    latents = str(config.get("use_latent_files", "")).lower() == "yes"
    field = "latent_metadata_filename" if latents else "caption_metadata_filename"
    folder, name = config.get("train_dir"), config.get(field)
    if folder and name and "in_json" not in found and not config.get("dataset_config"):
        key = f"{field} in train_dir"
        ledger.extend({key: f"{folder}/{name}"})
        found["in_json"] = Item(key, "in_json", f"{folder}/{name}")


def _attention(
    key: str, value: str, config: Mapping[str, Any], ledger: Ledger, found: dict[str, Item]
) -> None:
    """The field `xformers` chooses among xformers, sdpa and none."""
    if config.get("anima_attn_mode") or value not in ("xformers", "sdpa"):
        beaten = "anima_attn_mode chooses" if config.get("anima_attn_mode") else "it is off"
        ledger.drop(key, beaten)
    else:
        found[value] = Item(key, value, True)


def _warmup(key: str, value: Any, ledger: Ledger, found: dict[str, Item]) -> None:
    """`lr_warmup` is a percentage of all steps."""
    if is_off(value) or ledger.get("lr_warmup_steps"):
        ledger.drop(key, "lr_warmup_steps is given" if not is_off(value) else "it is not set")
    else:
        found["lr_warmup_steps"] = Item(key, "lr_warmup_steps", float(value) / 100)


def _network(
    config: Mapping[str, Any], lora_type: str, ledger: Ledger, found: dict[str, Item]
) -> None:
    """LoRA_type and the fields of the network as network_module and network_args."""
    family, _, algorithm = lora_type.partition("/")
    words = [f"algo={algorithm.lower()}"] if family == "LyCORIS" and algorithm else []
    module = "lycoris.kohya" if words else MODULES[lora_type]
    if ledger.has("LoRA_type"):
        if lora_type:
            found["network_module"] = Item("LoRA_type", "network_module", module)
        else:
            ledger.drop("LoRA_type", "it is empty")
    for key in NETWORK_FIELDS:
        if not ledger.has(key):
            continue
        known = module != "networks.lora_anima" or key not in ("factor", "decompose_both")
        if is_off(config[key]) or not known or (key == "factor" and config[key] == -1):
            ledger.drop(key, "it is not set")
        elif key.startswith(("conv_", "use_tucker", "use_cp")):
            ledger.drop(key, "the DiT has no convolutions")
        else:
            word = f"{key}={config[key]}"
            try:
                parse_network_args([*words[:1], word], module)
            except UserError as error:
                ledger.drop(key, str(error).removeprefix("--network_args "))
                continue
            words.append(word)
            ledger.take_elsewhere(key, "network_args")
    if ledger.has("anima_checkbox"):
        ledger.drop("anima_checkbox", "it chose the script, which is known")
    if words:
        _join_words(words, ledger, found)


def _join_words(words: list[str], ledger: Ledger, found: dict[str, Item]) -> None:
    if "network_args" in found:
        item = found.pop("network_args")
        words += item.value if isinstance(item.value, list) else [str(item.value)]
        ledger.take_elsewhere(item.key, "network_args")
    key = "fields of the network"
    ledger.extend({key: words})
    found["network_args"] = Item(key, "network_args", words)
