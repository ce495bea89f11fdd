"""The JSON that kohya_ss' GUI (bmaltais) saves: sd-scripts' options under the names of its fields.

The GUI writes every field, also those of other models; zero and an empty text mean "not given"
there. LyCORIS networks are described by fields of their own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.command import Item, Items, join, read_arguments
from anima_fast.migrate.ledger import OFF, Ledger, is_off
from anima_fast.options.network_args import LYCORIS, parse_network_args

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
# Fields that are words of network_args; the DiT has no convolutions for the last ones.
NETWORK_FIELDS = (
    "factor", "decompose_both", "dora_wd", "rank_dropout", "module_dropout", "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "use_scalar", "train_norm",
    "train_llm_adapter", "exclude_patterns", "include_patterns", "network_reg_dims",
    "network_reg_lrs", "bypass_mode", "full_matrix", "conv_dim", "conv_alpha", "use_tucker",
    "use_cp",
)  # fmt: skip
# A rate of 0, when the other one is set, means that only the other part is trained.
ONLY = {
    "text_encoder_lr": ("unet_lr", "network_train_unet_only"),
    "unet_lr": ("text_encoder_lr", "network_train_text_encoder_only"),
}
LISTS = ("optimizer_args", "lr_scheduler_args", "network_args")
# Fields of the panel for FLUX.1 that have names of Anima's options.
OF_FLUX = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
# Fields that only files for something else have.
ELSE = {"lllite_mlp_dim": "a ControlNet", "token_string": "textual inversion"}


def items(config: Mapping[str, Any], ledger: Ledger) -> tuple[str, Items]:
    """The command here, and the options of sd-scripts that the fields mean.

    Raises:
        UserError: a file for another model.
    """
    _check_model(config)
    ledger.extend(config)
    fields = _Fields(config, ledger)
    # The extra parameters come last, as they beat the fields.
    for key in sorted(ledger.open_keys(), key="additional_parameters".__eq__):
        fields.settle(key, config[key])
    fields.metadata()
    fields.network()
    return ("train" if fields.lora_type else "finetune"), fields.found


def _check_model(config: Mapping[str, Any]) -> None:
    lora_type = str(config.get("LoRA_type") or "")
    for key, what in ELSE.items():
        if key in config:
            raise UserError(f"this file is for {what}, which is not supported for Anima")
    if not config.get("anima_checkbox") and not lora_type.startswith("Anima"):
        other = next((k[:-9] for k in config if k.endswith("_checkbox") and config[k]), "")
        other = other or ("SDXL" if config.get("sdxl") else lora_type)
        if other or not config.get("anima_qwen3"):
            model = other or "Stable Diffusion"
            raise UserError(f"this file is for {model}: anima_fast trains the Anima model only")
    if lora_type not in MODULES and not lora_type.startswith("LyCORIS/"):
        known = ", ".join(filter(None, MODULES))
        raise UserError(f"LoRA_type {lora_type!r} does not exist here: {known}, or a LyCORIS one")


class _Fields:
    """The fields of a file; `found` holds the options by name."""

    def __init__(self, config: Mapping[str, Any], ledger: Ledger) -> None:
        self.config, self.ledger = config, ledger
        self.lora_type = str(config.get("LoRA_type") or "")
        self.found: Items = {}

    def give(self, name: str, key: str, value: Any) -> None:
        """An option is found."""
        self.found[name] = Item(key, value)

    def settle(self, key: str, value: Any) -> None:
        """One field; what says nothing stays open, and is off."""
        if key in (*NETWORK_FIELDS, "LoRA_type", "anima_checkbox"):
            return
        if key in ONLY and is_off(value) and not is_off(self.config.get(ONLY[key][0])):
            self.give(ONLY[key][1], key, True)
        elif key in OF_FLUX:
            self.ledger.drop("it is about another model", key)
        elif key == "LyCORIS_preset":
            self._preset(key, value)
        elif is_off(value) and key not in ("network_alpha", "anima_network_alpha"):
            return
        elif key == "xformers" and isinstance(value, str):
            # It chooses among xformers, sdpa and none.
            self.give(value, key, True)
        elif key == "sample_prompts":
            lines = [line.strip() for line in str(value).splitlines()]
            prompts = [line for line in lines if line and not line.startswith("#")]
            self.give("sample_prompt", key, prompts)
        elif key == "additional_parameters":
            self._parameters(key, str(value))
        elif key == "lr_warmup" and not self.config.get("lr_warmup_steps"):
            # A percentage of all steps.
            self.give("lr_warmup_steps", key, float(value) / 100)
        else:
            self._plain(key, value)

    def _plain(self, key: str, value: Any) -> None:
        """A field with the name of an option, or nearly so."""
        name, beaten_by = RENAMED.get(key, key.removeprefix("anima_")), ""
        if self.config.get(f"anima_{key}") not in (None, ""):
            beaten_by = f"anima_{key}"
        elif key == "epoch" and not is_off(self.config.get("max_train_steps")):
            beaten_by = "max_train_steps"
        elif key == "lr_warmup":
            beaten_by = "lr_warmup_steps"
        elif name in self.found or (key in RENAMED and not is_off(self.config.get(name))):
            beaten_by = name
        if beaten_by:
            self.ledger.drop(f"{beaten_by} is given as well, and beats it", key)
        else:
            is_text = name in LISTS and isinstance(value, str)
            self.give(name, key, shlex.split(value) if is_text else value)

    def _parameters(self, key: str, value: str) -> None:
        """`additional_parameters` is the end of the command line, which beats the fields."""
        given = read_arguments(tuple(shlex.split(value)), self.ledger, f"{key} ")
        for name in filter(self.found.__contains__, given):
            why = f"--{name} in additional_parameters beats it"
            self.ledger.drop(why, self.found[name].key)
        self.found |= given
        self.ledger.place("the options in it", key)

    def _preset(self, key: str, value: Any) -> None:
        """LyCORIS_preset chooses layers of a LyCORIS network."""
        self.ledger.drop("presets of layers do not exist here", key)
        if self.lora_type.startswith("LyCORIS/") and value not in ("", "full"):
            self.ledger.todo.append(
                f"LyCORIS_preset {value}: choose layers with include_patterns and exclude_patterns "
                "in network_args; attention and MLP of all blocks are trained"
            )

    def metadata(self) -> None:
        """The panel for fine-tuning trains on a metadata file that it writes into `train_dir`."""
        files = ("caption_metadata_filename", "latent_metadata_filename")
        key = files[str(self.config.get("use_latent_files")).lower() == "yes"]
        folder, name = self.config.get("train_dir"), self.config.get(key)
        if folder and name and not self.config.get("dataset_config"):
            for unused in ("train_dir", *files):
                self.found.pop(unused, None)
            self.give("in_json", key, f"{folder}/{name}")
            self.ledger.place("in_json", "train_dir")

    def network(self) -> None:
        """LoRA_type and the fields of the network as network_module and network_args."""
        family, _, algorithm = self.lora_type.partition("/")
        words = [f"algo={algorithm.lower()}"] if family == "LyCORIS" and algorithm else []
        module = LYCORIS if words else MODULES[self.lora_type]
        if self.lora_type:
            self.give("network_module", "LoRA_type", module)
        self.ledger.drop("it chose the script, which is known", "anima_checkbox")
        for key in filter(self.ledger.has, NETWORK_FIELDS):
            value = self.config[key]
            of_lokr = key in ("factor", "decompose_both") and module == MODULES[""]
            if is_off(value) or of_lokr or (key == "factor" and value == -1):
                self.ledger.drop(OFF, key)
            elif key in NETWORK_FIELDS[-4:]:
                self.ledger.drop("the DiT has no convolutions", key)
            else:
                try:
                    parse_network_args([*words[:1], f"{key}={value}"], module)
                except UserError as error:
                    self.ledger.drop(str(error).removeprefix("--network_args "), key)
                    continue
                words.append(f"{key}={value}")
                self.ledger.place("network_args", key)
        if words:
            if "network_args" in self.found:
                words += self.found["network_args"].value
            key = "fields of the network"
            join(self.found, self.ledger, ["network_args"], "network_args", words, key)
