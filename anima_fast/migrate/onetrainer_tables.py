"""Names of OneTrainer's configuration, and what has no counterpart here."""

from __future__ import annotations

DTYPES = {"BFLOAT_16": "bf16", "FLOAT_16": "fp16", "FLOAT_32": "no", "TFLOAT_32": "no"}
MODEL_NAMES = {
    "STABLE_DIFFUSION_15": "Stable Diffusion 1.5", "STABLE_DIFFUSION_XL_10_BASE": "SDXL",
    "STABLE_DIFFUSION_3": "Stable Diffusion 3", "STABLE_DIFFUSION_35": "Stable Diffusion 3.5",
    "FLUX_DEV_1": "FLUX.1", "FLUX_FILL_DEV_1": "FLUX.1 Fill", "FLUX_2": "FLUX.2",
    "CHROMA_1": "Chroma", "QWEN": "Qwen-Image", "HI_DREAM_FULL": "HiDream",
    "HUNYUAN_VIDEO": "HunyuanVideo", "SANA": "Sana", "Z_IMAGE": "Z-Image",
    "PIXART_ALPHA": "PixArt Alpha", "PIXART_SIGMA": "PixArt Sigma", "ERNIE": "ERNIE-Image",
    "WUERSTCHEN_2": "Wuerstchen 2", "STABLE_CASCADE_1": "Stable Cascade", "KREA_2": "Krea 2",
    "IDEOGRAM_4": "Ideogram 4",
}  # fmt: skip
FORMATS = {
    "KOHYA_LORA": "kohya", "COMFY_LORA": "comfyui", "COMFYUI_LORA": "comfyui",
    "DIFFUSERS_LORA": "diffusers", "LEGACY_LORA": "kohya", "SAFETENSORS": "kohya",
}  # fmt: skip

# OneTrainer's defaults that are not ours; keys of its files that are left out mean these.
DEFAULTS = {
    "learning_rate": 3e-6, "epochs": 100, "batch_size": 1, "resolution": "512",
    "train_dtype": "FLOAT_16", "lora_rank": 16, "lora_alpha": 1.0, "lokr_dim": 16,
    "learning_rate_warmup_steps": 200.0, "timestep_distribution": "UNIFORM",
    "gradient_checkpointing": True, "clip_grad_norm": 1.0, "learning_rate_scheduler": "CONSTANT",
    "latent_caching": True, "aspect_ratio_bucketing": True, "training_method": "FINE_TUNE",
}  # fmt: skip

_PART = "a part that Anima does not have"
_UPLOAD = "training in a rented machine is out of scope"
_DEVICES = "one device is used here"
_EMBEDDING = "embeddings are not supported for Anima"
# Beginnings of names -> why the keys are dropped.
DROPPED_TABLES = {
    "secrets": "passwords are never written", "cloud": _UPLOAD, "unet.": _PART, "prior.": _PART,
    "unconditional_transformer.": _PART, "text_encoder_2": _PART, "text_encoder_3": _PART,
    "text_encoder_4": _PART, "effnet_encoder.": _PART, "decoder.": _PART,
    "decoder_text_encoder.": _PART, "decoder_vqgan.": _PART, "embedding": _EMBEDDING,
    "additional_embeddings": _EMBEDDING, "preserve_embedding_norm": _EMBEDDING,
    "bundle_additional_embeddings": _EMBEDDING,
    "quantization": "8-bit base weights are not supported: blocks_to_swap saves memory",
    "optimizer_defaults": "what the window remembers of other choices",
    "multi_gpu": _DEVICES, "device_indexes": _DEVICES, "gradient_reduce": _DEVICES,
    "fused_gradient_reduce": _DEVICES, "async_gradient_reduce": _DEVICES,
    "oft_": "OFT does not exist here", "dora_oft": "OFT does not exist here",
    "text_encoder.": "the text encoder is not trained, as there for Anima",
    "transformer.": "it has no counterpart for the DiT",
    "vae.": "the VAE runs before training only; no_half_vae runs it in float32",
    "lokr_": "it is about LoKr", "samples": "there are none",
}  # fmt: skip
_WINDOW = "it is about OneTrainer's own windows and folders"
_VALIDATION = "validation holds out a part of the training images here: --validation_split"
_SAMPLES = "it has no counterpart for previews here"
_SD = "it is about Stable Diffusion"
_VIDEO = "it is about videos"
DROPPED = {
    "__version": "the version of the file's form", "debug_mode": _WINDOW, "debug_dir": _WINDOW,
    "workspace_dir": "files, logs and states go to output_dir", "tensorboard_expose": _WINDOW,
    "tensorboard_always_on": _WINDOW, "tensorboard_port": _WINDOW, "tensorboard_mode": _WINDOW,
    "validation": _VALIDATION, "validate_after": _VALIDATION, "validate_after_unit": _VALIDATION,
    "continue_last_backup": "--resume auto goes on from the newest state",
    "prevent_overwrites": "an older LoRA of the same name is replaced",
    "include_train_config": "the options are stored in the file's header",
    "async_offloading": "copies never block here", "enable_async_offloading": "copies never block",
    "enable_activation_offloading": "it belongs to gradient_checkpointing",
    "force_circular_padding": "Anima has no circular padding here",
    "clear_cache_before_training": "caches follow the contents of the files here",
    "prefetch_next_batch": "batches are always prepared ahead",
    "temp_device": "it is always the processor", "fallback_train_dtype": _WINDOW,
    "enable_autocast_cache": "there is no autocast here", "only_cache": _WINDOW, "frames": _VIDEO,
    "vb_loss_strength": _SD, "loss_scaler": "fp16 always has a loss scale",
    "loss_weight_strength": "it belongs to loss_weight_fn",
    "generalized_offset_noise": "it belongs to offset_noise_weight",
    "rescale_noise_scheduler_to_zero_terminal_snr": _SD, "force_v_prediction": _SD,
    "force_epsilon_prediction": _SD, "cep_gamma": "it has no counterpart",
    "custom_conditioning_image": "training on pairs of images is not supported",
    "masked_prior_preservation_weight": "it has no counterpart", "unmasked_probability": _SD,
    "unmasked_weight": "outside a mask the loss is 0 here",
    "lora_decompose_norm_epsilon": "it changes nothing that can be seen",
    "lora_weight_dtype": "adapters are float32 here", "layer_filter_preset": "layer_filter says it",
    "sample_definition_file_name": _SAMPLES, "sample_after": _SAMPLES,
    "sample_after_unit": _SAMPLES, "sample_skip_first": _SAMPLES, "sample_image_format": _SAMPLES,
    "non_ema_sampling": _SAMPLES,
    "sample_video_format": _VIDEO, "sample_audio_format": _VIDEO,
    "samples_to_tensorboard": _SAMPLES, "backup_before_save": "states are written atomically",
    "rolling_backup": "the rolling state replaces itself",
    "rolling_backup_count": "the rolling state replaces itself",
    "save_skip_first": "every file is saved", "save_filename_prefix": "output_name names the files",
    "weight_dtype": "weights have the type of mixed_precision", "dynamic_timestep_shifting": "off",
    "ema_update_step_interval": "the mean is updated every step here", "ema_decay": "ema is off",
    "text_encoder_sequence_length": "the limit is qwen3_max_token_length",
    "text_encoder_layer_skip": _SD,
}  # fmt: skip
