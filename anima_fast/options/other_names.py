"""Options of sd-scripts that are no fields: aliases, accepted ones without effect, refused ones.

Together with the fields of `TrainOptions` these tables know every option that existing command
lines use, so that a spelling mistake is told apart from a feature that is missing here.
"""

from __future__ import annotations

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

_NO_EFFECT = "it has no effect on Anima"
_NOISE = "it has no effect on a flow model"

# Accepted with one warning, so that existing command lines keep running.
IGNORED = {
    "v2": _NO_EFFECT,
    "v_parameterization": _NO_EFFECT,
    "clip_skip": _NO_EFFECT,
    "max_token_length": "the limits are qwen3_max_token_length and t5_max_token_length",
    "tokenizer_cache_dir": "the tokenizers come from the models folder",
    "weighted_captions": "parentheses in captions are plain text for Anima",
    "mem_eff_attn": "attn_mode chooses the attention",
    "disable_mmap_load_safetensors": "files are always mapped",
    "lowram": "models are always loaded straight to the device",
    "persistent_data_loader_workers": "threads are used, and they stay",
    "noise_offset": _NOISE,
    "noise_offset_random_strength": _NOISE,
    "multires_noise_iterations": _NOISE,
    "multires_noise_discount": _NOISE,
    "adaptive_noise_scale": _NOISE,
    "zero_terminal_snr": _NOISE,
    "min_snr_gamma": _NOISE,
    "debiased_estimation_loss": _NOISE,
    "scale_v_pred_loss_like_noise_pred": _NOISE,
    "v_pred_like_loss": _NOISE,
    "sample_sampler": "sampling always uses Euler steps of the flow",
    "metadata_is_negative_embedding": _NO_EFFECT,
    "no_token_padding": _NO_EFFECT,
    "ddp_timeout": "one device is used",
    "ddp_gradient_as_bucket_view": "one device is used",
    "ddp_static_graph": "one device is used",
}

_FP8 = "8-bit base weights are not supported yet; use --blocks_to_swap to save memory"
_COMPILE = "use --compile, which compiles block by block"
_UPLOAD = "uploads are out of scope; use `hf upload` after the run"
_SEVERAL = "training on several devices is not supported; use one device"
_FULL = (
    "it is an option of full fine-tuning (`anima-fast finetune`); for a LoRA use "
    "--network_args network_reg_lrs=PATTERN=RATE"
)
_WHOLE = "it is an option of full fine-tuning (`anima-fast finetune`); remove it for a LoRA"
_RESUME = "not needed: --resume continues exactly where the state was saved"
_CONTROL = "ControlNet is not supported for Anima; remove it"
_INVERSION = "textual inversion is not supported for Anima; remove it"
# What is not part of this program, under the names that people ask for it by.
OUTSIDE = {
    **dict.fromkeys(
        (
            "controlnet", "control_net", "controlnet_model_name_or_path", "control_net_models",
            "control_net_lllite_models", "cond_emb_dim",
        ),
        _CONTROL,
    ),
    **dict.fromkeys(
        (
            "textual_inversion", "textual_inversion_embeddings", "embedding", "embeddings",
            "token_string", "init_word", "num_vectors_per_token", "use_object_template",
            "use_style_template",
        ),
        _INVERSION,
    ),
}  # fmt: skip

# Refused by name with a reason, never ignored: the run would not be what was asked for.
REFUSED = {
    "fp8_base": _FP8,
    "fp8_base_unet": _FP8,
    "fp8_scaled": _FP8,
    "torch_compile": _COMPILE,
    "dynamo_backend": _COMPILE,
    "fused_backward_pass": _WHOLE,
    "weight_update": _WHOLE,
    "deepspeed": _SEVERAL,
    "zero_stage": _SEVERAL,
    "offload_optimizer_device": _SEVERAL,
    "offload_optimizer_nvme_path": _SEVERAL,
    "offload_param_device": _SEVERAL,
    "offload_param_nvme_path": _SEVERAL,
    "zero3_init_flag": _SEVERAL,
    "zero3_save_16bit_model": _SEVERAL,
    "fp16_master_weights_and_gradients": _SEVERAL,
    "huggingface_repo_id": _UPLOAD,
    "huggingface_repo_type": _UPLOAD,
    "huggingface_path_in_repo": _UPLOAD,
    "huggingface_token": _UPLOAD,
    "huggingface_repo_visibility": _UPLOAD,
    "save_state_to_huggingface": _UPLOAD,
    "resume_from_huggingface": _UPLOAD,
    "async_upload": _UPLOAD,
    "self_attn_lr": _FULL,
    "cross_attn_lr": _FULL,
    "mlp_lr": _FULL,
    "mod_lr": _FULL,
    "llm_adapter_lr": "it is an option of full fine-tuning (`anima-fast finetune`); for a LoRA use "
    "--network_args train_llm_adapter=True network_reg_lrs=PATTERN=RATE",
    "initial_epoch": _RESUME,
    "initial_step": _RESUME,
    "skip_until_initial_step": _RESUME,
    "dataset_class": "own dataset classes are not supported; describe the data in --dataset_config",
    **OUTSIDE,
}

# Names without a value on the command line; the others of the two tables above take one.
BARE_FLAGS = frozenset({
    "v2", "v_parameterization", "weighted_captions", "mem_eff_attn", "lowram",
    "disable_mmap_load_safetensors", "persistent_data_loader_workers", "zero_terminal_snr",
    "noise_offset_random_strength", "debiased_estimation_loss", 
    "scale_v_pred_loss_like_noise_pred", "metadata_is_negative_embedding", "no_token_padding",
    "ddp_gradient_as_bucket_view", "ddp_static_graph", "xformers", "sdpa", "use_8bit_adam",
    "use_lion_optimizer",
})  # fmt: skip
