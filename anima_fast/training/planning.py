"""What a run will need of memory: the facts of its files and its dataset, for the predictors.

The predictions themselves are memory/lora.py and memory/finetune.py, the comparison with what is
free is memory/fit.py. Only headers of model files are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from anima_fast.data.caption_tokens import count_tokens, renderings
from anima_fast.data.conditioning import Conditioning
from anima_fast.data.encode import choose_image_mode, choose_text_mode
from anima_fast.data.encode_models import adapter_path, load_run_tokenizers
from anima_fast.data.items import DatasetPlan
from anima_fast.data.plan import build_plan
from anima_fast.device import DTYPES, choose_device, uses_fused_blocks
from anima_fast.errors import UserError
from anima_fast.memory.finetune import FinetuneNeeds
from anima_fast.memory.fit import describe_need, does_not_fit, memory_plan
from anima_fast.memory.lora import LoRANeeds, Models
from anima_fast.memory.plan import LargestBatch, Modes, Needs
from anima_fast.models.dit import load_dit
from anima_fast.models.dit_config import TEXT_ROWS
from anima_fast.models.llm_adapter import load_llm_adapter
from anima_fast.models.model_files import check_model_files
from anima_fast.models.text_encoder import load_text_encoder
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.sampling.prompts import collect_prompts
from anima_fast.training.adapter_setup import build_network, check_files
from anima_fast.training.arithmetic import predicted
from anima_fast.training.finetune.start import base_tensors, looks_at_all
from anima_fast.training.kind import given, vae_dtype
from anima_fast.training.optimizers.probe import network_state_bytes, state_bytes
from anima_fast.training.optimizers.recipes import find_optimizer
from anima_fast.training.optimizers.weight_updates import CHUNK

if TYPE_CHECKING:
    from anima_fast.memory.plan import Options

META = torch.device("meta")


def check_memory(
    options: Options, plan: DatasetPlan, device: torch.device, *, say: Callable[[str], None]
) -> None:
    """Say what a run will take; refuse one that cannot fit, naming the options that help.

    A LoRA is refused only where `--vram` says what there is: else it is warned of, as a run that
    is out of memory goes on at a lower policy. On the CPU nothing is said about a LoRA.
    """
    lora = isinstance(options, TrainOptions)
    if lora and device.type == "cpu" and options.vram is None:
        return
    needs = memory_needs(options, plan, device)
    problem = does_not_fit(options, needs, device)
    if problem is None:
        say(describe_need(options, needs, device))
    elif lora and options.vram is None:
        say(f"memory may run out: {problem}")
    else:
        raise UserError(problem)


def show_memory(options: Options, *, say: Callable[[str], None]) -> None:
    """Say what a run would take, for `--plan_memory`, without loading any model."""
    device = choose_device(options.device)
    check_model_files(
        options.pretrained_model_name_or_path, options.qwen3, options.vae, options.llm_adapter_path
    )
    if isinstance(options, TrainOptions):
        check_files(options)
    options, plan = predicted(options, device), build_plan(options)
    for line in memory_plan(options, memory_needs(options, plan, device), device):
        say(line)


def memory_needs(options: Options, plan: DatasetPlan, device: torch.device) -> Needs[Any]:
    """The predictor of a run of either kind."""
    if isinstance(options, FinetuneOptions):
        return finetune_needs(options, largest_batch(plan), device)
    rows, words = longest_caption(options, plan)
    batch = dataclasses.replace(largest_batch(plan), rows=rows, words=words)
    return lora_needs(options, batch, device)


def finetune_needs(
    options: FinetuneOptions, batch: LargestBatch, device: torch.device
) -> FinetuneNeeds:
    """The predictor of full fine-tuning."""
    base, _ = base_tensors(options)
    return FinetuneNeeds(
        batch,
        device,
        modes,
        lambda run: state_bytes(run, device),
        base.shapes,
        looks_at_all=lambda run: looks_at_all(find_optimizer(run.optimizer_type)[0]),
        chunk=CHUNK,
    )


def lora_needs(options: TrainOptions, batch: LargestBatch, device: torch.device) -> LoRANeeds:
    """The predictor of a LoRA."""
    models = meta_models(options)
    prompts = collect_prompts(options)
    return LoRANeeds(
        batch,
        device,
        modes,
        lambda run: network_state_bytes(run, models.network, device),
        models,
        fused=plans_fused_blocks(options, device),
        text_batch=options.text_encoder_batch_size or batch.images,
        preview=max((prompt.width * prompt.height for prompt in prompts), default=0),
    )


def modes(options: Options) -> Modes:
    """How images and texts come to a step."""
    return Modes(choose_image_mode(options), choose_text_mode(options))


def plans_fused_blocks(options: TrainOptions, device: torch.device) -> bool:
    """Whether the run takes the fused blocks, or would on the card that `--vram` stands for."""
    elsewhere = options.vram is not None and options.device is None and device.type == "cpu"
    if elsewhere and options.kernels == "auto":
        return not options.compile
    return uses_fused_blocks(options.kernels, device, compiled=options.compile)


def meta_models(options: TrainOptions) -> Models:
    """The models of a run without values, the network attached to them."""
    dtype, mode = DTYPES[options.mixed_precision], choose_text_mode(options)
    dit = load_dit(given(options.pretrained_model_name_or_path), device=META, dtype=dtype)
    conditioning = Conditioning(META, dtype)
    if mode != "context":
        conditioning.adapter = load_llm_adapter(adapter_path(options), device=META, dtype=dtype)
    if mode == "live":
        conditioning.text_encoder = load_text_encoder(
            given(options.qwen3), device=META, dtype=dtype
        )
    network = build_network(options, dit, conditioning, seed=0, say=lambda text: None)
    # Encoders may be of another 16-bit type, which takes the same room.
    vae_type = vae_dtype(options, options.mixed_precision)
    vae = load_vae(given(options.vae), device=META, dtype=vae_type)
    return Models(dit, network, vae, conditioning.adapter, conditioning.text_encoder)


def largest_batch(plan: DatasetPlan) -> LargestBatch:
    """The batch with the most tokens."""
    found = [
        LargestBatch(item.dataset.batch_size, (item.bucket[0] // 16) * (item.bucket[1] // 16))
        for item in plan.items
    ]
    return max(found, key=lambda batch: batch.images * batch.tokens)


def longest_caption(options: TrainOptions, plan: DatasetPlan) -> tuple[int, int]:
    """The most T5 and the most Qwen3 tokens of a caption, as far as it is not cut off.

    The model's usual number of rows where the tokenizers are not there yet.
    """
    try:
        tokenizers = load_run_tokenizers(options, fetch=False)
    except UserError:
        return TEXT_ROWS, TEXT_ROWS
    qwen, t5 = options.token_limits
    texts = renderings(plan.items, options)
    found = count_tokens(plan.items, texts, tokenizers, options).lengths.values()
    return min(max(n.t5 for n in found), t5), min(max(n.qwen for n in found), qwen)
