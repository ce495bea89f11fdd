"""What sd-scripts has that is not an option of ours: other names, values and defaults."""

from __future__ import annotations

from anima_fast.options.other_names import by_name

# Keys that only configurations for another model have.
OTHER_MODEL_KEYS = {
    "t5xxl": "FLUX.1, Stable Diffusion 3 or Chroma", "clip_l": "FLUX.1 or Stable Diffusion 3",
    "ae": "FLUX.1 or Lumina", "gemma2": "Lumina Image 2.0", "clip_g": "Stable Diffusion 3",
    "model_prediction_type": "FLUX.1 or Lumina", "guidance_scale": "FLUX.1",
    "max_token_length": "Stable Diffusion", "clip_skip": "Stable Diffusion",
    "v_parameterization": "Stable Diffusion", "v2": "Stable Diffusion 1 and 2",
}  # fmt: skip
# Networks of other models; `networks.lora_MODEL` names the model.
OTHER_MODULES = {
    "networks.lora": "Stable Diffusion or SDXL", "networks.lora_fa": "Stable Diffusion",
    "networks.dylora": "Stable Diffusion", "networks.oft": "SDXL", "networks.oft_flux": "FLUX.1",
}  # fmt: skip

# Names of the script's first version and of forks.
OTHER_NAMES = {
    "dit_path": "pretrained_model_name_or_path", "dit": "pretrained_model_name_or_path",
    "anima_transformer": "pretrained_model_name_or_path", "qwen3_path": "qwen3", "qwen": "qwen3",
    "vae_path": "vae", "t5_tokenizer_dir": "t5_tokenizer_path",
    "anima_finetune_learning_rate": "learning_rate", "optimizer_args_custom": "optimizer_args",
    "network_args_custom": "network_args",
}  # fmt: skip
# Network modules of forks.
OTHER_NETWORKS = {
    "networks.lokr_anima": "networks.lokr", "networks.loha_anima": "networks.loha",
    "lycoris": "lycoris.kohya", "lora_anima": "networks.lora_anima",
}  # fmt: skip
# Value of lora-scripts' anima_checkpoint_mode -> the option it stands for.
CHECKPOINTS = {
    "standard": "gradient_checkpointing", "cpu": "cpu_offload_checkpointing",
    "unsloth": "unsloth_offload_checkpointing",
}  # fmt: skip
_PICKLE = "such files are pickles, which can run code when they are opened"
# (name, value there) -> value here and the reason.
OTHER_VALUES = {
    ("save_model_as", "ckpt"): ("safetensors", _PICKLE),
    ("save_model_as", "pt"): ("safetensors", _PICKLE),
    ("attn_mode", "sageattn"): ("torch", "sageattn has no backward pass, so it cannot train"),
    ("timestep_sampling", "logit_normal"): ("sigmoid", "the same distribution"),
    ("save_precision", "fp32"): ("float", "another name"),
    ("save_precision", "float32"): ("float", "another name"),
    ("save_precision", "bfloat16"): ("bf16", "another name"),
    ("mixed_precision", "fp32"): ("no", "another name"),
}
# Options that have an effect here only: the values that have none.
LIMITS = {"min_timestep": 0, "max_timestep": 1000}

# Its own defaults: written down where a source leaves the option out and ours is another one.
DEFAULTS = {
    "learning_rate": 2e-6, "mixed_precision": "no", "caption_extension": ".caption",
    "network_alpha": 1.0, "network_dim": 4, "max_train_steps": 1600, "train_batch_size": 1,
    "optimizer_type": "AdamW", "lr_scheduler": "constant", "max_grad_norm": 1.0,
    "timestep_sampling": "sigmoid", "sigmoid_scale": 1.0, "discrete_flow_shift": 1.0,
    "weighting_scheme": "uniform", "loss_type": "l2", "gradient_accumulation_steps": 1,
    "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64,
    "qwen3_max_token_length": 512, "t5_max_token_length": 512, "vae_batch_size": 1,
    "caption_separator": ",", "keep_tokens": 0, "prior_loss_weight": 1.0, "dataset_repeats": 1,
    "gradient_checkpointing": False, "long_captions": "cut", "lora_format": "kohya",
}  # fmt: skip
WHY_DEFAULT = {
    "learning_rate": "sd-scripts' default; 1e-4 is usual for a LoRA",
    "mixed_precision": "sd-scripts' default: float32 everywhere; bf16 takes half the memory",
}

# Names with a reason of their own; the rest come from the tables of the options.
DROPPED = by_name({
    "read, and its keys are listed": "config_file",
    "a password: give it on the command line, or as WANDB_API_KEY": "wandb_api_key",
    'a state of another trainer cannot be continued; network_weights = "LAST_LORA" starts from '
    "its last file, with a new optimizer": "resume",
    "it chose the script, which is known": "model_train_type model_type anima_training_mode",
})  # fmt: skip
