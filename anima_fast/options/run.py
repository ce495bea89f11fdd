"""Every option once: `TrainOptions` for a LoRA, `FinetuneOptions` for the whole model.

The groups in this package declare name, type, default, help sentence and limits; flags, TOML keys
and the documentation's table are made from them. `rules.py` says what implies and what excludes
what, `files.py` reads and writes TOML. None means off or "decided by the program".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from anima_fast.options.data import (
    CacheOptions,
    CaptionOptions,
    DatasetOptions,
    ImageOptions,
    MaskOptions,
    ModelOptions,
)
from anima_fast.options.declare import Checked, option, specs
from anima_fast.options.finetune import PARTS, FinetuneGroup
from anima_fast.options.network_args import NetworkArgs, parse_network_args
from anima_fast.options.output import (
    LengthOptions,
    LogOptions,
    MetadataOptions,
    PreviewOptions,
    SaveOptions,
    ValidationOptions,
)
from anima_fast.options.rules import SHARED_RULES, Draft, Rule
from anima_fast.options.rules_finetune import FINETUNE_RULES
from anima_fast.options.rules_lora import NETWORK_RULES
from anima_fast.options.training import (
    PRECISIONS,
    FlowOptions,
    LoRAFileOptions,
    LoRASpeedOptions,
    MemoryOptions,
    MemoryPlanOptions,
    NetworkOptions,
    NetworkRateOptions,
    OptimizerOptions,
    SchedulerOptions,
)

# The positions that Qwen3-0.6B was trained with.
LONGEST_CAPTION = 32768

_file = partial(option, "Configuration file")


@dataclass(frozen=True)
class FileOptions:
    """Options of the commands that are not part of a run."""

    config_file: str | None = _file(None, "TOML file with options; the command line beats it.")
    output_config: bool = _file(False, "Write the options to --config_file and stop.")


@dataclass(frozen=True)
class PresetOptions:
    """Which presets a run has; their settings are options like any other."""

    preset: tuple[str, ...] = _file(
        (),
        "Presets, several with commas or spaces: style, character or concept; 8gb, 12gb, 16gb or "
        "24gb; or a TOML file of your own. What is given by hand wins.",
    )


# What both kinds of training have, before and after the options of the network. The bases come in
# reverse: dataclass fields follow the order from the last base to the first. The two are not made
# dataclasses, which takes a while for so many fields and delays every help page.
class _Data(
    LengthOptions, CacheOptions, ImageOptions, CaptionOptions, DatasetOptions, ModelOptions,
    PresetOptions,
):  # fmt: skip
    """Model files, dataset and length."""

    @property
    def token_limits(self) -> tuple[int, int]:
        """Tokens of Qwen3 and of T5 after which a caption is cut off."""
        if self.long_captions == "whole":
            return LONGEST_CAPTION, LONGEST_CAPTION
        return self.qwen3_max_token_length, self.t5_max_token_length


class _Learning(
    MetadataOptions, PreviewOptions, ValidationOptions, LogOptions, SaveOptions, MaskOptions,
    MemoryPlanOptions, MemoryOptions, FlowOptions, SchedulerOptions, OptimizerOptions,
):  # fmt: skip
    """How it is trained, saved and logged."""


@dataclass(frozen=True)
class RunOptions(Checked):
    """Applies the rules when the options of a training run are made."""

    # The command that takes these options, and the rules between them.
    command: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]

    notices: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    def _settle(self) -> None:
        draft = Draft({name: getattr(self, name) for name in specs(type(self))})
        for rule in self.rules:
            rule(draft)
        for name, value in {**draft.values, "notices": tuple(draft.notices)}.items():
            self._put(name, value)


@dataclass(frozen=True)
class TrainOptions(
    RunOptions,
    _Learning,
    NetworkRateOptions,
    LoRASpeedOptions,
    LoRAFileOptions,
    NetworkOptions,
    _Data,
):
    """All options of a training run, flat, named as in sd-scripts.

    Making an instance checks types and ranges and applies the rules of `rules.py`; it never touches
    the disk. `notices` tells what the rules changed.

    Raises:
        UserError: for a wrong value or a combination that cannot work.
    """

    command = "train"
    rules = (*NETWORK_RULES, *SHARED_RULES)

    @property
    def network_arguments(self) -> NetworkArgs:
        """`network_args`, parsed and checked."""
        return parse_network_args(self.network_args, self.network_module)

    @property
    def network_kwargs(self) -> dict[str, Any]:
        """`network_args` as keyword arguments of `adapters.lora.add_lora`."""
        return self.network_arguments.kwargs

    @property
    def trains_llm_adapter(self) -> bool:
        """The LLM adapter gets LoRA modules (`network_args train_llm_adapter=True`)."""
        return self.network_arguments.train_llm_adapter

    @property
    def trains_text_encoder(self) -> bool:
        """The text encoder gets LoRA modules and runs in every step."""
        frozen = bool(self.text_encoder_lr) and not any(self.text_encoder_lr)
        return not self.network_train_unet_only and not frozen


@dataclass(frozen=True)
class FinetuneOptions(RunOptions, _Learning, FinetuneGroup, _Data):
    """All options of full fine-tuning: those of `TrainOptions` without the network, and its own.

    Checked and settled like `TrainOptions`.
    """

    command = "finetune"
    rules = (*SHARED_RULES, *FINETUNE_RULES)

    mixed_precision: str = option(
        "Memory and speed", "bf16", "Type of weights and arithmetic; auto is bf16.",
        choices=PRECISIONS,
    )  # fmt: skip
    autosave_minutes: float = option(
        "Saving and resuming", 30.0,
        "Minutes between the states of a rolling resume folder; 0 = off.", low=0,
    )  # fmt: skip

    @property
    def part_rates(self) -> dict[str, float]:
        """The rate of each part by name, `base` for what belongs to no other; 0 is frozen."""
        given = {part: getattr(self, option) for part, (_, option) in PARTS.items()}
        rates = {p: self.learning_rate if rate is None else rate for p, rate in given.items()}
        return rates | {"base": self.learning_rate}

    @property
    def trains_llm_adapter(self) -> bool:
        """The LLM adapter is trained."""
        return self.part_rates["llm_adapter"] > 0

    @property
    def trains_text_encoder(self) -> bool:
        """Never: full fine-tuning leaves it frozen."""
        return False


# Either kind of training run.
AnyRun = TrainOptions | FinetuneOptions
