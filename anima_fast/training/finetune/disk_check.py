"""Is there room on the disk for what a full fine-tuning run writes?

A whole model is gigabytes and its resume state several times that. A run that could not save its
result is refused at the start; one whose states may not fit is warned.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anima_fast.errors import UserError
from anima_fast.memory.finetune import model_sizes
from anima_fast.memory.plan import GIB
from anima_fast.training.checks import given
from anima_fast.training.finetune.full_network import ADAPTER
from anima_fast.training.finetune.start import base_tensors, training_dtype
from anima_fast.training.kind import SAVE_DTYPES
from anima_fast.training.optimizers.probe import state_bytes

if TYPE_CHECKING:
    from anima_fast.options.run import FinetuneOptions


def check_disk(
    options: FinetuneOptions, device: torch.device, *, say: Callable[[str], None]
) -> None:
    """Refuse a run without room for the saved model; warn of states that may not fit.

    Raises:
        UserError: too little room, or an output file that is the base model itself.
    """
    target = Path(given(options.output_dir)) / f"{options.output_stem}.safetensors"
    if target.exists() and target.samefile(given(options.pretrained_model_name_or_path)):
        raise UserError(
            f"{target} is the base model itself: give another --output_name or --output_dir"
        )
    model, state = model_bytes(options), resume_bytes(options, device)
    free = shutil.disk_usage(_existing(target.parent)).free
    if free < model:
        raise UserError(
            f"the trained model takes {model / GIB:.1f} GiB, {free / GIB:.1f} GiB are free in "
            f"{options.output_dir}: free some space, give another --output_dir, or "
            "--save_precision bf16"
        )
    states = options.autosave_minutes or options.save_state or options.save_state_on_train_end
    # While a state is written, the one before it is still there.
    if states and free < model + 2 * state:
        say(
            f"a resume state takes {state / GIB:.1f} GiB, {free / GIB:.1f} GiB are free in "
            f"{options.output_dir}: saving may fail; --autosave_minutes 0 writes none by itself"
        )


def model_bytes(options: FinetuneOptions) -> int:
    """Of the saved file."""
    base, bundled = base_tensors(
        given(options.pretrained_model_name_or_path), options.llm_adapter_path
    )
    saves_adapter = bundled or options.trains_llm_adapter
    numbers = sum(
        math.prod(shape)
        for name, shape in base.shapes.items()
        if saves_adapter or not name.startswith(ADAPTER)
    )
    return numbers * (SAVE_DTYPES[options.save_precision] or training_dtype(options)).itemsize


def resume_bytes(options: FinetuneOptions, device: torch.device) -> int:
    """Of a resume state: the trained weights as they are kept, and the optimizer's state."""
    base, _ = base_tensors(given(options.pretrained_model_name_or_path), options.llm_adapter_path)
    trained = model_sizes(options, base.shapes, adapter_stays=options.trains_llm_adapter).trained
    wide = options.mixed_precision == "no" or options.weight_update == "fp32"
    return int(trained * ((4 if wide else 2) + state_bytes(options, device)))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
