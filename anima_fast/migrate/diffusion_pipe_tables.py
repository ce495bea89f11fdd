"""Names of diffusion-pipe, and of the bluvoll fork of it that many Anima configurations use."""

from __future__ import annotations

MODELS = {
    "sdxl": "SDXL", "flux": "FLUX.1", "flux2": "FLUX.2", "wan": "Wan", "ltx-video": "LTX-Video",
    "hunyuan-video": "HunyuanVideo", "hunyuan_image": "HunyuanImage 2.1", "cosmos": "Cosmos",
    "lumina_2": "Lumina Image 2.0", "chroma": "Chroma", "hidream": "HiDream",
    "sd3": "Stable Diffusion 3", "omnigen2": "OmniGen2", "qwen_image": "Qwen-Image",
    "auraflow": "AuraFlow", "z_image": "Z-Image", "krea2": "Krea 2", "ernie_image": "ERNIE-Image",
    "longcat": "LongCat-Video", "ideogram4": "Ideogram 4", "minimax_h3": "MiniMax H3",
}  # fmt: skip

DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "no", "bf16": "bf16", "fp16": "fp16",
    "fp32": "no",
}  # fmt: skip

# Key -> option with the same meaning.
PATHS = {
    "model.transformer_path": "pretrained_model_name_or_path",
    "model.diffusion_model": "pretrained_model_name_or_path",
    "model.llm_path": "qwen3",
    "model.qwen_path": "qwen3",
    "model.vae_path": "vae",
    "model.vae": "vae",
    "model.llm_adapter_path": "llm_adapter_path",
}
SAME = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "save_every_n_epochs": "save_every_n_epochs",
    "save_every_n_steps": "save_every_n_steps",
    "blocks_to_swap": "blocks_to_swap",
    "checkpoint_every_n_minutes": "autosave_minutes",
    "caching_batch_size": "vae_batch_size",
    "compile": "compile",
    "uncond_fraction": "caption_dropout_rate",
    "monitoring.wandb_tracker_name": "log_tracker_name",
    "monitoring.wandb_run_name": "wandb_run_name",
}
# Keys of the fork's [model] that are about captions.
FORK_CAPTIONS = {
    "model.shuffle_tags": "shuffle_caption",
    "model.shuffle_keep_first_n": "keep_tokens",
    "model.tag_dropout_percent": "caption_tag_dropout_rate",
    "model.caption_dropout_percent": "caption_dropout_rate",
}
# Keys of the fork's [model] that choose layers -> the layers.
FORK_PARTS = {
    "train_self_attn": r"blocks\.\d+\.self_attn\..*",
    "train_cross_attn": r"blocks\.\d+\.cross_attn\..*",
    "train_mlp": r"blocks\.\d+\.mlp\..*",
    "train_adaln": r".*adaln_modulation.*",
}
# Parts with rates of their own; the LLM adapter has blocks too, so the others name the DiT's.
PART_PATTERNS = {
    "llm_adapter": r"llm_adapter\..*",
    "self_attn": r"blocks\.\d+\.self_attn\..*",
    "cross_attn": r"blocks\.\d+\.cross_attn\..*",
    "mlp": r"blocks\.\d+\.mlp\..*",
    "mod": r".*adaln_modulation.*",
}

_VIDEO = "it is about videos"
_DEVICES = "one device is used here"
_EVAL = "validation holds out a part of the training images here: --validation_split"
_CACHE = "caches follow the contents of the files here"
_UPLOAD = "uploads are out of scope; use `hf upload` after the run"
DROPPED = {
    "pipeline_stages": _DEVICES, "partition_method": _DEVICES, "partition_split": _DEVICES,
    "video_clip_mode": _VIDEO, "framerate": _VIDEO, "eval_datasets": _EVAL,
    "eval_every_n_epochs": _EVAL, "eval_every_n_steps": _EVAL, "eval_every_n_examples": _EVAL,
    "eval_before_first_step": _EVAL, "eval_micro_batch_size_per_gpu": _EVAL,
    "eval_gradient_accumulation_steps": _EVAL, "image_eval_micro_batch_size_per_gpu": _EVAL,
    "eval_image_micro_batch_size_per_gpu": _EVAL, "disable_block_swap_for_eval": _EVAL,
    "regenerate_cache": _CACHE, "trust_cache": _CACHE,
    "map_num_proc": "threads are used for reading: --max_data_loader_n_workers",
    "steps_per_print": "a bar shows every step", "logging_steps": "every step is logged",
    "x_axis_examples": "the x axis of the curves is the step",
    "reentrant_activation_checkpointing": "there is one way of checkpointing here",
    "resume_from_checkpoint": "states of DeepSpeed cannot be continued here",
    "huggingface_repo": _UPLOAD, "upload_hf_from_epoch": _UPLOAD,
    "monitoring.wandb_api_key": "a password: give it on the command line, or as WANDB_API_KEY",
    "adapter.dtype": "adapters are float32 here, which needs no Kahan sums",
    "adapter.alpha": "diffusion-pipe refuses it: alpha is the rank there",
    "model.guidance": "Anima has no embedded guidance",
    "model.multiscale_loss_weight": "there is no multi-scale loss here",
    "model.cache_text_embeddings": "captions are cached here in as many forms as they take",
    "model.text_encoder_fp8": "the text encoder runs before training only, in 16 bit",
    "model.text_encoder_nf4": "the text encoder runs before training only, in 16 bit",
    "model.qwen_nf4": "the text encoder runs before training only, in 16 bit",
}  # fmt: skip
