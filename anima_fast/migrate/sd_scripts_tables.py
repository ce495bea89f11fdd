"""What sd-scripts has that is no option of ours: scripts, defaults, options of accelerate."""

from __future__ import annotations

# Script -> the command here.
SCRIPTS = {"anima_train_network.py": "train", "anima_train.py": "finetune"}

# Scripts of sd-scripts and musubi-tuner that train something else, by the start of their names.
OTHER_SCRIPTS = {
    "sdxl_": "SDXL", "flux_kontext_": "FLUX.1 Kontext", "flux_2_": "FLUX.2", "flux_": "FLUX.1",
    "sd3_": "Stable Diffusion 3", "lumina_": "Lumina Image 2.0", "hunyuan_image_": "HunyuanImage",
    "chroma_": "Chroma", "wan_": "Wan", "hv_": "HunyuanVideo", "fpack_": "FramePack",
    "qwen_image_": "Qwen-Image", "zimage_": "Z-Image", "kandinsky5_": "Kandinsky 5",
    "train_network": "Stable Diffusion 1 and 2", "train_db": "Stable Diffusion 1 and 2",
    "fine_tune": "Stable Diffusion 1 and 2", "stable_cascade_": "Stable Cascade",
}  # fmt: skip

# Keys that only configurations for another model have.
OTHER_MODEL_KEYS = {
    "t5xxl": "FLUX.1, Stable Diffusion 3 or Chroma", "clip_l": "FLUX.1 or Stable Diffusion 3",
    "ae": "FLUX.1 or Lumina", "gemma2": "Lumina Image 2.0", "clip_g": "Stable Diffusion 3",
    "model_prediction_type": "FLUX.1 or Lumina", "guidance_scale": "FLUX.1",
    "max_token_length": "Stable Diffusion", "clip_skip": "Stable Diffusion",
    "v_parameterization": "Stable Diffusion", "v2": "Stable Diffusion 1 and 2",
}  # fmt: skip
OTHER_MODULES = {
    "networks.lora": "Stable Diffusion or SDXL", "networks.lora_flux": "FLUX.1",
    "networks.lora_sd3": "Stable Diffusion 3", "networks.lora_lumina": "Lumina Image 2.0",
    "networks.lora_wan": "Wan", "networks.lora_qwen_image": "Qwen-Image",
    "networks.lora_hunyuan_image": "HunyuanImage", "networks.lora_zimage": "Z-Image",
    "networks.lora_fa": "Stable Diffusion", "networks.dylora": "Stable Diffusion",
    "networks.oft": "SDXL", "networks.oft_flux": "FLUX.1",
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
# (option, value there) -> value here and the reason.
OTHER_VALUES = {
    ("attn_mode", "sageattn"): ("torch", "sageattn has no backward pass, so it cannot train"),
    ("timestep_sampling", "logit_normal"): ("sigmoid", "the same distribution"),
    ("save_precision", "fp32"): ("float", "another name"),
    ("save_precision", "float32"): ("float", "another name"),
    ("save_precision", "bfloat16"): ("bf16", "another name"),
    ("mixed_precision", "fp32"): ("no", "another name"),
}

# Options that do something here only: the values that do nothing.
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
    "caption_extension": "sd-scripts' default",
}

_ONE_DEVICE = "one device is used here"
_PROCESSES = "one process is used here"
# Options of `accelerate launch`, with and without effect there.
LAUNCHER = {
    "--mixed_precision": "it had no effect there either: the script's own --mixed_precision counts",
    "--num_cpu_threads_per_process": _PROCESSES,
    "--num_machines": _ONE_DEVICE,
    "--num_processes": _ONE_DEVICE,
    "--machine_rank": _ONE_DEVICE,
    "--main_process_ip": _ONE_DEVICE,
    "--main_process_port": _ONE_DEVICE,
    "--same_network": _ONE_DEVICE,
    "--num_gpus": _ONE_DEVICE,
    "--nproc_per_node": _ONE_DEVICE,
    "--config_file": "a file of accelerate: precision and devices are options of the training here",
    "--dynamo_backend": "--compile compiles the blocks here",
    "--dynamo_mode": "--compile_mode is the option here",
    "--quiet": "it is about accelerate's own messages",
}
LAUNCHER_REST = "an option of the launcher, which is not used here"

# Names with a reason of their own; the rest come from `option_groups.tables`.
DROPPED = {
    "config_file": "read, and its keys are listed",
    "output_config": "it is about sd-scripts' own configuration file",
    "dynamo_backend": "--compile compiles the blocks here",
    "fp8_base": "it had no effect on Anima there",
    "fp8_base_unet": "it had no effect on Anima there",
    "wandb_api_key": "a password: give it on the command line, or as WANDB_API_KEY",
    "huggingface_token": "a password, and uploads are out of scope",
    "resume": "a state of another trainer cannot be continued; network_weights = \"LAST_LORA\" "
    "starts from its last file, with a new optimizer",
    "model_train_type": "it chose the script, which is known",
    "model_type": "it chose the script, which is known",
    "anima_training_mode": "it chose the script, which is known",
}  # fmt: skip
DEEPSPEED = "DeepSpeed is for several devices, and one is used here"
