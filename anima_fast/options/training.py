"""Network, optimizer, schedule, flow, loss, memory and speed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from anima_fast.models.adapter_kinds import ADAPTER_KINDS, KINDS, LORA, LYCORIS, WORDS
from anima_fast.models.flow_settings import FlowSettings
from anima_fast.options.declare import option
from anima_fast.options.words import parse_arguments

_network = partial(option, "Network")
_optimizer = partial(option, "Optimizer")
_scheduler = partial(option, "Learning-rate schedule")
_flow = partial(option, "Timesteps, noise and loss")
_memory = partial(option, "Memory and speed")

SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
    "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor",
)  # fmt: skip
ATTN_MODES = ("torch", "triton", "xformers", "flash", "sageattn")
PRECISIONS = ("auto", "no", "fp16", "bf16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class NetworkOptions:
    """The LoRA."""

    network_module: str = _network(
        LORA.module,
        f"{', '.join(kind.module for kind in ADAPTER_KINDS)}, or {LYCORIS} with "
        f"--network_args algo={WORDS}.",
    )
    network_dim: int = _network(4, "Rank.", low=1)
    network_alpha: float | None = _network(
        1.0, "Alpha; the scale is alpha / rank. 0 = the rank, so scale 1.", low=0
    )
    network_dropout: float | None = _network(
        None, "Dropout on the output of the down projection.", low=0, high=0.99
    )
    network_args: tuple[str, ...] = _network(
        (),
        "Further key=value settings, such as train_llm_adapter=True, rank_dropout=0.1, "
        "train_block_indices=14-27, dora_wd=True, or factor=8 for LoKr.",
    )
    network_weights: str | None = _network(None, "LoRA file to start from.")
    dim_from_weights: bool = _network(False, "Take ranks and alphas from network_weights.")
    base_weights: tuple[str, ...] = _network(
        (), f"{KINDS} files merged into the model before training."
    )
    base_weights_multiplier: tuple[float, ...] = _network(
        (), "Their strengths; missing ones are 1."
    )
    scale_weight_norms: float | None = _network(
        None, "Largest norm of a pair's product; larger ones are scaled down after a step.", low=0
    )
    tlora_min_rank: int | None = _network(
        None,
        "T-LoRA: the more noise, the fewer ranks are trained, down to this many at sigma 1. Keeps "
        "layouts of single pictures from being learnt; free, but coarse shapes are learnt slower.",
        low=1,
    )
    tlora_alpha: float = _network(
        1.0, "T-LoRA: ranks fall with (1 - sigma) to this power; 1 is a straight line.", low=0
    )
    ema_decay: float | None = _network(
        None,
        "Keep a running mean of the LoRA, saved as NAME-ema too: the fraction of the old mean "
        "kept at each step, such as 0.999.",
        low=0,
        high=1,
    )
    network_train_unet_only: bool = _network(False, "Train modules of the DiT only.")
    network_train_text_encoder_only: bool = _network(
        False, "Train modules of the text encoder only."
    )


@dataclass(frozen=True)
class LoRAFileOptions:
    """The format of a LoRA file."""

    lora_format: str = _network(
        "kohya", "Names of the tensors.", choices=("kohya", "comfyui", "diffusers")
    )
    fold_alpha: bool = _network(
        False, "Multiply alpha / rank into the weights (loads in programs that ignore alpha)."
    )


@dataclass(frozen=True)
class NetworkRateOptions:
    """Learning rates of the networks that a LoRA has modules in."""

    unet_lr: float | None = _optimizer(None, "Rate of the DiT (default: learning_rate).", low=0)
    text_encoder_lr: tuple[float, ...] = _optimizer(
        (), "Rate of the text encoder (default: learning_rate; 0 = frozen).", low=0
    )


@dataclass(frozen=True)
class SumsOptions:
    """How tensor cores sum, in LoRA training and in `sample`."""

    sums: str = _memory(
        "auto", "How products of float16 are summed: full is in float32, short in float16 for at "
        "most 64 terms at a time; auto is short where that is faster.",
        choices=("auto", "short", "full"),
    )  # fmt: skip


@dataclass(frozen=True)
class LoRASpeedOptions(SumsOptions):
    """Speed options that only LoRA training has."""

    cuda_graphs: bool | None = _memory(
        None,
        "Launch the DiT blocks as CUDA graphs, one for each image size and caption length of 64 "
        "tokens, which costs memory (default: where the card is seen waiting for the host and "
        "memory is free; =false: never).",
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its rates."""

    optimizer_type: str = _optimizer(
        "AdamW", "AdamW, AdamW8bit, Lion, Prodigy, AdaFactor, ... or a dotted class name."
    )
    learning_rate: float = _optimizer(1e-4, "Learning rate.", low=0)
    optimizer_args: tuple[str, ...] = _optimizer(
        (), "key=value arguments of the optimizer, such as weight_decay=0.01 betas=0.9,0.99."
    )
    max_grad_norm: float = _optimizer(1.0, "Clip the gradient norm at this; 0 = off.", low=0)

    @property
    def optimizer_kwargs(self) -> dict[str, Any]:
        """`optimizer_args` as Python values."""
        return parse_arguments(self.optimizer_args, "--optimizer_args")


@dataclass(frozen=True)
class SchedulerOptions:
    """How the rate changes over the run."""

    lr_scheduler: str = _scheduler("constant", "Shape of the schedule.", choices=SCHEDULERS)
    lr_warmup_steps: int | float = _scheduler(
        0, 'Warm-up in steps, as a fraction below 1 of all steps, or as "5%".', low=0
    )
    lr_decay_steps: int | float = _scheduler(
        0, "Decay part of warmup_stable_decay, given like lr_warmup_steps.", low=0
    )
    lr_scheduler_num_cycles: int = _scheduler(1, "Restarts of cosine_with_restarts.", low=1)
    lr_scheduler_power: float = _scheduler(1.0, "Power of polynomial.")
    lr_scheduler_timescale: int | None = _scheduler(
        None, "Time scale of inverse_sqrt in steps (default: the warm-up).", low=1
    )
    lr_scheduler_min_lr_ratio: float | None = _scheduler(
        None,
        "Smallest rate as a fraction of the full one, for schedules that have one.",
        low=0,
        high=1,
    )
    lr_scheduler_type: str | None = _scheduler(
        None, "Scheduler class by dotted path, instead of lr_scheduler."
    )
    lr_scheduler_args: tuple[str, ...] = _scheduler((), "key=value arguments of that class.")

    @property
    def scheduler_kwargs(self) -> dict[str, Any]:
        """`lr_scheduler_args` as Python values."""
        return parse_arguments(self.lr_scheduler_args, "--lr_scheduler_args")


@dataclass(frozen=True)
class FlowOptions(FlowSettings):
    """Sampling of sigma, noise and loss."""

    sigma_lowres: float | None = _flow(
        None,
        "Train batches with sigma at or above this on a smaller picture, which is cached too: "
        "cheaper steps, no detail at high noise. 0.7 is a start.",
        low=0.01,
        high=0.99,
    )
    sigma_lowres_scale: float = _flow(
        0.5, "Size of that picture, as a fraction of the full one's sides.", low=0.1, high=0.9
    )


@dataclass(frozen=True)
class MemoryPlanOptions:
    """The memory of a run, known before it starts."""

    vram: float | None = _memory(
        None, "Device memory in GiB to plan for, instead of what the card has free.", low=0.1
    )
    plan_memory: bool = _memory(
        False, "Print the predicted memory and what would change it, then stop."
    )


@dataclass(frozen=True)
class DeviceOptions:
    """The device, and which implementation of the DiT blocks runs there."""

    device: str | None = _memory(None, "cuda, cuda:1 or cpu (default: cuda where there is one).")
    kernels: str = _memory(
        "auto", "DiT blocks: fused Triton kernels or plain PyTorch; auto is triton on CUDA.",
        choices=("auto", "triton", "eager"),
    )  # fmt: skip


@dataclass(frozen=True)
class MemoryOptions(DeviceOptions):
    """Precision, memory and speed."""

    mixed_precision: str = _memory(
        "auto", "Type of weights and arithmetic; auto is fp16 where short float16 sums make the "
        "card faster (every GeForce), else bf16.",
        choices=PRECISIONS,
    )  # fmt: skip
    full_bf16: bool = _memory(False, "Keep trained weights and gradients in bfloat16 too.")
    full_fp16: bool = _memory(False, "Keep trained weights and gradients in float16 too.")
    gradient_checkpointing: bool = _memory(False, "Recompute each block in the backward pass.")
    cpu_offload_checkpointing: bool = _memory(False, "Keep checkpoint inputs in host memory.")
    unsloth_offload_checkpointing: bool = _memory(
        False, "The same with non-blocking copies; turns gradient_checkpointing on."
    )
    blocks_to_swap: int | None = _memory(
        None, "DiT blocks that stay in host memory, at most all but two.", low=0
    )
    recompute: str | None = _memory(
        None, "What backward computes again: none, mlp (fused kernels only), block, or N: N blocks "
        "at block, the rest at none.",
    )  # fmt: skip
    attn_mode: str = _memory(
        "torch", "Attention backend; sdpa is another name for torch.", choices=(*ATTN_MODES, "sdpa")
    )
    split_attn: bool = _memory(False, "Attention for one image of the batch at a time.")
    compile: bool = _memory(False, "Compile each DiT block with torch.compile.")
    compile_backend: str = _memory("inductor", "Backend of torch.compile.")
    compile_mode: str = _memory("default", "Mode of torch.compile.", choices=COMPILE_MODES)
    compile_dynamic: str = _memory(
        "auto", "Dynamic shapes of torch.compile.", choices=("auto", "true", "false")
    )
    compile_fullgraph: bool = _memory(False, "Refuse graph breaks; not with split_attn.")
    compile_cache_size_limit: int | None = _memory(
        None, "Shapes that are compiled before falling back to eager.", low=1
    )
    cuda_allow_tf32: bool = _memory(False, "Allow TF32 in float32 products.")
    cuda_cudnn_benchmark: bool = _memory(
        False, "Let cuDNN try its algorithms and take the fastest."
    )
