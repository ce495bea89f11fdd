"""Options of sd-scripts that are not fields: aliases, accepted ones without effect, refused ones.

Together with the fields of `TrainOptions` these tables know every option that existing command
lines use, so that a spelling mistake is told apart from a feature that is missing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """Another spelling of `target`; a flag stands for `value`, None passes its own value on."""

    target: str
    value: str | None = None


ALIASES = {
    "caption_extention": Alias("caption_extension"),
    "xformers": Alias("attn_mode", "xformers"),
    "sdpa": Alias("attn_mode", "torch"),
    "use_8bit_adam": Alias("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": Alias("optimizer_type", "Lion"),
}


def by_name(reasons: Mapping[str, str]) -> dict[str, str]:
    """Reason -> names, turned into name -> reason."""
    return {name: reason for reason, names in reasons.items() for name in names.split()}


# Accepted with one warning, so that existing command lines keep running.
IGNORED = by_name({
    "it has no effect on Anima": "v2 v_parameterization clip_skip metadata_is_negative_embedding "
    "no_token_padding",
    "it has no effect on a flow model": "noise_offset noise_offset_random_strength "
    "multires_noise_iterations multires_noise_discount adaptive_noise_scale zero_terminal_snr "
    "min_snr_gamma debiased_estimation_loss scale_v_pred_loss_like_noise_pred v_pred_like_loss",
    "the limits are qwen3_max_token_length and t5_max_token_length": "max_token_length",
    "the tokenizers come from the models folder": "tokenizer_cache_dir",
    "parentheses in captions are plain text for Anima": "weighted_captions",
    "attn_mode chooses the attention": "mem_eff_attn",
    "files are always mapped": "disable_mmap_load_safetensors",
    "models are always loaded straight to the device": "lowram",
    "threads are used, and they stay": "persistent_data_loader_workers",
    "sampling always uses Euler steps of the flow": "sample_sampler",
    "one device is used": "ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph",
})  # fmt: skip

# Features outside this program, under the names that people use for them.
OUTSIDE = by_name({
    "ControlNet is not supported for Anima; remove it": "controlnet control_net "
    "controlnet_model_name_or_path control_net_models control_net_lllite_models cond_emb_dim",
    "textual inversion is not supported for Anima; remove it": "textual_inversion "
    "textual_inversion_embeddings embedding embeddings token_string init_word "
    "num_vectors_per_token use_object_template use_style_template",
})  # fmt: skip

# Refused by name with a reason, never ignored: the run would not be what was asked for.
REFUSED = by_name({
    "8-bit base weights are not supported yet; use --blocks_to_swap to save memory":
    "fp8_base fp8_base_unet fp8_scaled",
    "use --compile, which compiles block by block": "torch_compile dynamo_backend",
    "it is an option of full fine-tuning (`anima-fast finetune`); remove it for a LoRA":
    "fused_backward_pass weight_update",
    "training on several devices is not supported; use one device": "deepspeed zero_stage "
    "offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
    "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model "
    "fp16_master_weights_and_gradients",
    "uploads are out of scope; use `hf upload` after the run": "huggingface_repo_id "
    "huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility "
    "save_state_to_huggingface resume_from_huggingface async_upload",
    "it is an option of full fine-tuning (`anima-fast finetune`); for a LoRA use "
    "--network_args network_reg_lrs=PATTERN=RATE": "self_attn_lr cross_attn_lr mlp_lr mod_lr",
    "it is an option of full fine-tuning (`anima-fast finetune`); for a LoRA use --network_args "
    "train_llm_adapter=True network_reg_lrs=PATTERN=RATE": "llm_adapter_lr",
    "not needed: --resume continues exactly where the state was saved":
    "initial_epoch initial_step skip_until_initial_step",
    "own dataset classes are not supported; describe the data in --dataset_config": "dataset_class",
}) | OUTSIDE  # fmt: skip

# Names that take no value on the command line; the other aliases and ignored names take one.
BARE_FLAGS = frozenset({
    "v2", "v_parameterization", "weighted_captions", "mem_eff_attn", "lowram",
    "disable_mmap_load_safetensors", "persistent_data_loader_workers", "zero_terminal_snr",
    "noise_offset_random_strength", "debiased_estimation_loss", 
    "scale_v_pred_loss_like_noise_pred", "metadata_is_negative_embedding", "no_token_padding",
    "ddp_gradient_as_bucket_view", "ddp_static_graph", "xformers", "sdpa", "use_8bit_adam",
    "use_lion_optimizer",
})  # fmt: skip
