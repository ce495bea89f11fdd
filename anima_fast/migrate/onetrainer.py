"""OneTrainer's JSON as options.

Its files may be whole (every field) or presets (only what differs): what is left out has its
default, which is written down where ours is another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.ledger import DEFAULT, EPOCH, KERNELS, WEIGHTS, Ledger
from anima_fast.migrate.onetrainer_data import convert_concepts, convert_samples
from anima_fast.migrate.optimizers import ONETRAINER, OTHER, Known, settle_arguments
from anima_fast.migrate.paths import find_base, resolve
from anima_fast.migrate.rows import Row, number, on, one_of, settle, when_on
from anima_fast.migrate.source import ONLY, Source, other_model
from anima_fast.models.download import TEXT_ENCODER, VAE, dit_file, models_folder
from anima_fast.options.other_names import by_name

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
LOKR_WORDS = {
    "lokr_decompose_factor": "factor", "lokr_decompose_both": "decompose_both",
    "lokr_full_matrix": "full_matrix",
}  # fmt: skip
# Part of layer_filter, which finds it in diffusers' names -> our layers, and their own rate.
FILTERS = {
    "attn1": (r"blocks\.\d+\.self_attn\..*", "self_attn_lr"),
    "attn2": (r"blocks\.\d+\.cross_attn\..*", "cross_attn_lr"),
    "ff": (r"blocks\.\d+\.mlp\..*", "mlp_lr"),
}
# Parts that find several of these.
WIDER_FILTERS = {"attn": ("attn1", "attn2"), "transformer_block": tuple(FILTERS)}
LOSSES = {
    "mse_strength": "l2", "mae_strength": "l1", "huber_strength": "huber",
    "log_cosh_strength": "huber",
}  # fmt: skip
SAVING = {"EPOCH": "save_every_n_epochs", "STEP": "save_every_n_steps"}
MINUTES = {"SECOND": 1 / 60, "MINUTE": 1.0, "HOUR": 60.0}
# Of the 2B model, for fractions of it.
BLOCKS = 28


def _file(value: Any) -> str | None:
    """A single file; OneTrainer's folders in diffusers' form are not read here."""
    return str(value) if str(value).lower().endswith((".safetensors", ".pth")) else None


# What other keys look at.
FIRST_ROWS = [
    Row("transformer.model_name base_model_name", "pretrained_model_name_or_path", _file),
    Row("text_encoder.model_name", "qwen3", on),
    Row("vae.model_name", "vae", _file),
    Row("train_dtype", "mixed_precision", one_of(DTYPES, "bf16"), default="fp16"),
]
NETWORK_ROWS = [
    Row("peft_type", "network_module", one_of(MODULES)),
    Row("lora_model_name", "network_weights", on),
    Row("lora_alpha", "network_alpha", number, default=1.0),
    Row("output_model_format", "lora_format", one_of(FORMATS)),
]
# LoHa and LoKr have rank_dropout in network_args instead.
KIND_ROWS = {
    "LORA": [
        Row("lora_rank", "network_dim", default=16),
        Row("dropout_probability", "network_dropout", on),
    ],
    "LOHA": [Row("lora_rank", "network_dim", default=16)],
    "LOKR": [Row("lokr_dim", "network_dim", default=16)],
}
FINETUNE_ROWS = [
    Row("transformer.weight_dtype", "full_bf16", one_of({"BFLOAT_16": True})),
    Row("compile", "compile", on),
]
ROWS = [
    Row("epochs", "max_train_epochs", None, EPOCH, 100),
    Row("gradient_accumulation_steps", "gradient_accumulation_steps"),
    Row("clip_grad_norm", "max_grad_norm", number),
    Row("output_dtype", "save_precision",
        one_of({**DTYPES, "FLOAT_32": "float", "TFLOAT_32": "float"})),
    Row("tensorboard", "log_with", when_on("tensorboard")),
    Row("attention_mechanism", "attn_mode", one_of(ATTENTION, "torch")),
    Row("normalize_masked_area_loss", "masked_loss_normalize", when_on(True)),
    Row("text_encoder.dropout_probability", "caption_dropout_rate", on),
    Row("dataloader_threads caching_threads", "max_data_loader_n_workers"),
    Row("train_device", "device", lambda value: None if value == "cuda" else value),
]  # fmt: skip
# Beginning of a key -> why it is dropped.
DROPPED = by_name({
    KERNELS: "compile",
    WEIGHTS: "quantization transformer.weight_dtype weight_dtype",
    "passwords are never written": "secrets",
    "single files are read here, not folders in diffusers' form": "base_model_name vae.model_name",
    "files are saved by epochs or steps, states by minutes": "save_every save_after backup_after",
    "validation holds out a part of the training images here: --validation_split": "valid",
    "--resume auto goes on from the newest state": "continue_last_backup",
    "outside a mask the loss is 0 here": "unmasked_weight",
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
    ledger.place(f"anima-fast {command}", "model_type", "training_method", "transformer.train")
    names = ("base_model_name", "transformer.model_name", "vae.model_name", "concept_file_name")
    ledger.base = find_base(map(ledger.text, names), source.folders)
    settle(FIRST_ROWS, ledger)
    _downloaded(ledger)
    _output(ledger)
    if ledger.get("train_dtype") == "TFLOAT_32":
        ledger.add("train_dtype is TFLOAT_32", cuda_allow_tf32=True)
    _memory(ledger)
    if command == "train":
        _network(ledger)
        _ema(ledger)
    else:
        settle(FINETUNE_ROWS, ledger)
    _layers(ledger, command)
    _rate(ledger)
    _schedule(ledger)
    _optimizer(ledger, command)
    _noise(ledger)
    _loss(ledger)
    convert_concepts(source, ledger)
    convert_samples(source, ledger)
    _saving(ledger)
    settle(ROWS, ledger)
    ledger.close(DROPPED)
    return command


def _check(config: Mapping[str, Any]) -> str:
    kind = str(config.get("model_type", "STABLE_DIFFUSION_15"))
    if kind != "ANIMA":
        name = other_model(kind) or kind.replace("_", " ").title()
        raise UserError(f"this file is for {name}: {ONLY}")
    method, peft = config.get("training_method", "FINE_TUNE"), config.get("peft_type", "LORA")
    if method not in ("LORA", "FINE_TUNE"):
        raise UserError(f"training_method {method} is not supported for Anima: LORA and FINE_TUNE")
    if method == "LORA" and peft not in MODULES:
        raise UserError(f"peft_type {peft} does not exist here: use LORA, LOHA or LOKR")
    part = config.get("transformer")
    if isinstance(part, dict) and part.get("train") is False:
        raise UserError("transformer.train is false: there is nothing else to train in Anima")
    return "train" if method == "LORA" else "finetune"


def _downloaded(ledger: Ledger) -> None:
    """The files of the models folder stand for those of diffusers' form."""
    files = {
        "pretrained_model_name_or_path": dit_file("base-v1.0"), "qwen3": TEXT_ENCODER, "vae": VAE,
    }  # fmt: skip
    missing = {n: models_folder() / f for n, f in files.items() if n not in ledger.options}
    for name, path in missing.items():
        ledger.add("where `anima-fast download` puts it", **{name: str(path)})
    if not all(path.exists() for path in missing.values()):
        ledger.todo.append(f"run `anima-fast download`: it fetches {', '.join(missing)}")


def _output(ledger: Ledger) -> None:
    """The folder, and the name of the file in it where there is one; and what is cached there."""
    key = "output_model_destination"
    path, moved = resolve(ledger.text(key, "models/model.safetensors"), ledger.base)
    where = PureWindowsPath(path)
    folder, name = (where.parent, where.stem) if where.suffix else (where, "model")
    parent = str(folder) if "\\" in path else folder.as_posix()
    why = "; ".join(filter(None, ("the folder and the name are two options", moved)))
    ledger.take(key, "output_dir", parent, why, DEFAULT)
    ledger.add(f"from {key}", output_name=name)
    shared = ledger.get("latent_caching", True)
    if ledger.get("image_caching", shared):
        ledger.take("image_caching", "cache_latents_to_disk", True, default=DEFAULT)
    if ledger.get("text_caching", shared):
        ledger.take("text_caching", "cache_text_encoder_outputs_to_disk", True, default=DEFAULT)
    if shared:
        ledger.place("cache_latents_to_disk and of the text too", "latent_caching")


def _memory(ledger: Ledger) -> None:
    """Checkpointing and offloading; older files say it once for all parts."""
    old, new = "gradient_checkpointing", "transformer.gradient_checkpointing"
    offloading, option = "transformer.activation_offloading", "gradient_checkpointing"
    fractions = ("transformer.offload_fraction", "layer_offload_fraction")
    everywhere = ledger.text(old).upper() == "CPU_OFFLOADED"
    fraction = max(ledger.number(fractions[0]), ledger.number(fractions[1]) * everywhere)
    if fraction > 0:
        blocks = min(BLOCKS - 2, round(fraction * BLOCKS))
        why = f"of {BLOCKS} blocks, which are counted here"
        ledger.take(tuple(filter(ledger.on, fractions)), "blocks_to_swap", blocks, why)
    elif ledger.on(offloading) or (everywhere and ledger.get("enable_activation_offloading", True)):
        option = "unsloth_offload_checkpointing"
    key = new if ledger.has(new) else old
    if ledger.on(key) or not ledger.has(key):
        ledger.options[option] = True
    ledger.place(option, *filter(ledger.on, (old, new, offloading)))


def _network(ledger: Ledger) -> None:
    """The adapter: its kind, rank, alpha, dropout, DoRA and what a LoKr has."""
    kind = ledger.text("peft_type", "LORA")
    settle([*NETWORK_ROWS, *KIND_ROWS[kind]], ledger)
    lokr, dora, outputs = kind == "LOKR", "lora_decompose", "lora_decompose_output_axis"
    if lokr:
        dora, outputs = "lokr_weight_decompose", "lokr_dora_on_output"
    words = []
    if ledger.on(dora):
        # On the rows of the weight in a LoKr unless it says otherwise, on its columns in a LoRA.
        words += ["dora_wd=True", f"wd_on_output={bool(ledger.get(outputs, lokr))}"]
        ledger.place("network_args", dora, outputs)
    for key, word in LOKR_WORDS.items():
        if lokr and ledger.on(key) and ledger.get(key) != -1:
            words.append(f"{word}={ledger.get(key)}")
            ledger.place("network_args", key)
    if words:
        ledger.put("the settings above, as words", network_args=words)


def _ema(ledger: Ledger) -> None:
    """The running mean of the adapter."""
    if ledger.on("ema"):
        decay = ledger.number("ema_decay", 0.999)
        interval = max(1, ledger.whole("ema_update_step_interval", 5))
        why = f"{decay:g} every {interval} steps; the mean is saved beside the LoRA as NAME-ema"
        ledger.take("ema", "ema_decay", round(decay ** (1 / interval), 6), why)
        ledger.place("ema_decay", "ema_decay", "ema_update_step_interval")


def _layers(ledger: Ledger, command: str) -> None:
    """layer_filter: parts of diffusers' names that are trained, or nothing for all layers."""
    key, text = "layer_filter", ledger.text("layer_filter")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    parts = [name for part in parts for name in WIDER_FILTERS.get(part, (part,))]
    whole = not parts or "transformer_block" in text
    left_out = [layers for part, layers in FILTERS.items() if not whole and part not in parts]
    if command == "finetune":
        ledger.add("OneTrainer does not train the LLM adapter", llm_adapter_lr=0.0)
    if not {*parts} <= {*FILTERS} or ledger.on("layer_filter_regex"):
        ledger.drop("it is about names of diffusers, which are others here", key)
        how = "include_patterns and exclude_patterns in network_args"
        how = how if command == "train" else "rates such as mlp_lr = 0"
        ledger.todo.append(f"layer_filter {text!r}: all parts are trained: choose them with {how}")
    elif command == "finetune":
        why = "rates of 0 freeze parts; layers outside the blocks are trained here"
        ledger.place("rates of parts", key, why=why)
        for option in [rate for _, rate in left_out] + ([] if whole else ["mod_lr"]):
            ledger.add("not in layer_filter", **{option: 0.0})
    else:
        why = "the same layers under their names here, but none outside the blocks"
        ledger.place("network_args", key, why=why)
        words = [f"exclude_patterns={[pattern for pattern, _ in left_out]}"] if left_out else []
        if whole:
            # There AdaLN modulation belongs to the block.
            words = [r"include_patterns=blocks[.]\d+[.]adaln_modulation_.*"]
        if words:
            ledger.put(why, network_args=[*ledger.options.get("network_args", []), *words])


def _rate(ledger: Ledger) -> None:
    """The learning rate, times the root of the images that learning_rate_scaler counts."""
    scaler, images, why = ledger.text("learning_rate_scaler", "NONE"), 1.0, ""
    if scaler.endswith(("BATCH", "BOTH")):
        images *= ledger.number("batch_size", 1)
    if scaler.endswith(("ACCUMULATION", "BOTH")):
        images *= ledger.number("gradient_accumulation_steps", 1)
    factor = math.sqrt(max(1.0, images))
    if factor > 1:
        why = f"times {factor:g}, as learning_rate_scaler says"
        ledger.drop("it is part of learning_rate here", "learning_rate_scaler")
    key = "learning_rate"
    if ledger.get("transformer.learning_rate") is not None:
        # The DiT is all that is trained.
        key = "transformer.learning_rate"
        ledger.drop(f"{key} beats it", "learning_rate")
    value = float(f"{ledger.number(key, 3e-6) * factor:.6g}")
    ledger.take(key, "learning_rate", value, why, DEFAULT)


def _schedule(ledger: Ledger) -> None:
    """The curve of the learning rate."""
    key = "learning_rate_scheduler"
    kind = ledger.text(key, "CONSTANT")
    if kind == "CUSTOM":
        _custom_schedule(ledger)
        return
    steps = ledger.number("learning_rate_warmup_steps", 200.0)
    low = ledger.number("learning_rate_min_factor")
    ours, why = SCHEDULERS.get(kind, "constant"), ""
    if ours == "constant" and steps:
        ours, why = "constant_with_warmup", "constant has no warm-up here"
    elif ours == "cosine" and low:
        ours, why = "cosine_with_min_lr", "with learning_rate_min_factor it has this name here"
        ledger.take("learning_rate_min_factor", "lr_scheduler_min_lr_ratio", low)
    elif kind == "COSINE":
        why = "it ends at 0 here, and at half the rate in newer versions of OneTrainer"
    elif kind == "REX" or kind not in SCHEDULERS:
        why = f"{kind} does not exist here; REX falls a little later than a straight line"
    ledger.take(key, "lr_scheduler", ours, why, why or DEFAULT)
    if steps:
        warmup = steps if 0 < steps < 1 else int(steps)
        ledger.take("learning_rate_warmup_steps", "lr_warmup_steps", warmup, default=DEFAULT)
    if ours == "cosine_with_restarts":
        cycles = max(1, round(ledger.number("learning_rate_cycles", 1)))
        ledger.take("learning_rate_cycles", "lr_scheduler_num_cycles", cycles)


def _custom_schedule(ledger: Ledger) -> None:
    key = "custom_learning_rate_scheduler"
    ledger.drop(f"{key} names the class", "learning_rate_scheduler")
    if ledger.on(key):
        ledger.take(key, "lr_scheduler_type")
        names = ledger.open_keys("scheduler_params[")
        rows = [name.removesuffix(".key") for name in names if name.endswith(".key")]
        words = [f"{ledger.get(f'{row}.key')}={ledger.get(f'{row}.value')}" for row in rows]
        ledger.place("lr_scheduler_args", *names)
        if words:
            ledger.put("scheduler_params", lr_scheduler_args=words)


def _optimizer(ledger: Ledger, command: str) -> None:
    """The optimizer with its arguments; a preset keeps these in optimizer_defaults."""
    key = "optimizer" if ledger.has("optimizer") else "optimizer.optimizer"
    kind, why = ledger.text(key, "ADAMW"), ""
    known = ONETRAINER.get(kind.upper())
    if known is None:
        # The plain form of one that has another form there, such as PRODIGY_ADV.
        longer = [name for name in ONETRAINER if kind.upper().startswith(name)]
        known = ONETRAINER[max(longer, key=len)] if longer else OTHER
        why = f"{kind} does not exist here"
        ledger.todo.append(f"check learning_rate: {kind} became {known.name}")
    ledger.take(key, "optimizer_type", known.name, why)
    own = [name for name in ledger.open_keys("optimizer.") if ledger.get(name) is not None]
    preset = all(name.endswith("__version") for name in own)
    prefix = f"optimizer_defaults.{kind}." if preset else "optimizer."
    if command == "finetune":
        _fused(ledger, prefix)
    settle_arguments(_betas(ledger, known, prefix), known, prefix, ledger)


def _betas(ledger: Ledger, known: Known, prefix: str) -> dict[str, Any]:
    """The arguments of the optimizer so far: the defaults there, and what has several numbers."""
    arguments: dict[str, Any] = dict(known.defaults)
    name, keys = "betas", [f"{prefix}beta{i}" for i in range(1, known.betas + 1)]
    values = [ledger.get(key) for key in keys]
    if known.name == "AdaFactor":
        name, keys = "eps", [f"{prefix}eps", f"{prefix}eps2"]
        values = [ledger.get(keys[0]), ledger.get(keys[1]) or 1e-3]
    if values and all(isinstance(value, (int, float)) for value in values):
        arguments[name] = values
        ledger.place("optimizer_args", *keys)
    return arguments


def _fused(ledger: Ledger, prefix: str) -> None:
    """What OneTrainer has among the optimizer's arguments and full fine-tuning has as options."""
    fused, rounded = f"{prefix}fused_back_pass", f"{prefix}stochastic_rounding"
    if ledger.on(fused) and ledger.number("gradient_accumulation_steps", 1) <= 1:
        ledger.put(fused, fused_backward_pass=True)
        ledger.place("fused_backward_pass", fused)
    if ledger.options.get("full_bf16"):
        ledger.put(rounded, weight_update="stochastic" if ledger.on(rounded) else "plain")
        ledger.place("weight_update", rounded)


def _noise(ledger: Ledger) -> None:
    """The distribution of noise levels, its shift and its limits."""
    settings = ("noising_weight", "noising_bias", "timestep_shift", "dynamic_timestep_shifting")
    weight, bias, shift = (ledger.number(name) for name in settings[:3])
    kind, dynamic = ledger.text("timestep_distribution", "UNIFORM"), ledger.on(settings[3])
    options, why = distribution(kind, weight, bias, shift or 1.0, dynamic)
    sampling = options["timestep_sampling"]
    ledger.take("timestep_distribution", "timestep_sampling", sampling, why, DEFAULT)
    ledger.options |= options
    ledger.place(", ".join(options), *filter(ledger.on, settings))
    shifted = shift not in (0, 1)
    why = "in thousandths; here it limits what comes out of the shift" if shifted else ""
    for key, option, off in (
        ("min_noising_strength", "min_timestep", 0.0),
        ("max_noising_strength", "max_timestep", 1.0),
    ):
        if (limit := ledger.number(key, off)) == off:
            ledger.drop("the whole range, as here by default", key)
        ledger.take(key, option, round(limit * 1000), why)


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
    strength = {key: ledger.number(key, float(key == "mse_strength")) for key in LOSSES}
    best = max(strength, key=lambda key: strength[key])
    mixed = sum(value > 0 for value in strength.values()) > 1 or best == "log_cosh_strength"
    why = "one loss is used here, the strongest of them"
    ledger.take(best, "loss_type", LOSSES[best], why if mixed else "")
    ledger.drop(why, *filter(ledger.on, LOSSES))
    if LOSSES[best] == "huber":
        ledger.options["huber_schedule"] = "constant"
    if ledger.options.get("loss_type") == "huber":
        ledger.take("huber_delta", "huber_c", ledger.number("huber_delta", 1.0))


def _saving(ledger: Ledger) -> None:
    """How often is saved: a number and its unit are one option each here."""
    for key in ("save_every", "save_after"):
        option = SAVING.get(ledger.text(f"{key}_unit"))
        if option and ledger.number(key) > 0:
            ledger.take(key, option, ledger.whole(key))
    minutes = MINUTES.get(ledger.text("backup_after_unit", "MINUTE"))
    if minutes:
        ledger.take("backup_after", "autosave_minutes", ledger.number("backup_after") * minutes)
