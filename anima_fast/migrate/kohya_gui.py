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
from anima_fast.migrate.ledger import Ledger, is_off
from anima_fast.migrate.rows import Item
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
# Fields that are words of network_args.
NETWORK_FIELDS = (
    "factor", "decompose_both", "dora_wd", "rank_dropout", "module_dropout", "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio", "use_scalar", "train_norm",
    "train_llm_adapter", "exclude_patterns", "include_patterns", "network_reg_dims",
    "network_reg_lrs", "conv_dim", "conv_alpha", "use_tucker", "use_cp", "bypass_mode",
    "full_matrix",
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


def items(config: Mapping[str, Any], ledger: Ledger) -> tuple[str, list[Item]]:
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
    return ("train" if fields.lora_type else "finetune"), list(fields.found.values())


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
        self.found: dict[str, Item] = {}

    def settle(self, key: str, value: Any) -> None:
        """One field; what says nothing stays open, and is off."""
        if key in NETWORK_FIELDS or key in ("LoRA_type", "anima_checkbox"):
            return
        if key in ONLY and is_off(value) and not is_off(self.config.get(ONLY[key][0])):
            self._give(ONLY[key][1], key, True)
        elif key in OF_FLUX:
            self.ledger.drop(key, "it is about another model")
        elif key == "LyCORIS_preset":
            self._preset(key, value)
        elif is_off(value) and key not in ("network_alpha", "anima_network_alpha"):
            return
        elif key == "xformers" and isinstance(value, str):
            # It chooses among xformers, sdpa and none.
            self._give(value, key, True)
        elif key == "sample_prompts":
            lines = [line.strip() for line in str(value).splitlines()]
            prompts = [line for line in lines if line and not line.startswith("#")]
            self._give("sample_prompt", key, prompts)
        elif key == "additional_parameters":
            self._parameters(key, str(value))
        elif key == "lr_warmup":
            # A percentage of all steps.
            if self.config.get("lr_warmup_steps"):
                self.ledger.drop(key, "lr_warmup_steps is given")
            else:
                self._give("lr_warmup_steps", key, float(value) / 100)
        else:
            self._plain(key, value)

    def _give(self, name: str, key: str, value: Any) -> None:
        self.found[name] = Item(key, name, value)

    def _plain(self, key: str, value: Any) -> None:
        """A field with the name of an option, or nearly so."""
        name = RENAMED.get(key, key.removeprefix("anima_"))
        if self.config.get(f"anima_{key}") not in (None, ""):
            self.ledger.drop(key, f"anima_{key} is given, and beats it")
        elif key == "epoch" and not is_off(self.config.get("max_train_steps")):
            self.ledger.drop(key, "max_train_steps is given, and beats it there")
        elif name in self.found or (key in RENAMED and not is_off(self.config.get(name))):
            self.ledger.drop(key, f"{name} is given as well, and beats it")
        else:
            is_text = name in LISTS and isinstance(value, str)
            self._give(name, key, shlex.split(value) if is_text else value)

    def _parameters(self, key: str, value: str) -> None:
        """`additional_parameters` is the end of the command line, which beats the fields."""
        for item in read_arguments(tuple(shlex.split(value)), self.ledger, f"{key} "):
            if item.name in self.found:
                why = f"--{item.name} in additional_parameters beats it"
                self.ledger.drop(self.found.pop(item.name).key, why)
            self.found[item.name] = item
        self.ledger.place(key, "the options in it")

    def _preset(self, key: str, value: Any) -> None:
        """LyCORIS_preset chooses layers of a LyCORIS network."""
        self.ledger.drop(key, "presets of layers do not exist here")
        if self.lora_type.startswith("LyCORIS/") and value not in ("", "full"):
            self.ledger.todo.append(
                f"LyCORIS_preset {value}: choose layers with include_patterns and exclude_patterns "
                "in network_args; attention and MLP of all blocks are trained"
            )

    def metadata(self) -> None:
        """The panel for fine-tuning trains on a metadata file that it writes into `train_dir`."""
        latents = str(self.config.get("use_latent_files")).lower() == "yes"
        key = "latent_metadata_filename" if latents else "caption_metadata_filename"
        folder, name = self.config.get("train_dir"), self.config.get(key)
        if folder and name and not self.config.get("dataset_config"):
            for unused in ("train_dir", "latent_metadata_filename", "caption_metadata_filename"):
                self.found.pop(unused, None)
            self._give("in_json", key, f"{folder}/{name}")
            self.ledger.place("train_dir", "in_json")

    def network(self) -> None:
        """LoRA_type and the fields of the network as network_module and network_args."""
        family, _, algorithm = self.lora_type.partition("/")
        words = [f"algo={algorithm.lower()}"] if family == "LyCORIS" and algorithm else []
        module = LYCORIS if words else MODULES[self.lora_type]
        if self.lora_type:
            self._give("network_module", "LoRA_type", module)
        self.ledger.drop("anima_checkbox", "it chose the script, which is known")
        for key in filter(self.ledger.has, NETWORK_FIELDS):
            value = self.config[key]
            of_lokr = key in ("factor", "decompose_both") and module == MODULES[""]
            if is_off(value) or of_lokr or (key == "factor" and value == -1):
                self.ledger.drop(key, "it is not set")
            elif key.startswith(("conv_", "use_tucker", "use_cp")):
                self.ledger.drop(key, "the DiT has no convolutions")
            else:
                word = f"{key}={value}"
                try:
                    parse_network_args([*words[:1], word], module)
                except UserError as error:
                    self.ledger.drop(key, str(error).removeprefix("--network_args "))
                    continue
                words.append(word)
                self.ledger.place(key, "network_args")
        if words:
            self._join_words(words)

    def _join_words(self, words: list[str]) -> None:
        if "network_args" in self.found:
            item = self.found.pop("network_args")
            words += item.value if isinstance(item.value, list) else [str(item.value)]
            self.ledger.place(item.key, "network_args")
        key = "fields of the network"
        self.ledger.extend({key: words})
        self._give("network_args", key, words)
