"""Everything before the first step: options in, a `Run` out.

The order keeps peak memory low: the VAE and the text encoder are loaded, used and freed while the
caches are filled, and only then is the DiT loaded. (Without caching, one or both of them stay.)
"""

from __future__ import annotations

import random
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anima_fast.data.announce import announced_plan
from anima_fast.data.batches import Batches
from anima_fast.data.conditioning import load_conditioning
from anima_fast.data.encode import EncodedDataset, encode_dataset
from anima_fast.data.health import write_health
from anima_fast.data.items import DatasetPlan, Length, run_length
from anima_fast.data.lowres import LowRes
from anima_fast.data.summary import list_epoch
from anima_fast.device import DTYPES, check_torch_version, choose_device, set_backends
from anima_fast.errors import UserError
from anima_fast.files import check_folder
from anima_fast.measure.arithmetic import Arithmetic, set_sums
from anima_fast.memory.offload import SaverSettings
from anima_fast.models.attention import check_attn_mode
from anima_fast.models.dit import AnimaDiT, load_dit
from anima_fast.models.model_files import check_model_files
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.options.output import LengthOptions, ValidationOptions
from anima_fast.options.run import FinetuneOptions
from anima_fast.sampling.prompts import collect_prompts
from anima_fast.training.arithmetic import settle, with_arithmetic
from anima_fast.training.finetune.finetuning import Finetuning
from anima_fast.training.guard import judged
from anima_fast.training.kind import AnyOptions, Say, Training, given, vae_dtype
from anima_fast.training.lora import LoRATraining
from anima_fast.training.optimizers.recipes import find_optimizer
from anima_fast.training.optimizers.schedules import about_warmup, build_scheduler
from anima_fast.training.preview_prompts import prepare_prompts
from anima_fast.training.run import LossScaler, Run


def prepare(
    options: AnyOptions, *, seed: int, say: Say, saved: Mapping[str, Any] | None = None
) -> Run:
    """Check, plan, encode, load: everything before the first step, in the order that users see.

    `saved` is the arithmetic of the state that the run resumes from. Raises `UserError` for
    anything wrong with the options, the dataset or the model files, as early as it can be known.
    """
    device = choose_device(options.device)
    options, arithmetic = settle(options, device, say=say, saved=saved)
    training = make_training(options, device, seed, arithmetic)
    folder = check_start(options, training, device)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    plan, length = read_dataset(options, say)
    training.check_room(plan, say)
    # The VAE and the text encoder come and go here, before the DiT takes its memory.
    encoders = DTYPES[arithmetic.encoders]
    vae_type = vae_dtype(options, arithmetic.encoders)
    lowres, encoded = encode(options, plan, folder, device, say, vae_type, encoders)
    batches = Batches(plan, encoded, options, seed, lowres)
    prompts = prepare_prompts(options, encoded.text_mode, device=device, dtype=encoders, say=say)

    def load(arithmetic: Arithmetic, say: Say = lambda text: None) -> Run:
        """The run in an arithmetic, fresh."""
        set_sums(arithmetic.chain)
        settled = with_arithmetic(options, arithmetic)
        training = make_training(settled, device, seed, arithmetic)
        dit = load_run_dit(settled, device)
        conditioning = load_conditioning(
            settled, encoded.text_mode, device=device, dtype=dit.dtype, models_dtype=encoders
        )
        vae = None
        if encoded.image_mode == "live":
            vae = load_vae(given(options.vae), device=device, dtype=vae_type)
        notices = training.build(dit, conditioning, say)
        scheduler = build_scheduler(
            settled, training.optimizer, length.steps, learning_rate=options.learning_rate
        )
        for notice in notices:
            say(notice)
        scaler = LossScaler(device.type, enabled=settled.mixed_precision == "fp16")
        return Run(
            settled, folder, training, device, seed, plan, batches, length, dit, conditioning,
            scheduler, scaler, vae, prompts,
        )  # fmt: skip

    say("loading the DiT")
    model = given(options.pretrained_model_name_or_path)
    return load(judged(arithmetic, model, device, load, say=say), say)


def make_training(
    options: AnyOptions, device: torch.device, seed: int, arithmetic: Arithmetic
) -> Training:
    """The kind of training that the options are of."""
    if isinstance(options, FinetuneOptions):
        return Finetuning(options, device, seed, arithmetic)
    return LoRATraining(options, device, seed, arithmetic)


def check_start(options: AnyOptions, training: Training, device: torch.device) -> Path:
    """Refuse what can be refused before anything is encoded, and set the backend switches.

    Returns the output folder.
    """
    check_torch_version()
    dtype = DTYPES[options.mixed_precision]
    check_attn_mode(options.attn_mode, training=True, device=device, dtype=dtype)
    fused = training.fused
    dit = check_model_files(
        options.pretrained_model_name_or_path, options.qwen3, options.vae, options.llm_adapter_path
    )
    training.check(dit)
    find_optimizer(options.optimizer_type)
    collect_prompts(options)
    SaverSettings.of(options, training.cuda_graphs).policies(dit.num_blocks, fused=fused)
    if options.mixed_precision == "bf16" and device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        if major < 8:
            raise UserError(
                "this card has no bfloat16 units: use --mixed_precision auto, which is fp16 here, "
                "or no"
            )
    # Proved now, not after an hour.
    if not options.output_dir:
        raise UserError("--output_dir is required: the folder for files, log and states")
    check_folder(options.output_dir)
    set_backends(tf32=options.cuda_allow_tf32, benchmark=options.cuda_cudnn_benchmark)
    return Path(options.output_dir)


def check_validation(options: ValidationOptions, say: Say) -> None:
    """What options of validation mean where no image is held out."""
    if options.early_stop_patience:
        raise UserError(
            "--early_stop_patience needs a validation loss, and no image is held out: set "
            "validation_split in the dataset file, or drop it"
        )
    for name in ("validate_every_n_steps", "validate_every_n_epochs"):
        if getattr(options, name):
            say(f"{name} has no effect: no image is held out (validation_split)")


def read_dataset(options: AnyOptions, say: Say) -> tuple[DatasetPlan, Length]:
    """Read the dataset's folders and say how many batches and steps they make."""
    say("reading the dataset")
    plan = announced_plan(options, say)
    if not plan.validation_items:
        check_validation(options, say)
    length = describe_plan(plan, options, say)
    for notice in about_warmup(options, length.steps):
        say(notice)
    return plan, length


def show_dataset(options: AnyOptions, seed: int, *, say: Say) -> None:
    """Say what the first epoch would hold; no model is loaded."""
    plan = announced_plan(options, say)
    describe_plan(plan, options, say)
    for line in list_epoch(plan, seed):
        say(line)


def describe_plan(plan: DatasetPlan, options: LengthOptions, say: Say) -> Length:
    """Say how many images each bucket has and how long the run is."""
    length = run_length(options, plan.batches_per_epoch)
    buckets: Counter[tuple[int, int]] = Counter()
    for item in plan.items:
        buckets[item.bucket] += item.repeats
    for (width, height), count in sorted(buckets.items()):
        say(f"  bucket {width}x{height}: {count} images (with repeats)")
    files, placed = len({item.path for item in plan.items}), len(plan.items)
    several = f" ({placed} over {len(plan.datasets)} datasets)" if placed > files else ""
    say(
        f"{files} images{several}, {length.batches_per_epoch} batches per epoch, "
        f"{length.epochs} epochs, {length.steps} steps"
    )
    return length


def encode(
    options: AnyOptions,
    plan: DatasetPlan,
    folder: Path,
    device: torch.device,
    say: Say,
    vae_type: torch.dtype,
    text_type: torch.dtype,
) -> tuple[LowRes | None, EncodedDataset]:
    """Fill the caches by encoders of these types, and write the dataset's health to the folder."""
    # Written twice, as encoding may take long and the lengths of captions are known only after it.
    write_health(folder, plan)
    lowres = LowRes.from_options(options)
    for line in lowres.describe(plan.items) if lowres else ():
        say(line)
    encoded = encode_dataset(
        plan,
        options,
        device=device,
        vae_dtype=vae_type,
        text_dtype=text_type,
        lowres=lowres,
        say=say,
    )
    write_health(folder, plan, encoded.tokens)
    return lowres, encoded


def load_run_dit(options: AnyOptions, device: torch.device) -> AnimaDiT:
    """The DiT, frozen."""
    dit = load_dit(
        given(options.pretrained_model_name_or_path),
        # Swapped blocks never visit the device: install_memory_savers moves the others there.
        device="cpu" if options.blocks_to_swap else device,
        dtype=DTYPES[options.mixed_precision],
        attn_mode=options.attn_mode,
    )
    dit.split_attn = options.split_attn
    return dit


def choose_seed(seed: int | None) -> int:
    """The given seed, else a random one, which the log and the resume state record."""
    return seed if seed is not None else secrets.randbelow(2**31)
