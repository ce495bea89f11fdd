"""diffusion-pipe's TOML as options.

What it does without being asked is written down: alpha is the rank, latents and captions are
cached, AdaLN layers get adapters too, and the LLM adapter is trained unless its rate is 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from anima_fast.errors import UserError
from anima_fast.migrate.diffusion_pipe_data import BatchSizes, convert_dataset, read_batch_sizes
from anima_fast.migrate.ledger import DEFAULT, EPOCH, KERNELS, WEIGHTS, Ledger, is_off, is_rows
from anima_fast.migrate.optimizers import DIFFUSION_PIPE, Known, settle_arguments
from anima_fast.migrate.paths import find_base, resolve
from anima_fast.migrate.rows import Row, number, on, one_of, settle, when_on
from anima_fast.migrate.source import ONLY, Source, find_file, other_model, parse_file
from anima_fast.options.other_names import by_name

DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "no", "bf16": "bf16", "fp16": "fp16",
    "fp32": "no",
}  # fmt: skip


def _percent(value: Any) -> Any:
    """The bluvoll fork's percentages are fractions or numbers up to 100."""
    return None if is_off(value) else float(value) / (100 if float(value) > 1 else 1)


PATH_ROWS = [
    Row("model.transformer_path model.diffusion_model", "pretrained_model_name_or_path"),
    Row("model.llm_path model.qwen_path", "qwen3"),
    Row("model.vae_path model.vae", "vae"),
    Row("model.llm_adapter_path", "llm_adapter_path"),
    Row("output_dir", "output_dir", None,
        "files go right into it, there into a folder with a date"),
]  # fmt: skip
ROWS = [
    Row("max_steps", "max_train_steps"),
    Row("epochs", "max_train_epochs", None, EPOCH),
    Row("checkpoint_every_n_epochs", "save_state", when_on(True),
        "a resume state comes with every saved file"),
    Row("model.dtype", "mixed_precision", one_of(DTYPES)),
    Row("save_dtype", "save_precision", one_of({**DTYPES, "float32": "float", "fp32": "float"})),
    Row("gradient_accumulation_steps", "gradient_accumulation_steps"),
    Row("gradient_clipping", "max_grad_norm"),
    Row("save_every_n_epochs", "save_every_n_epochs"),
    Row("save_every_n_steps", "save_every_n_steps"),
    Row("blocks_to_swap", "blocks_to_swap", on),
    Row("checkpoint_every_n_minutes", "autosave_minutes"),
    Row("caching_batch_size", "vae_batch_size"),
    Row("model.shuffle_tags", "shuffle_caption", on),
    Row("model.shuffle_keep_first_n", "keep_tokens", on),
    Row("model.tag_dropout_percent", "caption_tag_dropout_rate", _percent),
    Row("model.caption_dropout_percent", "caption_dropout_rate", _percent),
    Row("model.tag_delimiter", "caption_separator", lambda value: str(value).strip() or ","),
    Row("uncond_fraction", "caption_dropout_rate", on),
    Row("monitoring.wandb_tracker_name", "log_tracker_name"),
    Row("monitoring.wandb_run_name", "wandb_run_name"),
    Row("monitoring.enable_wandb", "log_with", when_on("wandb")),
]  # fmt: skip
LORA_ROWS = [
    Row("adapter.dropout", "network_dropout", on, "on the output of the down projection here, on "
        "its input there"),
]  # fmt: skip
# Beginning of a key -> why it is dropped.
DROPPED = by_name({
    KERNELS: "compile",
    WEIGHTS: "model.transformer_dtype model.diffusion_model_dtype",
    "validation holds out a part of the training images here: --validation_split":
        "eval_ image_eval_ disable_block_swap_for_eval",
    "states of DeepSpeed cannot be continued here": "resume_from_checkpoint",
    "a password: give it on the command line, or as WANDB_API_KEY": "monitoring.wandb_api_key",
    "adapters are float32 here, which needs no Kahan sums": "adapter.dtype",
    "diffusion-pipe refuses it: alpha is the rank there": "adapter.alpha",
    "captions are files here": "model.caption_mode",
    "this type does not exist here": "model.dtype save_dtype",
})  # fmt: skip

MODULES = {"lora": "networks.lora_anima", "lokr": "networks.lokr"}
# A rank above this stands for whole matrices in a LoKr.
LARGEST_RANK = 4096
ADALN_LAYERS = [
    f"adaln_modulation_{part}.{i}" for part in ("self_attn", "cross_attn", "mlp") for i in (1, 2)
]
# Parts with rates of their own; the LLM adapter has blocks too, so the others name the DiT's.
PARTS = {
    "llm_adapter": r"llm_adapter\..*",
    "self_attn": r"blocks\.\d+\.self_attn\..*",
    "cross_attn": r"blocks\.\d+\.cross_attn\..*",
    "mlp": r"blocks\.\d+\.mlp\..*",
    "mod": r".*adaln_modulation.*",
}
# Keys of the fork's [model] that choose parts.
FORK_PARTS = {"self_attn": "self_attn", "cross_attn": "cross_attn", "mlp": "mlp", "adaln": "mod"}
# Where its cosine ends.
LOWEST_RATE = 1e-6
# Key -> our loss, whose huber_c it is, and what is different.
LOSSES = {
    "pseudo_huber_c": ("huber", "the same curve, 2c times as high"),
    "huber_delta": ("huber", "a smooth form of it, with the same threshold"),
    "smooth_l1_beta": ("smooth_l1", "a smooth form of it, with the same threshold"),
}


def convert(source: Source, ledger: Ledger) -> str:
    """Fill the ledger from a configuration and the dataset file that it names.

    Returns:
        the command here: `train` with an [adapter], `finetune` without.
    Raises:
        UserError: another model, or a value that is no number where one belongs.
    """
    config = source.config
    _check_model(config["model"])
    command = "train" if config.get("adapter") else "finetune"
    ledger.extend(config)
    named = ["dataset", *(key for row in PATH_ROWS[:-1] for key in row.keys.split())]
    ledger.base = find_base(map(ledger.text, named), source.folders)
    ledger.place("Anima, the only model here", "model.type")
    settle(PATH_ROWS, ledger)
    sizes = read_batch_sizes(ledger)
    images = max(size for _, size in sizes) * max(1, ledger.whole("gradient_accumulation_steps", 1))
    _checkpointing(ledger)
    _schedule(ledger)
    _optimizer(ledger, images, command)
    if command == "train":
        _adapter(ledger, config["adapter"])
    else:
        settle([Row(f"model.{part}_lr", f"{part}_lr", number) for part in PARTS], ledger)
        settle([Row("compile", "compile", on)], ledger)
    _noise(ledger)
    _loss(ledger)
    if ledger.on("max_steps"):
        ledger.drop("max_steps ends the run; max_train_epochs would beat it here", "epochs")
    steps = max(1, ledger.whole("save_every_n_examples") // images)
    ledger.take("save_every_n_examples", "save_every_n_steps", steps, "counted in steps here")
    settle(ROWS, ledger)
    _dataset(source, ledger, sizes)
    _always(source, ledger, command)
    ledger.close(DROPPED)
    return command


def _check_model(model: Mapping[str, Any]) -> None:
    kind = str(model.get("type"))
    qwen = any(key in model for key in ("llm_path", "qwen_path"))
    if kind == "anima" or (kind == "cosmos_predict2" and qwen):
        return
    if kind == "cosmos_predict2":
        raise UserError(
            "this file is for Cosmos-Predict2 itself, with a T5 encoder (t5_path): anima_fast "
            "trains the Anima image model only, whose encoder is Qwen3 (llm_path)"
        )
    raise UserError(f"this file is for {other_model(kind) or f'the model {kind!r}'}: {ONLY}")


def _checkpointing(ledger: Ledger) -> None:
    key, option, why = "activation_checkpointing", "gradient_checkpointing", ""
    if ledger.get(key) == "unsloth" and ledger.on("blocks_to_swap"):
        why = "blocks_to_swap does not go with offloaded checkpoints"
    elif ledger.get(key) == "unsloth":
        option = "unsloth_offload_checkpointing"
    if ledger.on(key):
        ledger.take(key, option, True, why)


def _schedule(ledger: Ledger) -> None:
    """The curve of the rate; settles force_constant_lr, so it comes before the optimizer."""
    warmup, rate = ledger.whole("warmup_steps"), ledger.number("optimizer.lr")
    kind, why = ledger.text("lr_scheduler", "constant"), ""
    if ledger.has("force_constant_lr"):
        constant = ledger.number("force_constant_lr")
        why = "it beats the optimizer's rate and every schedule"
        ledger.take("force_constant_lr", "learning_rate", constant, why)
        beaten = "force_constant_lr beats it"
        ledger.drop(beaten, "optimizer.lr", "warmup_steps")
        why = beaten if kind != "constant" else ""
        kind, warmup = "constant", 0
    if warmup:
        ledger.take("warmup_steps", "lr_warmup_steps", warmup)
    if kind == "constant" and warmup:
        kind, why = "constant_with_warmup", "constant has no warm-up here"
    elif kind == "cosine" and rate > LOWEST_RATE:
        kind, why = "cosine_with_min_lr", f"its cosine ends at a rate of {LOWEST_RATE:g}"
        ledger.add(why, lr_scheduler_min_lr_ratio=round(LOWEST_RATE / rate, 6))
    ledger.take("lr_scheduler", "lr_scheduler", kind, why, default=why)


def _optimizer(ledger: Ledger, images: int, command: str) -> None:
    """[optimizer]: the name, the rate, and the arguments that the optimizer takes here."""
    kind = ledger.text("optimizer.type", "adamw_optimi")
    known = DIFFUSION_PIPE.get(kind.lower())
    if known is None and kind.lower() in ("automagic", "genericoptim"):
        ledger.todo.append(f"choose learning_rate for AdamW: {kind} does not exist here")
        known = Known("AdamW", f"{kind} exists in diffusion-pipe only")
    elif known is None:
        name = f"pytorch_optimizer.{kind}"
        ledger.todo.append(f"install the package of {name}: pip install pytorch-optimizer")
        known = Known(name, "where diffusion-pipe takes it from", accepts="*")
    ledger.take("optimizer.type", "optimizer_type", known.name, known.why)
    ledger.take("optimizer.lr", "learning_rate", ledger.number("optimizer.lr"))
    key = "optimizer.gradient_release"
    if ledger.on(key) and command == "finetune":
        if ledger.number("gradient_accumulation_steps", 1) > 1:
            ledger.drop("it does not go with gradient_accumulation_steps here", key)
            ledger.todo.append("see with --plan_memory whether it fits without gradient_release")
        ledger.take(key, "fused_backward_pass", True)
    ledger.drop("a LoRA's gradients are small", key)
    settle_arguments(_betas(ledger, known, images), known, "optimizer.", ledger)


def _betas(ledger: Ledger, known: Known, images: int) -> dict[str, Any]:
    """The arguments of the optimizer so far: the defaults there, and the betas."""
    arguments: dict[str, Any] = dict(known.defaults)
    betas, key = ledger.get("optimizer.betas"), "optimizer.beta2_half_life"
    if known.betas and isinstance(betas, list):
        arguments["betas"] = [float(beta) for beta in betas][: known.betas]
        ledger.place("optimizer_args", "optimizer.betas")
    if known.betas and ledger.has(key):
        beta2 = round(0.5 ** (images / max(ledger.number(key), 1e-9)), 6)
        arguments["betas"] = [next(iter(arguments.get("betas", (0.9,)))), beta2]
        why = f"beta2 = 0.5 ^ ({images} images a step / half-life) = {beta2}"
        ledger.place("optimizer_args", key, why=why)
    return arguments


def _adapter(ledger: Ledger, adapter: Mapping[str, Any]) -> None:
    """[adapter] and the rates of parts of a LoRA or LoKr.

    Adapters sit there on every linear layer of the DiT's blocks, those of AdaLN modulation
    included, and on those of the LLM adapter unless its rate is 0.
    """
    kind = ledger.text("adapter.type", "lora")
    if kind not in MODULES:
        raise UserError(f"[adapter] type {kind!r} is unknown: lora and lokr can be converted")
    ledger.take("adapter.type", "network_module", MODULES[kind])
    words = []
    if ledger.has("adapter.rank"):
        rank, why = ledger.whole("adapter.rank"), ""
        if rank > LARGEST_RANK:
            rank, why = LARGEST_RANK, "a rank this high stands for whole matrices"
            words.append("full_matrix=True")
        ledger.take("adapter.rank", "network_dim", rank, why)
        ledger.add("there alpha is always the rank", network_alpha=float(rank))
    if kind == "lora":
        settle(LORA_ROWS, ledger)
    for name in ("decompose_factor", "factor", "rank_dropout"):
        word = name.removeprefix("decompose_")
        if ledger.on(f"adapter.{name}") and (word != "factor" or kind == "lokr"):
            words.append(f"{word}={ledger.get(f'adapter.{name}')}")
            ledger.place("network_args", f"adapter.{name}")
    _start(ledger, adapter)
    words += [*_llm_adapter(ledger), *_layers(ledger)]
    rates = [part for part in PARTS if ledger.has(f"model.{part}_lr")]
    if rates:
        pairs = [f"{PARTS[part]}={ledger.number(f'model.{part}_lr'):g}" for part in rates]
        words.append(f"network_reg_lrs={','.join(pairs)}")
        ledger.place("network_args", *(f"model.{part}_lr" for part in rates))
    if words:
        why = "the layers that it trains, AdaLN modulation included"
        ledger.put(why, network_args=words)


def _start(ledger: Ledger, adapter: Mapping[str, Any]) -> None:
    """The files that training starts from."""
    key = "adapter.init_from_existing"
    if ledger.on(key):
        path = ledger.text(key)
        file = path if path.endswith(".safetensors") else f"{path}/adapter_model.safetensors"
        ledger.take(key, "network_weights", file, "the file in that folder")
    key, fused = "adapter.fuse_adapters", adapter.get("fuse_adapters")
    if is_rows(fused) and all(entry.get("path") for entry in fused):
        ledger.put(
            key,
            base_weights=[resolve(str(entry["path"]), ledger.base)[0] for entry in fused],
            base_weights_multiplier=[
                ledger.number(f"{key}[{i}].weight", 1.0) for i in range(len(fused))
            ],
        )
        ledger.place("base_weights", *ledger.open_keys(key))


def _llm_adapter(ledger: Ledger) -> list[str]:
    """It is trained there unless its rate is 0, or a fork's switch says otherwise."""
    switches, key = ("model.train_llm_adapter", "train_llm_adapter"), "model.llm_adapter_lr"
    switch = ledger.get(switches[0], ledger.get(switches[1]))
    ledger.place("network_args", *switches)
    trained = bool(switch) if switch is not None else ledger.number(key, 1) > 0
    if not trained:
        ledger.place("no modules for the LLM adapter", key)
    elif ledger.get(key) is None and switch is None:
        ledger.todo.append(
            "there the LLM adapter is trained when llm_adapter_lr is left out, which the model's "
            "authors advise against: take train_llm_adapter=True out of network_args if you did "
            "not mean it"
        )
    return ["train_llm_adapter=True"] if trained else []


def _layers(ledger: Ledger) -> list[str]:
    """The patterns of layers: what the fork's switches and exclude_modules leave out."""
    excluded = []
    for name, part in FORK_PARTS.items():
        if ledger.has(f"model.train_{name}") and not ledger.get(f"model.train_{name}"):
            excluded.append(PARTS[part])
        ledger.place("network_args", f"model.train_{name}")
    # peft's exclude_modules: a regular expression, or names that match as endings.
    key = "adapter.exclude_modules"
    value = ledger.get(key)
    if isinstance(value, str):
        excluded.append(value)
    else:
        excluded += [rf"(.*\.)?{re.escape(str(name))}" for name in value or []]
    try:
        re.compile("|".join(excluded))
    except re.error as error:
        raise UserError(f"{key}: {value!r} is no regular expression ({error})") from None
    ledger.place("network_args", key)
    # Here an include pattern beats every exclude pattern.
    names = [
        re.escape(layer)
        for layer in ADALN_LAYERS
        if not any(re.fullmatch(p, f"blocks.0.{layer}") for p in excluded)
    ]
    names = ["adaln_modulation_.*"] if len(names) == len(ADALN_LAYERS) else names
    patterns = {
        "include_patterns": [f"blocks[.][0-9]+[.]{name}" for name in names],
        "exclude_patterns": excluded,
    }
    return [f"{word}={value}" for word, value in patterns.items() if value]


def _noise(ledger: Ledger) -> None:
    """How the noise level is drawn."""
    key, sigmoid = "model.timestep_sample_method", "model.sigmoid_scale"
    uniform = ledger.text(key, "logit_normal") == "uniform"
    shift, flux = ledger.number("model.shift"), ledger.on("model.flux_shift")
    sampling, why = "uniform" if uniform else "sigmoid", ""
    if shift:
        sampling, why = "sigma" if uniform else "shift", "with model.shift it has this name here"
    elif flux:
        sampling = "flux_shift"
        why = "of a logit-normal draw: a uniform one has no such shift here" if uniform else ""
    ledger.take(key, "timestep_sampling", sampling, why, why or DEFAULT)
    if shift:
        ledger.take("model.shift", "discrete_flow_shift", shift)
    if shift and flux:
        ledger.drop("model.shift beats it", "model.flux_shift")
    elif flux:
        ledger.take("model.flux_shift", "timestep_sampling", sampling)
    if uniform:
        ledger.drop("it has no effect on a uniform draw", sigmoid)
    ledger.take(sigmoid, "sigmoid_scale", ledger.number(sigmoid, 1.0))


def _loss(ledger: Ledger) -> None:
    """Losses other than the mean square."""
    for key in filter(ledger.on, LOSSES):
        if "loss_type" in ledger.options:
            ledger.drop("another loss is chosen", key)
            continue
        kind, why = LOSSES[key]
        ledger.take(key, "huber_c", ledger.number(key), why)
        ledger.put(f"{key} chooses it", loss_type=kind, huber_schedule="constant")


def _dataset(source: Source, ledger: Ledger, sizes: BatchSizes) -> None:
    if not ledger.has("dataset"):
        return
    named, _ = resolve(ledger.text("dataset"), ledger.base)
    found = find_file(named, source.folders)
    if found is not None:
        ledger.place("a dataset file of ours", "dataset")
        convert_dataset(parse_file(found), found.name, ledger, source.folders, sizes)
        return
    ledger.drop("it was not found", "dataset")
    ledger.add("the batch size of the main file", train_batch_size=sizes[0][1])
    ledger.todo.append(
        f"the dataset file {named} was not found: give --cwd FOLDER, the folder that "
        "diffusion-pipe is started in, or write dataset_config by hand"
    )


def _always(source: Source, ledger: Ledger, command: str) -> None:
    """What happens there whatever the file says."""
    mode = ledger.text("model.caption_mode", "tags")
    if mode != "tags":
        ledger.todo.append(f"caption_mode {mode}: write one caption file each image")
    stem = source.file.stem if source.file else "imported"
    ledger.add("files have no name of their own there", output_name=stem)
    ledger.add(
        "always so there",
        caption_extension=".txt",
        cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True,
    )
    if command == "train":
        ledger.add("the names that its files have", lora_format="comfyui")
    elif ledger.options.get("mixed_precision") == "bf16":
        ledger.add("weights are trained in 16 bit there", full_bf16=True)
