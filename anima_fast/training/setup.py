"""Everything that stands before the first step: options in, a `Run` out.

The order is the one that keeps the peak memory low: the VAE and the text encoder are loaded, used
and freed while the caches are filled, and only then is the DiT loaded. (Without caching the user
has asked for one or both of them to stay.)
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from anima_fast.data.batches import Batches
from anima_fast.data.conditioning import load_conditioning
from anima_fast.data.encode import encode_dataset
from anima_fast.data.health import write_health
from anima_fast.data.items import DatasetPlan
from anima_fast.data.length import Length, run_length
from anima_fast.data.lowres import LowRes
from anima_fast.data.plan import build_plan
from anima_fast.data.summary import list_epoch
from anima_fast.device import DTYPES, choose_device, uses_fused_blocks
from anima_fast.errors import UserError
from anima_fast.files import write_text
from anima_fast.memory.install import install_memory_savers
from anima_fast.models.dit import load_dit
from anima_fast.options.files import to_toml
from anima_fast.training.adapter_setup import build_network, check_network
from anima_fast.training.checks import check_start
from anima_fast.training.finetune.disk_check import check_disk
from anima_fast.training.finetune.memory_check import check_memory
from anima_fast.training.finetune.start import check_optimizer, data_notices, train_model
from anima_fast.training.optimizers.build import build_optimizer
from anima_fast.training.optimizers.ema import Ema
from anima_fast.training.optimizers.schedules import build_scheduler
from anima_fast.training.position import Position
from anima_fast.training.previews import prepare_previews
from anima_fast.training.run import LossScaler, Run, trains_all
from anima_fast.training.state import load_state

if TYPE_CHECKING:
    from anima_fast.models.vae import VAE
    from anima_fast.options.run import TrainOptions


def prepare(options: TrainOptions, *, seed: int, say: Callable[[str], None]) -> Run:
    """Check, plan, encode, load: the whole start of a run, in the order of events that users see.

    Raises `UserError` for anything wrong with the options, the dataset or the model files, as early
    as it can be known.
    """
    device = choose_device(options.device)
    sizes = check_start(options, device)
    if not trains_all(options):
        check_network(options, sizes)
    seed_everything(seed)

    say("reading the dataset")
    plan = build_plan(options)
    for notice in plan.notices:
        say(notice)
    if not plan.validation_items:
        check_validation(options, say)
    length = run_length(options, plan.batches_per_epoch)
    describe_plan(plan, length, say)
    if trains_all(options):
        check_optimizer(options)
        check_memory(options, plan, device, say=say)
        check_disk(options, device, say=say)
        for notice in data_notices(plan):
            say(notice)
    # Encoding may take long; the lengths of the captions are known after it.
    write_health(options.output_dir, plan)

    lowres = LowRes.from_options(options)
    for line in lowres.describe(plan.items) if lowres else ():
        say(line)
    encoded = encode_dataset(
        plan,
        options,
        device=device,
        vae_dtype=torch.float32 if options.no_half_vae else DTYPES[options.mixed_precision],
        text_dtype=DTYPES[options.mixed_precision],
        lowres=lowres,
        say=say,
    )
    write_health(options.output_dir, plan, encoded.tokens)
    batches = Batches(plan, encoded, options, seed, lowres)
    previews = prepare_previews(
        options, encoded.text_mode, device=device, dtype=DTYPES[options.mixed_precision], say=say
    )

    say("loading the DiT")
    dit = load_dit(
        options.pretrained_model_name_or_path,
        # Swapped blocks never visit the device: install_memory_savers moves the others there.
        device="cpu" if options.blocks_to_swap else device,
        dtype=DTYPES[options.mixed_precision],
        attn_mode=options.attn_mode,
    )
    dit.split_attn = options.split_attn
    conditioning = load_conditioning(options, encoded.text_mode, device=device, dtype=dit.dtype)
    vae = load_live_vae(options, device) if encoded.image_mode == "live" else None
    fused = uses_fused_blocks(options.kernels, device, compiled=options.compile)
    if trains_all(options):
        network, optimizer, notices = train_model(
            options, dit, conditioning, device=device, seed=seed, say=say
        )
    else:
        network = build_network(options, dit, conditioning, seed=seed, say=say).to(device)
        install_memory_savers(options, dit, device)
        if fused and conditioning.adapter is not None:
            conditioning.adapter.fuse_norms()
        optimizer, notices = build_optimizer(options, network, fused=fused)
    scheduler = build_scheduler(options, optimizer, length.steps)
    for notice in notices:
        say(notice)
    scaler = LossScaler(device.type, enabled=options.mixed_precision == "fp16")
    ema = None
    if not trains_all(options) and options.ema_decay is not None:
        ema = Ema(network.flat, options.ema_decay)
    return Run(
        options, device, seed, plan, batches, length, dit, vae, conditioning, network, optimizer,
        scheduler, scaler, fused, ema, previews,
    )  # fmt: skip


def choose_seed(options: TrainOptions) -> int:
    """The seed asked for, else a random one, which the log and the resume state keep."""
    return options.seed if options.seed is not None else secrets.randbelow(2**31)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe_plan(plan: DatasetPlan, length: Length, say: Callable[[str], None]) -> None:
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


def check_validation(options: TrainOptions, say: Callable[[str], None]) -> None:
    """What options of validation mean where no image is held out."""
    if options.early_stop_patience:
        raise UserError(
            "--early_stop_patience needs a validation loss, and no image is held out: set "
            "validation_split in the dataset file, or drop it"
        )
    for name in ("validate_every_n_steps", "validate_every_n_epochs"):
        if getattr(options, name):
            say(f"{name} has no effect: no image is held out (validation_split)")


def show_dataset(options: TrainOptions, seed: int, *, say: Callable[[str], None]) -> None:
    """Say what the first epoch would hold, without loading any model."""
    plan = build_plan(options)
    for notice in plan.notices:
        say(notice)
    describe_plan(plan, run_length(options, plan.batches_per_epoch), say)
    for line in list_epoch(plan, seed):
        say(line)


def load_live_vae(options: TrainOptions, device: torch.device) -> VAE:
    """The VAE that stays in memory because latents are not cached."""
    from anima_fast.models.vae_checkpoint import load_vae

    dtype = torch.float32 if options.no_half_vae else DTYPES[options.mixed_precision]
    return load_vae(options.vae, device=device, dtype=dtype)


def resume_run(run: Run, folder: Path, *, say: Callable[[str], None]) -> Position:
    """Bring a freshly prepared run to where a resume state stands."""
    position = load_state(
        folder,
        network=run.network,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        scaler=run.scaler,
        fingerprint=run.fingerprint,
        ema=run.ema,
        say=say,
    )
    if bins := position.pop("sigma_bins", None):
        run.sigma_bins.restore(torch.tensor(bins))
    restored = Position(**position)
    say(f"resumed from {folder.name} at step {restored.step}")
    return restored


def write_run_file(options: TrainOptions) -> None:
    """The resolved options as TOML, so that `--config_file NAME.toml` repeats the run."""
    write_text(Path(options.output_dir) / f"{options.output_stem}.toml", to_toml(options))
