"""OneTrainer's JSON as options.

Its files may be whole (every field) or presets (only what differs): what is left out has its
default, which is written down where ours is another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from anima_fast.download import TEXT_ENCODER, VAE, default_models_dir, dit_file
from anima_fast.errors import UserError
from anima_fast.migrate.diffusion_pipe import KERNELS
from anima_fast.migrate.ledger import Ledger, is_off
from anima_fast.migrate.onetrainer_data import DEFAULT, EPOCHS, convert_concepts, convert_samples
from anima_fast.migrate.optimizers import ONETRAINER, Known, put_arguments
from anima_fast.migrate.paths import Paths
from anima_fast.migrate.rows import Row, on, one_of, reasons, settle, when_on, whole
from anima_fast.migrate.source import ONLY, Source, other_model

DTYPES = {"BFLOAT_16": "bf16", "FLOAT_16": "fp16", "FLOAT_32": "no", "TFLOAT_32": "no"}
FORMATS = {
    "KOHYA_LORA": "kohya", "COMFY_LORA": "comfyui", "COMFYUI_LORA": "comfyui",
    "DIFFUSERS_LORA": "diffusers", "LEGACY_LORA": "kohya", "SAFETENSORS": "kohya",
}  # fmt: skip
ATTENTION = {"FLASH": "flash", "XFORMERS": "xformers", "FLASH_ATTENTION": "flash"}
SCHEDULERS = {
    "CONSTANT": "constant", "LINEAR": "linear", "COSINE": "cosine",
    "COSINE_WITH_RESTARTS": "cosine_with_restarts",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts", "REX": "linear",
    "ADAFACTOR": "adafactor",
}  # fmt: skip
MODULES = {"LORA": "networks.lora_anima", "LOHA": "networks.loha", "LOKR": "networks.lokr"}
# What a comma-separated part of layer_filter finds in diffusers' names -> layers here.
FILTERS = {
    "attn1": r"blocks\.\d+\.self_attn\..*", "attn2": r"blocks\.\d+\.cross_attn\..*",
    "ff": r"blocks\.\d+\.mlp\..*",
}  # fmt: skip
# Parts that find several of these.
WIDER_FILTERS = {"attn": ("attn1", "attn2"), "transformer_block": tuple(FILTERS)}
# Of the 2B model, for fractions of it.
BLOCKS = 28


def _file(value: Any) -> str | None:
    """A single file; OneTrainer's folders in diffusers' form are not read here."""
    return str(value) if str(value).lower().endswith((".safetensors", ".pth")) else None


# Comes first, as other keys look at what it gives.
FIRST_ROWS = [
    Row("transformer.model_name", "pretrained_model_name_or_path", _file),
    Row("base_model_name", "pretrained_model_name_or_path", _file),
    Row("text_encoder.model_name", "qwen3", on),
    Row("vae.model_name", "vae", _file),
]
ROWS = [
    Row("epochs", "max_train_epochs", whole,
        "a batch that is not full ends an epoch here, and is left out there"),
    Row("gradient_accumulation_steps", "gradient_accumulation_steps", whole),
    Row("clip_grad_norm", "max_grad_norm"),
    Row("output_dtype", "save_precision", one_of({**DTYPES, "FLOAT_32": "float", "TFLOAT_32": "float"})),
    Row("tensorboard", "log_with", when_on("tensorboard")),
    Row("attention_mechanism", "attn_mode", one_of(ATTENTION, "torch")),
    Row("normalize_masked_area_loss", "masked_loss_normalize", when_on(True)),
    Row("text_encoder.dropout_probability", "caption_dropout_rate", on),
    Row("dataloader_threads", "max_data_loader_n_workers", whole),
    Row("caching_threads", "max_data_loader_n_workers", whole),
    Row("train_device", "device", lambda value: None if value == "cuda" else value),
]  # fmt: skip

_PART = "a part that Anima does not have"
_DEVICES = "one device is used here"
_WINDOW = "it is about OneTrainer's own windows and folders"
_8_BIT = "8-bit base weights are not supported: blocks_to_swap saves memory"
DROPPED = reasons({
    "passwords are never written": "secrets",
    "training in a rented machine is out of scope": "cloud",
    _PART: "unet. prior. unconditional_transformer. text_encoder_2 text_encoder_3 text_encoder_4 "
        "effnet_encoder. decoder. decoder_text_encoder. decoder_vqgan.",
    "embeddings are not supported for Anima":
        "embedding additional_embeddings preserve_embedding_norm bundle_additional_embeddings",
    "what the window remembers of other choices": "optimizer_defaults",
    _DEVICES: "multi_gpu device_indexes gradient_reduce fused_gradient_reduce async_gradient_reduce",
    "OFT does not exist here": "oft_ dora_oft",
    "single files are read here, not folders in diffusers' form": "base_model_name vae.model_name",
    _8_BIT: "quantization transformer.weight_dtype",
    "as for the frozen weights of every part, mixed_precision is their type":
        "weight_dtype enable_autocast_cache",
    "the text encoder is not trained, as there for Anima": "text_encoder.",
    "it has no counterpart for the DiT": "transformer.",
    "the VAE runs before training only; no_half_vae runs it in float32": "vae.",
    "only a LoRA has one; rank_dropout in network_args is for all": "dropout_probability",
    "it is about another kind of network": "lokr_ lora_",
    "the version of the file's form": "__version",
    _WINDOW: "debug_mode debug_dir tensorboard_expose tensorboard_always_on tensorboard_port "
        "tensorboard_mode fallback_train_dtype only_cache",
    "files, logs and states go to output_dir": "workspace_dir",
    "validation holds out a part of the training images here: --validation_split":
        "validation validate_after",
    "--resume auto goes on from the newest state": "continue_last_backup",
    "a file of the same name is replaced, every file is saved, and output_name names the files":
        "prevent_overwrites save_skip_first save_filename_prefix",
    "states are written atomically, and the rolling one replaces itself":
        "backup_before_save rolling_backup",
    "the unit is part of the option here":
        "save_every_unit save_after_unit backup_after_unit sample_after_unit",
    "files are saved by epochs or steps, and states by minutes": "save_every save_after backup_after",
    "the options are stored in the file's header": "include_train_config",
    "caches lie beside the images here: --cache_dir changes that": "cache_dir",
    "caches follow the contents of the files here": "clear_cache_before_training",
    "copies never block, and batches are prepared ahead here":
        "async_offloading enable_async_offloading prefetch_next_batch",
    "it belongs to gradient_checkpointing": "enable_activation_offloading layer_offload_fraction",
    "it is always the processor": "temp_device",
    "the first card is the default": "train_device",
    "it is about videos": "frames sample_video_format sample_audio_format",
    "it is about Stable Diffusion":
        "vb_loss_strength rescale_noise_scheduler_to_zero_terminal_snr force_v_prediction "
        "force_epsilon_prediction unmasked_probability text_encoder_layer_skip",
    "fp16 always has a loss scale": "loss_scaler",
    "outside a mask the loss is 0 here": "unmasked_weight",
    "training on pairs of images is not supported": "custom_conditioning_image",
    "it belongs to a choice that is off, or has no counterpart here":
        "loss_weight_strength loss_weight_fn generalized_offset_noise perturbation_noise_weight "
        "offset_noise_weight cep_gamma masked_prior_preservation_weight force_circular_padding "
        "learning_rate_cycles learning_rate_min_factor huber_delta ema_decay "
        "ema_update_step_interval custom_learning_rate_scheduler scheduler_params",
    "adapters are float32 here": "lora_weight_dtype",
    "layer_filter says it": "layer_filter_preset layer_filter_regex",
    "it has no counterpart for previews here":
        "samples sample_ non_ema_sampling",
    "the limit is qwen3_max_token_length": "text_encoder_sequence_length",
    "this type or form does not exist here": "output_dtype output_model_format",
})  # fmt: skip


def convert(source: Source, ledger: Ledger) -> str:
    """Fill the ledger from a configuration and the concepts that it names.

    Returns:
        the command here.
    Raises:
        UserError: another model, or a way of training that does not exist here.
    """
    command = _check(source.config)
    ledger.extend(source.config)
    ledger.place("model_type", "Anima, the only model here")
    ledger.place("training_method", f"anima-fast {command}")
    names = ("base_model_name", "transformer.model_name", "vae.model_name", "concept_file_name")
    ledger.paths = Paths.find([ledger.text(name) for name in names], source.folders)
    settle(FIRST_ROWS, ledger)
    _downloaded(ledger)
    _output(ledger, command)
    _precision(ledger, command)
    _memory(ledger, command)
    if command == "train":
        _network(ledger)
        _layers(ledger)
        _ema(ledger)
    else:
        _frozen_parts(ledger)
        ledger.drop("ema", "only a LoRA has a running mean here")
    _rate(ledger)
    _schedule(ledger)
    _optimizer(ledger, command)
    _noise(ledger)
    _loss(ledger)
    convert_concepts(source, ledger)
    convert_samples(source, ledger)
    _saving(ledger)
    settle(ROWS, ledger)
    ledger.add("max_train_epochs", EPOCHS, DEFAULT)
    _caches(ledger)
    ledger.place("transformer.train", "the DiT is what is trained")
    ledger.close(DROPPED)
    return command


def _check(config: Mapping[str, Any]) -> str:
    kind = str(config.get("model_type", "STABLE_DIFFUSION_15"))
    if kind != "ANIMA":
        name = other_model(kind) or kind.replace("_", " ").title()
        raise UserError(f"this file is for {name}: {ONLY}")
    method = str(config.get("training_method", "FINE_TUNE"))
    if method not in ("LORA", "FINE_TUNE"):
        raise UserError(f"training_method {method} is not supported for Anima: LORA and FINE_TUNE")
    part = config.get("transformer")
    if isinstance(part, dict) and part.get("train") is False:
        raise UserError("transformer.train is false: there is nothing else to train in Anima")
    peft = str(config.get("peft_type", "LORA"))
    if method == "LORA" and peft not in MODULES:
        raise UserError(f"peft_type {peft} does not exist here: use LORA, LOHA or LOKR")
    return "train" if method == "LORA" else "finetune"


def _downloaded(ledger: Ledger) -> None:
    """The files of the models folder stand for those of diffusers' form."""
    folder = default_models_dir()
    files = {
        "pretrained_model_name_or_path": folder / dit_file("base-v1.0"),
        "qwen3": folder / TEXT_ENCODER, "vae": folder / VAE,
    }  # fmt: skip
    missing = [name for name in files if name not in ledger.options]
    for name in missing:
        ledger.add(name, str(files[name]), "where `anima-fast download` puts it")
    if not all(files[name].exists() for name in missing):
        ledger.todo.append(f"run `anima-fast download`: it fetches {', '.join(missing)}")


def _output(ledger: Ledger, command: str) -> None:
    key = "output_model_destination"
    path, why = ledger.paths.resolve(ledger.text(key, "models/model.safetensors"))
    where = PureWindowsPath(path)
    # A folder, or a file with an ending.
    folder, name = (where.parent, where.stem) if where.suffix else (where, "model")
    parent = str(folder) if "\\" in path else folder.as_posix()
    why = "; ".join(filter(None, ("the folder and the name are two options", why)))
    ledger.take(key, "output_dir", parent, why, default=DEFAULT)
    ledger.add("output_name", name, f"from {key}")
    form = FORMATS.get(ledger.text("output_model_format"))
    if command == "finetune":
        ledger.drop("output_model_format", "a model is saved in the form that ComfyUI loads")
    elif form:
        ledger.take("output_model_format", "lora_format", form)


def _precision(ledger: Ledger, command: str) -> None:
    name = ledger.text("train_dtype", "FLOAT_16")
    why = "" if name in DTYPES else "this type does not exist here"
    ledger.take("train_dtype", "mixed_precision", DTYPES.get(name, "bf16"), why, DEFAULT)
    if name == "TFLOAT_32":
        ledger.add("cuda_allow_tf32", True, "train_dtype is TFLOAT_32")
    key = "transformer.weight_dtype"
    weights = ledger.text(key)
    if command == "finetune" and weights == "BFLOAT_16":
        ledger.take(key, "full_bf16", True)
    elif weights in DTYPES or weights == "NONE":
        ledger.drop(key, "frozen weights have the type of mixed_precision")


def _memory(ledger: Ledger, command: str) -> None:
    """Checkpointing, offloading and compilation; older files say it once for all parts."""
    mode = ledger.text("gradient_checkpointing").upper()
    old = mode == "CPU_OFFLOADED"
    checkpointing = True
    for key in ("gradient_checkpointing", "transformer.gradient_checkpointing"):
        if ledger.has(key):
            checkpointing = str(ledger.get(key)).upper() not in ("OFF", "FALSE", "NONE")
            ledger.place(key, "gradient_checkpointing") if checkpointing else None
    offload = bool(ledger.get("transformer.activation_offloading"))
    offload |= old and bool(ledger.get("enable_activation_offloading", True))
    ledger.place(
        "transformer.activation_offloading", "unsloth_offload_checkpointing or blocks_to_swap"
    )
    fraction = 0.0
    for key in ("transformer.offload_fraction", "layer_offload_fraction"):
        if key.startswith("transformer") or old:
            fraction = max(fraction, ledger.number(key))
    blocks = min(BLOCKS - 2, round(fraction * BLOCKS))
    if fraction > 0:
        ledger.options["blocks_to_swap"] = blocks
        why = f"blocks_to_swap: {blocks} of {BLOCKS} blocks, which are counted here"
        for key in ("transformer.offload_fraction", "layer_offload_fraction"):
            ledger.explain(key, why)
    if offload and checkpointing and fraction <= 0:
        ledger.options["unsloth_offload_checkpointing"] = True
    elif checkpointing:
        ledger.options["gradient_checkpointing"] = True
    if not is_off(ledger.get("compile")):
        if command == "train":
            ledger.drop("compile", KERNELS)
        ledger.take("compile")


def _network(ledger: Ledger) -> None:
    """Ranks, alpha, dropout, DoRA and what a LoKr has."""
    kind = ledger.text("peft_type", "LORA")
    ledger.take("peft_type", "network_module", MODULES[kind])
    settle([Row("lora_model_name", "network_weights", on)], ledger)
    is_lokr = kind == "LOKR"
    rank = "lokr_dim" if is_lokr else "lora_rank"
    ledger.take(rank, "network_dim", ledger.whole(rank, 16), default=DEFAULT)
    ledger.take("lora_alpha", "network_alpha", ledger.number("lora_alpha", 1.0), default=DEFAULT)
    if kind == "LORA" and not is_off(ledger.get("dropout_probability")):
        rate = ledger.number("dropout_probability")
        ledger.take("dropout_probability", "network_dropout", rate)
    dora, outputs = "lora_decompose", "lora_decompose_output_axis"
    if is_lokr:
        dora, outputs = "lokr_weight_decompose", "lokr_dora_on_output"
    words = []
    if ledger.get(dora):
        # On the rows of the weight in a LoKr unless it says otherwise, on its columns in a LoRA.
        words += ["dora_wd=True", f"wd_on_output={bool(ledger.get(outputs, is_lokr))}"]
        ledger.place(dora, "network_args dora_wd")
        ledger.place(outputs, "network_args wd_on_output")
    ledger.drop(outputs, "DoRA is off")
    for key, word in (
        ("lokr_decompose_factor", "factor"), ("lokr_decompose_both", "decompose_both"),
        ("lokr_full_matrix", "full_matrix"),
    ):  # fmt: skip
        value = ledger.get(key)
        if is_lokr and not is_off(value) and value != -1:
            words.append(f"{word}={value}")
            ledger.place(key, f"network_args {word}")
        elif value == -1:
            ledger.drop(key, "as here by default")
    if words:
        ledger.put("network_args", words, "the settings above, as words")


def _filter(ledger: Ledger) -> tuple[set[str], bool]:
    """The parts that layer_filter finds, and whether these are all that it says."""
    parts = [part.strip() for part in ledger.text("layer_filter").split(",") if part.strip()]
    found = {name for part in parts for name in WIDER_FILTERS.get(part, (part,))}
    return found, found <= {*FILTERS} and is_off(ledger.get("layer_filter_regex"))


def _layers(ledger: Ledger) -> None:
    """layer_filter: parts of diffusers' names, or nothing for all layers."""
    key, text = "layer_filter", ledger.text("layer_filter")
    parts, known = _filter(ledger)
    if not known:
        ledger.drop(key, "it is about names of diffusers, which are others here")
        ledger.todo.append(
            f"layer_filter {text!r}: choose layers with include_patterns and exclude_patterns in "
            "network_args; attention and MLP of all blocks are trained"
        )
        return
    words, left_out = [], [pattern for part, pattern in FILTERS.items() if part not in parts]
    if not parts or "transformer_block" in text:
        what = "all layers of the blocks, AdaLN modulation included"
        what += "" if parts else "; layers outside the blocks get no adapters here"
        words = [r"include_patterns=blocks[.]\d+[.]adaln_modulation_.*"]
    elif left_out:
        what = "the same layers under their names here"
        words = [f"exclude_patterns={left_out}"]
    else:
        what = "attention and MLP of all blocks, as here by default"
    ledger.explain(key, what)
    if words:
        ledger.put("network_args", [*ledger.options.get("network_args", []), *words], what)


def _frozen_parts(ledger: Ledger) -> None:
    """Full fine-tuning: layer_filter chooses what is trained, and the LLM adapter never is."""
    ledger.add("llm_adapter_lr", 0.0, "OneTrainer does not train the LLM adapter")
    text = ledger.text("layer_filter")
    parts, known = _filter(ledger)
    if not parts or "transformer_block" in text:
        why = "layers outside the blocks are trained too here" if parts else "all layers"
    elif known:
        why = "rates of 0 freeze the other parts; layers outside the blocks are trained too here"
        rates = {"attn1": "self_attn_lr", "attn2": "cross_attn_lr", "ff": "mlp_lr", "": "mod_lr"}
        for part, option in rates.items():
            if part not in parts:
                ledger.add(option, 0.0, "not in layer_filter")
    else:
        why = "its names are others here: all parts are trained"
        ledger.todo.append(f"layer_filter {text!r}: freeze parts with rates such as mlp_lr = 0")
    ledger.explain("layer_filter", why)


def _ema(ledger: Ledger) -> None:
    """The running mean of the adapter."""
    if ledger.text("ema", "OFF") == "OFF":
        ledger.drop("ema", "it is off")
        return
    decay = ledger.number("ema_decay", 0.999)
    interval = max(1, ledger.whole("ema_update_step_interval", 5))
    value = round(decay ** (1 / interval), 6)
    why = f"{decay:g} every {interval} steps; the mean is saved beside the LoRA as NAME-ema"
    ledger.take("ema", "ema_decay", value, why)
    for key in ("ema_decay", "ema_update_step_interval"):
        ledger.place(key, "ema_decay")


def _rate(ledger: Ledger) -> None:
    """The learning rate, times the root of the images that learning_rate_scaler counts."""
    scaler, images = ledger.text("learning_rate_scaler", "NONE"), 1.0
    if scaler.endswith(("BATCH", "BOTH")):
        images *= ledger.number("batch_size", 1)
    if scaler.endswith(("ACCUMULATION", "BOTH")):
        images *= ledger.number("gradient_accumulation_steps", 1)
    factor = math.sqrt(max(1.0, images))
    what = "it is part of learning_rate here" if factor > 1 else "it is off"
    ledger.drop("learning_rate_scaler", what)
    key = "learning_rate"
    if ledger.get("transformer.learning_rate") is not None:
        # The DiT is all that is trained.
        key = "transformer.learning_rate"
        ledger.drop("learning_rate", f"{key} beats it")
    rate = float(f"{ledger.number(key, 3e-6) * factor:.6g}")
    why = f"times {factor:g}, the root of the images that learning_rate_scaler counts"
    ledger.take(key, "learning_rate", rate, why if factor > 1 else "", DEFAULT)


def _schedule(ledger: Ledger) -> None:
    """The curve of the learning rate."""
    key, kind = "learning_rate_scheduler", ledger.text("learning_rate_scheduler", "CONSTANT")
    steps = ledger.number("learning_rate_warmup_steps", 200.0)
    low = ledger.number("learning_rate_min_factor")
    ours, why = SCHEDULERS.get(kind, "constant"), ""
    if kind == "CUSTOM":
        _custom_schedule(ledger)
        steps = 0
    elif ours == "constant" and steps:
        ours, why = "constant_with_warmup", "constant has no warm-up here"
    elif ours == "cosine" and low:
        ours, why = "cosine_with_min_lr", "with learning_rate_min_factor it has this name here"
    elif kind == "COSINE":
        why = "it ends at 0 here, and at half the rate in newer versions of OneTrainer"
    elif kind == "REX":
        why = "REX does not exist here: it falls a little later than a straight line"
    elif kind not in SCHEDULERS:
        why = "this curve does not exist here"
    ledger.take(key, "lr_scheduler", ours, why, default=why or DEFAULT)
    warmup = steps if 0 < steps < 1 else int(steps)
    if warmup:
        ledger.take("learning_rate_warmup_steps", "lr_warmup_steps", warmup, default=DEFAULT)
    ledger.drop("learning_rate_warmup_steps", "there is no warm-up")
    if ours == "cosine_with_restarts":
        cycles = max(1, round(ledger.number("learning_rate_cycles", 1)))
        ledger.take("learning_rate_cycles", "lr_scheduler_num_cycles", cycles)
    if ours == "cosine_with_min_lr":
        ledger.take("learning_rate_min_factor", "lr_scheduler_min_lr_ratio", low)


def _custom_schedule(ledger: Ledger) -> None:
    ledger.drop("learning_rate_scheduler", "custom_learning_rate_scheduler names the class")
    key = "custom_learning_rate_scheduler"
    if is_off(ledger.get(key)):
        return
    ledger.take(key, "lr_scheduler_type")
    words = []
    for name in ledger.open_keys("scheduler_params["):
        if name.endswith("].key"):
            value = f"{name[:-4]}.value"
            words.append(f"{ledger.get(name)}={ledger.get(value)}")
            ledger.place(name, "lr_scheduler_args")
            ledger.place(value, "lr_scheduler_args")
    if words:
        ledger.put("lr_scheduler_args", words, "scheduler_params")


# For an optimizer that does not exist here: betas and eps are made for its own formulas.
_OTHER = Known("AdamW", betas=0)


def _optimizer(ledger: Ledger, command: str) -> None:
    """The optimizer with its arguments; a preset keeps these in optimizer_defaults."""
    key = "optimizer" if ledger.has("optimizer") else "optimizer.optimizer"
    kind, why = ledger.text(key, "ADAMW"), ""
    known = ONETRAINER.get(kind.upper())
    if known is None:
        # The plain form of one that has another form there, such as PRODIGY_ADV.
        longer = [name for name in ONETRAINER if kind.upper().startswith(name)]
        known = ONETRAINER[max(longer, key=len)] if longer else _OTHER
        why = f"{kind} does not exist here"
        ledger.todo.append(f"check learning_rate: {kind} became {known.name}")
    ledger.take(key, "optimizer_type", known.name, why)
    prefix = "optimizer."
    own = [name for name in ledger.open_keys(prefix) if ledger.get(name) is not None]
    if not [name for name in own if not name.endswith("__version")]:
        prefix = f"optimizer_defaults.{kind}."
    _arguments(ledger, known, prefix)
    if command == "finetune":
        _fused(ledger, prefix)
    for rest in ledger.open_keys("optimizer."):
        ledger.drop(rest, f"{known.name} has no such argument, or it is not set")


def _arguments(ledger: Ledger, known: Known, prefix: str) -> None:
    arguments: dict[str, Any] = dict(known.defaults)
    names = [f"beta{i}" for i in range(1, known.betas + 1)]
    betas = [ledger.get(f"{prefix}{name}") for name in names]
    if betas and all(isinstance(beta, (int, float)) for beta in betas):
        arguments["betas"] = betas
        for name in names:
            ledger.place(f"{prefix}{name}", "optimizer_args betas")
    for name in ("weight_decay",) if known is _OTHER else ("eps", "weight_decay", *known.accepts):
        value = ledger.get(f"{prefix}{name}")
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            continue
        if known.name == "AdaFactor" and name == "eps":
            value = (value, ledger.get(f"{prefix}eps2") or 1e-3)
            ledger.place(f"{prefix}eps2", "optimizer_args eps")
        arguments[name] = value
        ledger.place(f"{prefix}{name}", f"optimizer_args {name}")
    put_arguments(arguments, ledger)


def _fused(ledger: Ledger, prefix: str) -> None:
    """What OneTrainer has among the optimizer's arguments and full fine-tuning has as options."""
    several = ledger.number("gradient_accumulation_steps", 1) > 1
    if ledger.get(f"{prefix}fused_back_pass") and not several:
        ledger.put("fused_backward_pass", True, f"{prefix}fused_back_pass")
        ledger.place(f"{prefix}fused_back_pass", "fused_backward_pass")
    if ledger.options.get("full_bf16"):
        key = f"{prefix}stochastic_rounding"
        ledger.put("weight_update", "stochastic" if ledger.get(key) else "plain", key)
        ledger.place(key, "weight_update")


def _noise(ledger: Ledger) -> None:
    """The distribution of noise levels, its shift and its limits."""
    kind = ledger.text("timestep_distribution", "UNIFORM")
    shift = ledger.number("timestep_shift", 1.0) or 1.0
    dynamic = not is_off(ledger.get("dynamic_timestep_shifting"))
    weight, bias = ledger.number("noising_weight"), ledger.number("noising_bias")
    options, why = distribution(kind, weight, bias, shift, dynamic)
    sampling = options["timestep_sampling"]
    ledger.take("timestep_distribution", "timestep_sampling", sampling, why, DEFAULT)
    ledger.options |= options
    for name in ("noising_weight", "noising_bias", "timestep_shift", "dynamic_timestep_shifting"):
        if not is_off(ledger.get(name)):
            ledger.place(name, ", ".join(options))
    for key, option, off in (
        ("min_noising_strength", "min_timestep", 0.0),
        ("max_noising_strength", "max_timestep", 1.0),
    ):
        value = ledger.number(key, off)
        if value == off:
            ledger.drop(key, "the whole range, as here by default")
        why = "in thousandths; here it limits what comes out of the shift" if shift != 1 else ""
        ledger.take(key, option, round(value * 1000), why)


def distribution(
    kind: str, weight: float, bias: float, shift: float, dynamic: bool
) -> tuple[dict[str, Any], str]:
    """Our options for a distribution of OneTrainer, and what is different."""
    options: dict[str, Any] = {"timestep_sampling": "uniform"}
    why = ""
    if kind == "LOGIT_NORMAL" and not bias:
        options = {"timestep_sampling": "sigmoid", "sigmoid_scale": weight + 1.0}
        if dynamic or shift != 1:
            options["timestep_sampling"] = "flux_shift" if dynamic else "shift"
        why = "its own rule for the shift by size is a little different" if dynamic else ""
    elif kind == "LOGIT_NORMAL":
        # The table of `sigma` begins at full noise, so the mean changes its sign.
        options = {"timestep_sampling": "sigma", "weighting_scheme": "logit_normal",
                   "logit_mean": -bias, "logit_std": weight + 1.0}  # fmt: skip
        why = "a logit-normal draw with a mean has this name here"
    elif kind == "HEAVY_TAIL":
        options = {"timestep_sampling": "sigma", "weighting_scheme": "mode", "mode_scale": weight}
        why = "the same distribution has this name here"
    elif kind == "COS_MAP":
        options["weighting_scheme"] = "cosmap"
        why = "as a weight of the loss instead of a density: the same on average"
    elif kind in ("SIGMOID", "INVERTED_PARABOLA"):
        options = {"timestep_sampling": "sigmoid"}
        why = f"{kind} does not exist here: choose a distribution by hand"
    elif kind == "UNIFORM" and shift != 1:
        options["timestep_sampling"] = "sigma"
        why = "a shifted uniform draw has this name here"
    if shift != 1 and not dynamic and options["timestep_sampling"] in ("shift", "sigma"):
        options["discrete_flow_shift"] = shift
    return options, why


def _loss(ledger: Ledger) -> None:
    """The loss: the strongest of OneTrainer's four, which can be mixed there."""
    kinds = {"mse_strength": "l2", "mae_strength": "l1", "huber_strength": "huber",
             "log_cosh_strength": "huber"}  # fmt: skip
    strength = {key: ledger.number(key, float(key == "mse_strength")) for key in kinds}
    best = max(strength, key=lambda key: strength[key])
    mixed = sum(value > 0 for value in strength.values()) > 1
    why = "one loss is used here, the strongest of them"
    ledger.take(best, "loss_type", kinds[best], why if mixed or best.startswith("log") else "")
    for key in kinds:
        if strength[key]:
            ledger.drop(key, "one loss is used here")
    if kinds[best] == "huber":
        ledger.options["huber_schedule"] = "constant"
    if ledger.options.get("loss_type") == "huber":
        ledger.take("huber_delta", "huber_c", ledger.number("huber_delta", 1.0))
    if ledger.get("loss_weight_fn") == "CONSTANT":
        ledger.drop("loss_weight_fn", "as here by default")


def _saving(ledger: Ledger) -> None:
    """How often is saved: a number and its unit are one option each here."""
    for key in ("save_every", "save_after"):
        unit, number = ledger.text(f"{key}_unit", "NEVER"), ledger.whole(key)
        option = {"EPOCH": "save_every_n_epochs", "STEP": "save_every_n_steps"}.get(unit)
        if option and number > 0:
            ledger.take(key, option, number)
        elif unit == "NEVER":
            ledger.drop(key, "it is off")
    unit = ledger.text("backup_after_unit", "MINUTE")
    minutes = {"SECOND": 1 / 60, "MINUTE": 1.0, "HOUR": 60.0}.get(unit)
    if minutes:
        ledger.take("backup_after", "autosave_minutes", ledger.number("backup_after") * minutes)


def _caches(ledger: Ledger) -> None:
    shared = ledger.get("latent_caching", True)
    for key, option in (
        ("image_caching", "cache_latents_to_disk"),
        ("text_caching", "cache_text_encoder_outputs_to_disk"),
    ):
        if ledger.get(key, shared):
            ledger.take(key, option, True, default="its default")
    if shared:
        ledger.place("latent_caching", "cache_latents_to_disk and of the text too")
