"""Everything before the first step: options in, a `Run` out.

The order keeps peak memory low: the VAE and the text encoder are loaded, used and freed while the
caches are filled, and only then is the DiT loaded. (Without caching, one or both of them stay.)
"""

from __future__ import annotations

import random
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from anima_fast.data.batches import Batches
from anima_fast.data.conditioning import load_conditioning
from anima_fast.data.encode import EncodedDataset, encode_dataset
from anima_fast.data.health import write_health
from anima_fast.data.items import DatasetPlan, Length, run_length
from anima_fast.data.lowres import LowRes
from anima_fast.data.plan import build_plan
from anima_fast.data.summary import list_epoch
from anima_fast.device import DTYPES, choose_device, uses_fused_blocks
from anima_fast.files import write_text
from anima_fast.models.dit import AnimaDiT, load_dit
from anima_fast.models.vae_checkpoint import load_vae
from anima_fast.options.files import to_toml
from anima_fast.options.run import FinetuneOptions, TrainOptions
from anima_fast.training.checks import check_start, check_validation, given
from anima_fast.training.finetune.finetuning import Finetuning
from anima_fast.training.kind import Say, Training
from anima_fast.training.lora import LoRATraining
from anima_fast.training.optimizers.schedules import build_scheduler
from anima_fast.training.position import Position
from anima_fast.training.preview_prompts import prepare_prompts
from anima_fast.training.run import LossScaler, Run
from anima_fast.training.state import load_state

if TYPE_CHECKING:
    from anima_fast.models.vae import VAE


def training_of(
    options: TrainOptions | FinetuneOptions, device: torch.device, seed: int
) -> Training:
    """The kind of training that these options ask for."""
    if isinstance(options, FinetuneOptions):
        return Finetuning(options, device, seed)
    return LoRATraining(options, device, seed)


def prepare(options: TrainOptions | FinetuneOptions, *, seed: int, say: Say) -> Run:
    """Check, plan, encode, load: everything before the first step, in the order that users see.

    Raises `UserError` for anything wrong with the options, the dataset or the model files, as early
    as it can be known.
    """
    device = choose_device(options.device)
    training = training_of(options, device, seed)
    folder = check_start(options, training, device)
    seed_everything(seed)
    plan, length = read_dataset(options, say)
    training.check_room(plan, say)
    # The VAE and the text encoder come and go here, before the DiT takes its memory.
    lowres, encoded = encode(options, plan, folder, device, say)
    batches = Batches(plan, encoded, options, seed, lowres)
    dtype = DTYPES[options.mixed_precision]
    prompts = prepare_prompts(options, encoded.text_mode, device=device, dtype=dtype, say=say)

    say("loading the DiT")
    dit = load_run_dit(options, device)
    conditioning = load_conditioning(options, encoded.text_mode, device=device, dtype=dit.dtype)
    vae = load_live_vae(options, device) if encoded.image_mode == "live" else None
    notices = training.build(dit, conditioning, say)
    scheduler = build_scheduler(
        options, training.optimizer, length.steps, learning_rate=options.learning_rate
    )
    for notice in notices:
        say(notice)
    return Run(
        options, folder, training, device, seed, plan, batches, length, dit, conditioning,
        scheduler,
        scaler=LossScaler(device.type, enabled=options.mixed_precision == "fp16"),
        vae=vae,
        prompts=prompts,
        fused=uses_fused_blocks(options.kernels, device, compiled=options.compile),
    )  # fmt: skip


def read_dataset(options: TrainOptions | FinetuneOptions, say: Say) -> tuple[DatasetPlan, Length]:
    """Read the dataset's folders and say how many batches and steps they make."""
    say("reading the dataset")
    plan = build_plan(options)
    for notice in plan.notices:
        say(notice)
    if not plan.validation_items:
        check_validation(options, say)
    length = run_length(options, plan.batches_per_epoch)
    describe_plan(plan, length, say)
    return plan, length


def encode(
    options: TrainOptions | FinetuneOptions,
    plan: DatasetPlan,
    folder: Path,
    device: torch.device,
    say: Say,
) -> tuple[LowRes | None, EncodedDataset]:
    """Fill the caches, and write the dataset's health to the output folder."""
    # Written twice, as encoding may take long and the lengths of captions are known only after it.
    write_health(folder, plan)
    lowres = LowRes.from_options(options)
    for line in lowres.describe(plan.items) if lowres else ():
        say(line)
    encoded = encode_dataset(
        plan,
        options,
        device=device,
        vae_dtype=vae_dtype(options),
        text_dtype=DTYPES[options.mixed_precision],
        lowres=lowres,
        say=say,
    )
    write_health(folder, plan, encoded.tokens)
    return lowres, encoded


def load_run_dit(options: TrainOptions | FinetuneOptions, device: torch.device) -> AnimaDiT:
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


def vae_dtype(options: TrainOptions | FinetuneOptions) -> torch.dtype:
    """The precision of the VAE."""
    return torch.float32 if options.no_half_vae else DTYPES[options.mixed_precision]


def load_live_vae(options: TrainOptions | FinetuneOptions, device: torch.device) -> VAE:
    """The VAE, which stays in memory because latents are not cached."""
    return load_vae(given(options.vae), device=device, dtype=vae_dtype(options))


def choose_seed(seed: int | None) -> int:
    """The given seed, else a random one, which the log and the resume state record."""
    return seed if seed is not None else secrets.randbelow(2**31)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe_plan(plan: DatasetPlan, length: Length, say: Say) -> None:
    """Print images per bucket and the length of the run."""
    buckets: dict[tuple[int, int], int] = {}
    for item in plan.items:
        buckets[item.bucket] = buckets.get(item.bucket, 0) + item.repeats
    for (width, height), count in sorted(buckets.items()):
        say(f"  bucket {width}x{height}: {count} images (with repeats)")
    say(
        f"{len(plan.items)} images, {length.batches_per_epoch} batches per epoch, "
        f"{length.epochs} epochs, {length.steps} steps"
    )


def show_dataset(options: TrainOptions | FinetuneOptions, seed: int, *, say: Say) -> None:
    """Say what the first epoch would hold; no model is loaded."""
    plan = build_plan(options)
    for notice in plan.notices:
        say(notice)
    describe_plan(plan, run_length(options, plan.batches_per_epoch), say)
    for line in list_epoch(plan, seed):
        say(line)


def resume_run(run: Run, folder: Path, *, say: Say) -> Position:
    """Restore a freshly prepared run from a resume state."""
    position = load_state(
        folder,
        network=run.network,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        scaler=run.scaler,
        fingerprint=run.fingerprint,
        ema=run.training.ema,
        remedies=run.training.remedies,
        say=say,
    )
    if bins := position.pop("sigma_bins", None):
        run.sigma_bins.restore(torch.tensor(bins))
    restored = Position(**position)
    say(f"resumed from {folder.name} at step {restored.step}")
    return restored


def write_run_file(run: Run) -> None:
    """Write the resolved options as TOML: `--config_file NAME.toml` repeats the run."""
    write_text(run.folder / f"{run.options.output_stem}.toml", to_toml(run.options))
