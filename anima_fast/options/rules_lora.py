"""Rules between options that only LoRA training has; `rules.py` says how they work."""

from __future__ import annotations

from anima_fast.errors import UserError
from anima_fast.options.network_args import parse_network_args
from anima_fast.options.rules import Draft

# Keywords of `add_lora` that `dim_from_weights` takes from the file, and how users write them.
OF_THE_FILE = {
    "exclude_patterns": "exclude_patterns",
    "include_patterns": "include_patterns",
    "blocks": "train_block_indices",
    "reg_dims": "network_reg_dims",
    "dora": "dora_wd",
    "lokr": "factor and the like",
}


def _network(draft: Draft) -> None:
    arguments = parse_network_args(draft.network_args, draft.network_module)
    draft.notices.extend(arguments.notices)
    plain = arguments.kind == "lora" and "dora" not in arguments.kwargs
    if draft.network_dropout and arguments.kind != "lora":
        draft.set(
            "network_dropout", None,
            f"network_dropout has no effect on {arguments.kind}: use rank_dropout or "
            "module_dropout in network_args",
        )  # fmt: skip
    if draft.scale_weight_norms and not plain:
        draft.set(
            "scale_weight_norms", None,
            "scale_weight_norms is off: only a plain LoRA's product is scaled by its two matrices",
        )  # fmt: skip
    if draft.tlora_min_rank is not None:
        if arguments.kind != "lora":
            raise UserError(f"--tlora_min_rank masks ranks of a LoRA, not of a {arguments.kind}")
        if draft.tlora_min_rank > draft.network_dim and not draft.dim_from_weights:
            raise UserError(
                f"--tlora_min_rank {draft.tlora_min_rank} is above --network_dim "
                f"{draft.network_dim}: it is the rank that is left at the highest noise"
            )
    if draft.dim_from_weights and not draft.network_weights:
        raise UserError("--dim_from_weights needs --network_weights FILE to take the ranks from")
    unused = [shown for key, shown in OF_THE_FILE.items() if key in arguments.kwargs]
    if draft.dim_from_weights and unused:
        draft.notices.append(
            f"dim_from_weights takes modules, kinds and ranks from the file: {', '.join(unused)} "
            "in network_args: no effect"
        )
    if len(draft.base_weights_multiplier) > len(draft.base_weights):
        raise UserError(
            f"--base_weights_multiplier has {len(draft.base_weights_multiplier)} values for "
            f"{len(draft.base_weights)} --base_weights: give at most one each"
        )
    if not draft.network_alpha:
        draft.set("network_alpha", float(draft.network_dim))


def _trained_parts(draft: Draft) -> None:
    if draft.network_train_unet_only and draft.network_train_text_encoder_only:
        raise UserError(
            "--network_train_unet_only and --network_train_text_encoder_only exclude each other: "
            "drop both to train both"
        )
    if draft.network_train_text_encoder_only and _text_encoder_is_frozen(draft):
        raise UserError(
            "--network_train_text_encoder_only with --text_encoder_lr 0 trains nothing: give the "
            "text encoder a rate"
        )


def _text_encoder_is_frozen(draft: Draft) -> bool:
    """Frozen by an explicit rate of 0 (no rate means learning_rate)."""
    return bool(draft.text_encoder_lr) and not any(draft.text_encoder_lr)


def _format(draft: Draft) -> None:
    """Found now, not when the finished network is saved."""
    if draft.lora_format != "diffusers":
        return
    arguments = parse_network_args(draft.network_args, draft.network_module)
    if arguments.kind != "lora" or "dora" in arguments.kwargs:
        raise UserError(
            "--lora_format diffusers holds plain LoRA only: use comfyui or kohya for LoHa, LoKr "
            "and DoRA"
        )
    if not draft.network_train_unet_only and not _text_encoder_is_frozen(draft):
        raise UserError(
            "--lora_format diffusers has no names for the text encoder, which is trained too: add "
            "--network_train_unet_only, or use comfyui or kohya"
        )


def _cached_text_is_frozen(draft: Draft) -> None:
    if not (draft.cache_text_encoder_outputs or draft.cache_text_encoder_outputs_to_disk):
        return
    if draft.network_train_text_encoder_only:
        raise UserError(
            "--network_train_text_encoder_only trains what --cache_text_encoder_outputs freezes: "
            "drop one of them"
        )
    if not draft.network_train_unet_only:
        draft.set(
            "network_train_unet_only", True,
            "cache_text_encoder_outputs: captions are encoded once, so only the DiT is trained "
            "(network_train_unet_only)",
        )  # fmt: skip


NETWORK_RULES = (_network, _trained_parts, _cached_text_is_frozen, _format)
