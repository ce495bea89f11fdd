"""The options that only full fine-tuning has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from anima_fast.options.declare import option, specs
from anima_fast.options.training import (
    LoRAFileOptions,
    LoRASpeedOptions,
    NetworkOptions,
    NetworkRateOptions,
)

_parts = partial(option, "Trained parts")
_full = partial(option, "Full fine-tuning")


def _rate(part: str, more: str = "") -> Any:
    return _parts(None, f"Rate of {part} (default: learning_rate; 0 = frozen{more}).", low=0)


WEIGHT_UPDATES = ("plain", "stochastic", "fp32")
# Part of the model -> mark, option of its rate. A weight belongs to the first part whose mark is in
# its name; all others have `learning_rate`.
PARTS = {
    "llm_adapter": ("llm_adapter", "llm_adapter_lr"),
    "self_attn": (".self_attn", "self_attn_lr"),
    "cross_attn": (".cross_attn", "cross_attn_lr"),
    "mlp": (".mlp", "mlp_lr"),
    "mod": (".adaln_modulation", "mod_lr"),
}


def part_of(name: str) -> str:
    """The learning-rate part of a weight: the first whose mark its name contains, else base."""
    return next((part for part, (mark, _) in PARTS.items() if mark in name), "base")


@dataclass(frozen=True)
class FinetuneGroup:
    """Which weights are trained, and how they are updated and kept."""

    self_attn_lr: float | None = _rate("self attention")
    cross_attn_lr: float | None = _rate("cross attention")
    mlp_lr: float | None = _rate("the MLPs")
    mod_lr: float | None = _rate("the AdaLN modulation")
    llm_adapter_lr: float | None = _rate("the LLM adapter", ", which is advised")
    weight_update: str | None = _full(
        None, "How 16-bit weights take updates: plain (rounded), stochastic (rounded at random, "
        "right on average) or fp32 (a float32 copy is kept); default: stochastic with full_bf16, "
        "fp32 with full_fp16.",
        choices=WEIGHT_UPDATES,
    )  # fmt: skip
    fused_backward_pass: bool = _full(
        False, "Update each weight as soon as its gradient is ready, so that gradients are never "
        "all in memory; max_grad_norm then clips each weight's gradient by itself.",
    )  # fmt: skip


def network_options() -> dict[str, str]:
    """Options of `train` that full fine-tuning does not have, each with the remedy."""
    remedies = {
        "network_weights": "merge the LoRA into the model first (`anima-fast merge`)",
        "base_weights": "merge the LoRA into the model first (`anima-fast merge`)",
        "unet_lr": "the rate of the DiT is --learning_rate",
        "text_encoder_lr": "the text encoder is always frozen in full fine-tuning",
        "network_train_unet_only": "--llm_adapter_lr 0 trains the DiT only",
        "network_train_text_encoder_only": "the text encoder is always frozen in full fine-tuning",
        "cuda_graphs": "they record the fused blocks, which have frozen weights",
        "sums": "they are of the fused blocks, which have frozen weights",
        "network_args": "parts have rates of their own, such as --mlp_lr",
    }
    groups = (NetworkOptions, NetworkRateOptions, LoRAFileOptions, LoRASpeedOptions)
    names = [name for group in groups for name in specs(group)]
    plain = "it belongs to LoRA training (`anima-fast train`)"
    return {
        name: f"{remedies.get(name, plain)}; remove it, full fine-tuning has no network"
        for name in names
    }
