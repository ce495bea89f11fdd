"""Rules between options: what implies what, and which combinations are refused.

Each rule is one small function on a `Draft` of the values. A rule either sets another value (with
a notice where the user may be surprised) or raises `UserError` with the remedy. The rules look at
values only, never at the disk, and settled values pass them again unchanged. The rules here are
for every run; rules_lora.py and rules_finetune.py have those of one kind of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from anima_fast.errors import UserError
from anima_fast.models.recompute import POLICIES
from anima_fast.options.words import parse_arguments

REQUIRED = ("pretrained_model_name_or_path", "qwen3", "vae", "output_dir")
# Options, and keys of a subset, that give other pixels at every use.
CHANGING_PIXELS = ("color_aug", "random_crop")
# Options of schedules that are 1 or nothing where they are not given: the schedules that read them.
READ_BY_SCHEDULES = {
    "lr_scheduler_args": ("piecewise_constant", "lr_scheduler_type"),
    "lr_decay_steps": ("warmup_stable_decay",),
    "lr_scheduler_num_cycles": (
        "cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay",
    ),
    "lr_scheduler_power": ("polynomial",),
    "lr_scheduler_timescale": ("inverse_sqrt",),
    "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", "warmup_stable_decay"),
}  # fmt: skip
# Options whose default is 1: the values of timestep_sampling that read them.
READ_BY_SAMPLINGS = {
    "discrete_flow_shift": ("shift", "sigma"),
    "sigmoid_scale": ("sigmoid", "shift", "flux_shift"),
}


class Draft:
    """Option values that rules read as attributes and change through `set`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.notices: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["values"][name]

    def set(self, name: str, value: Any, notice: str | None = None) -> None:
        """Change one value; `notice` tells the user why."""
        self.values[name] = value
        if notice:
            self.notices.append(notice)


Rule = Callable[[Draft], None]


def check_required(options: Any) -> None:
    """Raise `UserError` for the first option that a training run needs and does not have."""
    for name in REQUIRED:
        if not getattr(options, name):
            raise UserError(f"--{name} is required: see `anima-fast {options.command} --help`")
    if not (options.dataset_config or options.train_data_dir or options.in_json):
        raise UserError(
            "no data: give --dataset_config FILE, or --train_data_dir FOLDER with --resolution"
        )
    if not options.dataset_config and not options.resolution:
        raise UserError("--resolution is required without --dataset_config, such as 1024")


def check_cacheable(keys: Mapping[str, Any], *, latents: bool, text: bool, place: str) -> None:
    """Refuse options, or keys of a subset, that what is cached would not obey."""
    for name in CHANGING_PIXELS:
        if latents and keys[name]:
            raise UserError(
                f"{place}{name} changes images with every epoch, so it cannot work with "
                "--cache_latents: drop one of them"
            )
    if text and keys["token_warmup_step"]:
        raise UserError(
            f"{place}token_warmup_step changes captions with every step, so it cannot work with "
            "--cache_text_encoder_outputs: drop one of them"
        )


def check_sums(precision: str, sums: str) -> None:
    """Refuse short sums of another type than float16."""
    if sums == "short" and precision not in ("auto", "fp16"):
        shown = "float32" if precision in ("no", "fp32") else precision
        raise UserError(
            f"--sums short is about float16 products, and here they are {shown}: use fp16 or auto "
            "(--mixed_precision, in `sample` --dtype), or drop it"
        )


def _caches(draft: Draft) -> None:
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if draft.values[f"{name}_to_disk"]:
            draft.set(name, True)
    latents, text = draft.cache_latents, draft.cache_text_encoder_outputs
    check_cacheable(draft.values, latents=latents, text=text, place="--")
    changing = draft.shuffle_caption or draft.caption_tag_dropout_rate or draft.enable_wildcard
    if text and changing:
        draft.notices.append(
            f"captions that change are cached in {draft.caption_variants} renderings each "
            "(caption_variants)"
        )


def _long_captions(draft: Draft) -> None:
    if draft.long_captions != "whole":
        return
    for name in ("qwen3_max_token_length", "t5_max_token_length"):
        if draft.values[name] != 512:
            raise UserError(
                f"--{name} {draft.values[name]} cuts captions off, which --long_captions whole "
                "does not: drop one of them"
            )


def _data(draft: Draft) -> None:
    if draft.min_bucket_reso > draft.max_bucket_reso:
        raise UserError(
            f"--min_bucket_reso {draft.min_bucket_reso} is above --max_bucket_reso "
            f"{draft.max_bucket_reso}: swap them"
        )
    beaten = [n for n in ("train_data_dir", "reg_data_dir", "in_json") if draft.values[n]]
    if draft.dataset_config and beaten:
        for name in beaten:
            draft.set(name, None)
        draft.notices.append(f"dataset_config is given: {', '.join(beaten)} ignored")


def _vae(draft: Draft) -> None:
    rows = draft.vae_chunk_size
    if rows and rows % 2:
        draft.set("vae_chunk_size", rows + 1, f"vae_chunk_size must be even: {rows} -> {rows + 1}")
    for name in ("vae_disable_cache", "qwen_image_vae_2d"):
        if draft.values[name]:
            draft.notices.append(f"{name}: always so here, with the same result")


def _precision(draft: Draft) -> None:
    if draft.full_bf16 and draft.full_fp16:
        raise UserError("--full_bf16 and --full_fp16 exclude each other: choose one")
    for flag, precision in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if draft.values[flag] and draft.mixed_precision != precision:
            # What was left to the program is no surprise.
            given = draft.mixed_precision != "auto"
            notice = f"{flag}: mixed_precision set to {precision}" if given else None
            draft.set("mixed_precision", precision, notice)
    check_sums(draft.mixed_precision, draft.values.get("sums", "auto"))
    if draft.full_fp16 and draft.values.get("weight_update", "plain") == "plain":
        draft.notices.append(
            "full_fp16: squares of small gradients vanish in float16, so that steps of Adam may "
            "explode: --mixed_precision fp16 alone keeps what is trained in float32"
        )


def _memory(draft: Draft) -> None:
    if not draft.blocks_to_swap:
        draft.set("blocks_to_swap", None)
    offloads = ("cpu_offload_checkpointing", "unsloth_offload_checkpointing")
    given = [name for name in offloads if draft.values[name]]
    if len(given) == 2:
        raise UserError(
            "--cpu_offload_checkpointing and --unsloth_offload_checkpointing exclude each other: "
            "the second is the faster one"
        )
    for name in given:
        if draft.blocks_to_swap:
            raise UserError(f"--blocks_to_swap and --{name} exclude each other: drop one of them")
        if not draft.gradient_checkpointing:
            draft.set("gradient_checkpointing", True, f"{name}: gradient_checkpointing turned on")
    _recompute(draft)
    if draft.compile and draft.kernels == "triton":
        raise UserError(
            "--compile and --kernels triton exclude each other: the fused block is compiled already"
        )


def _recompute(draft: Draft) -> None:
    given = draft.recompute
    if given is not None and given not in POLICIES and not given.isdigit():
        raise UserError(f"--recompute {given}: use none, mlp, block or a count of blocks")
    if draft.gradient_checkpointing and given not in (None, "block"):
        raise UserError(
            f"--gradient_checkpointing means --recompute block, and --recompute {given} is given: "
            "drop one of them"
        )
    if draft.gradient_checkpointing:
        draft.set("recompute", "block")
    elif given == "block":
        draft.set("gradient_checkpointing", True)


def _attention(draft: Draft) -> None:
    if draft.attn_mode == "sdpa":
        draft.set("attn_mode", "torch")
    if draft.attn_mode == "sageattn":
        raise UserError(
            "--attn_mode sageattn has no backward pass, so it cannot train: use torch or flash "
            "(`anima-fast sample` takes sageattn)"
        )
    if draft.attn_mode == "xformers" and not draft.split_attn:
        draft.set("split_attn", True, "attn_mode xformers: split_attn turned on")
    if draft.compile_fullgraph and draft.split_attn:
        raise UserError("--compile_fullgraph and --split_attn exclude each other: drop one of them")


def _schedule(draft: Draft) -> None:
    # A mistake in these lists must stop the program now, not after the caches are filled.
    for name in ("optimizer_args", "lr_scheduler_args"):
        parse_arguments(draft.values[name], f"--{name}")
    if draft.lr_scheduler == "constant" and draft.lr_warmup_steps and not draft.lr_scheduler_type:
        raise UserError(
            "--lr_scheduler constant has no warm-up: use --lr_scheduler constant_with_warmup "
            "(with a schedule-free optimizer its own, --optimizer_args warmup_steps=N), or drop "
            "--lr_warmup_steps"
        )
    schedule = draft.lr_scheduler_type or draft.lr_scheduler or "constant"
    for name, readers in READ_BY_SCHEDULES.items():
        by_class = name == "lr_scheduler_args" and draft.lr_scheduler_type
        if draft.values[name] and draft.values[name] != 1 and not by_class:
            _say_unread(draft, name, schedule, readers)
    if not draft.optimizer_type:
        draft.set("optimizer_type", "AdamW")


def _say_unread(draft: Draft, name: str, value: str, readers: Sequence[str]) -> None:
    if value not in readers:
        draft.notices.append(f"{name} has no effect with {value}: it is for {', '.join(readers)}")


def _flow(draft: Draft) -> None:
    for name, readers in READ_BY_SAMPLINGS.items():
        if draft.values[name] != 1:
            _say_unread(draft, name, draft.timestep_sampling, readers)
    if draft.loss_type in ("huber", "smooth_l1") and draft.huber_schedule == "snr":
        draft.set(
            "huber_schedule", "constant",
            "huber_schedule snr does not exist for flow models: constant is used",
        )  # fmt: skip
    low = 0 if draft.min_timestep is None else draft.min_timestep
    high = 1000 if draft.max_timestep is None else draft.max_timestep
    if low >= high:
        raise UserError(f"--min_timestep {low} must be below --max_timestep {high}")


def _saving(draft: Draft) -> None:
    if draft.save_model_as in ("ckpt", "pt"):
        raise UserError(
            f"--save_model_as {draft.save_model_as} is a pickle file, which can run code when it "
            "is opened: use safetensors"
        )
    if draft.save_model_as != "safetensors":
        raise UserError(f"--save_model_as {draft.save_model_as} is unknown: use safetensors")
    name = draft.output_name or ""
    if any(mark in name for mark in '/\\:*?"<>|') or name in (".", ".."):
        raise UserError(
            f"--output_name {name} is not a file name: put folders into --output_dir and use none "
            'of / \\ : * ? " < > |'
        )


def _logging(draft: Draft) -> None:
    if draft.logging_dir and not draft.log_with:
        draft.set("log_with", "tensorboard")
    if draft.log_with and not draft.logging_dir and draft.output_dir:
        draft.set("logging_dir", f"{draft.output_dir.rstrip('/')}/logs")


def _previews(draft: Draft) -> None:
    for name in ("sample_every_n_steps", "sample_every_n_epochs"):
        if draft.values[name] < 0:
            draft.set(name, 0, f"{name} {draft.values[name]}: taken as 0, which is off")
    prompts = draft.sample_prompts or draft.sample_prompt
    wanted = draft.sample_every_n_steps or draft.sample_every_n_epochs or draft.sample_at_first
    if wanted and not prompts:
        raise UserError('previews need --sample_prompts FILE or --sample_prompt "TEXT"')
    if prompts and not wanted:
        draft.set("sample_every_n_epochs", 1, "previews: one of each prompt every epoch")


def _early_stop(draft: Draft) -> None:
    held_out = draft.validation_split or draft.dataset_config
    if draft.early_stop_patience and not held_out:
        raise UserError("--early_stop_patience needs images that are held out: --validation_split")


SHARED_RULES: tuple[Rule, ...] = (
    _caches, _long_captions, _data, _vae, _precision, _memory, _attention,
    _schedule, _flow, _saving, _logging, _previews, _early_stop,
)  # fmt: skip
