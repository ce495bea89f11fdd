"""Names, saving and clean-up of the files and resume states of one run.

NAME-000004.safetensors after epoch 4, NAME-step00000500.safetensors after step 500,
NAME.safetensors at the end; with a running mean each has a NAME...-ema next to it. States have the
same stem plus `-state`. A rolling state `NAME-autosave-state` lets a killed run go on.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anima_fast.training.optimizers.build import averaged_weights
from anima_fast.training.state import save_state
from anima_fast.training.state_checks import class_name

if TYPE_CHECKING:
    from anima_fast.options.output import SaveOptions
    from anima_fast.training.run import Position, Run

# Ends the name of the file that holds the running mean.
EMA_MARK = "-ema"


class Checkpoints:
    """Saves what is due at a position, which the loop moves, and removes what is outdated."""

    def __init__(self, run: Run, position: Position) -> None:
        self.run, self.position, self.folder = run, position, run.folder
        self.options: SaveOptions = run.options
        self.last_autosave = time.monotonic()
        self.started_at = time.time()
        self.session_id = secrets.randbits(32)

    def after_step(self) -> None:
        """Step checkpoints, their clean-up, and the timed autosave."""
        options, step = self.options, self.position.step
        every = options.save_every_n_steps
        if every and step % every == 0 and step < self.run.length.steps:
            self._save(self._at_step(step))
            self._drop(
                lambda kept: self._at_step((step - kept - 1) // every * every),
                options.save_last_n_steps,
                options.save_last_n_steps_state,
            )
        minutes = options.autosave_minutes
        if minutes and time.monotonic() - self.last_autosave >= 60 * minutes:
            self.autosave()

    def after_epoch(self, epoch: int) -> None:
        """Epoch checkpoints; the last epoch is saved under the final name only."""
        options, every = self.options, self.options.save_every_n_epochs
        if options.save_n_epoch_ratio:
            every = max(1, self.run.length.epochs // options.save_n_epoch_ratio)
        if every and epoch % every == 0 and self.position.step < self.run.length.steps:
            self._save(self._after_epoch(epoch))
            self._drop(
                lambda kept: self._after_epoch(epoch - every * kept),
                options.save_last_n_epochs,
                options.save_last_n_epochs_state,
            )

    def final(self) -> Path:
        """Save the finished file, its state if asked for, and remove the autosave."""
        stem = self.options.output_stem
        try:
            if self.options.save_state or self.options.save_state_on_train_end:
                save_state(self.folder / f"{stem}-state", self.run, self.position)
        finally:
            path = self._save_weights(stem)
        for end in ("", ".prev"):
            shutil.rmtree(self.folder / f"{stem}-autosave-state{end}", ignore_errors=True)
        return path

    def best(self) -> Path:
        """Save the weights of the lowest validation loss so far, NAME-best.safetensors."""
        return self._save_weights(f"{self.options.output_stem}-best")

    def interrupted(self) -> Path:
        """After a signal: save a state to go on from, and the weights whatever becomes of it."""
        try:
            self.autosave()
        finally:
            path = self._save_weights(self._at_step(self.position.step))
        return path

    def autosave(self) -> None:
        """Write the rolling state; the previous one stays until the new one is complete."""
        folder = self.folder / f"{self.options.output_stem}-autosave-state"
        # A LoRA's stays even after that; a whole model's would take gigabytes.
        keep_previous = not self.run.training.saves_whole_model
        save_state(folder, self.run, self.position, keep_previous=keep_previous)
        self.last_autosave = time.monotonic()

    def _save(self, stem: str) -> None:
        try:
            if self.options.save_state:
                save_state(self.folder / f"{stem}-state", self.run, self.position)
            if self.options.autosave_minutes and not self.run.training.saves_whole_model:
                self.autosave()
        finally:
            self._save_weights(stem)

    def _save_weights(self, stem: str) -> Path:
        """Write the LoRA, or the whole model, in the format and precision asked for."""
        training = self.run.training
        path = self.folder / f"{stem}.safetensors"
        with averaged_weights(self.run.optimizer):
            training.save(path, self.run.plan, self._facts())
        if training.ema is not None:
            # The mean over the steps themselves, not over a schedule-free optimizer's averages.
            with training.ema.in_place():
                mean = self.folder / f"{stem}{EMA_MARK}.safetensors"
                training.save(mean, self.run.plan, self._facts())
        return path

    def _facts(self) -> dict[str, Any]:
        """What the metadata of a file says about this moment."""
        length = self.run.length
        return {
            "session_id": self.session_id,
            "started_at": self.started_at,
            "finished_at": time.time(),
            "seed": self.run.seed,
            "steps": self.position.step,
            "epoch": self.position.last_epoch,
            "num_epochs": length.epochs,
            "max_train_steps": length.steps,
            "num_batches_per_epoch": length.batches_per_epoch,
            "optimizer": describe_optimizer(self.run.optimizer, self.run.options.optimizer_kwargs),
        }

    def _at_step(self, step: int) -> str:
        return f"{self.options.output_name or 'at'}-step{step:08d}"

    def _after_epoch(self, epoch: int) -> str:
        return f"{self.options.output_name or 'epoch'}-{epoch:06d}"

    def _drop(self, outdated: Callable[[int], str], files: int | None, states: int | None) -> None:
        """Remove the newest file and the newest state that are too old.

        `outdated` gives the stem of the newest one by how many are kept. None keeps all files, and
        as many states as files.
        """
        if files:
            for name in (outdated(files), f"{outdated(files)}{EMA_MARK}"):
                (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
        if kept := states or files:
            shutil.rmtree(self.folder / f"{outdated(kept)}-state", ignore_errors=True)


def remove_leftovers(options: SaveOptions) -> None:
    """Delete half-written files, of gigabytes perhaps, that a kill left in the output folder."""
    names = re.escape(options.output_name) if options.output_name else "last|epoch|at"
    pattern = re.compile(
        rf"\.(?:{names})(?:-\d{{6}}|-step\d{{8}}|-best|-autosave)?(?:{EMA_MARK})?"
        r"(?:\.safetensors|-state)\.[0-9a-f]{8}\.tmp"
    )
    # A folder that is missing or cannot be read is reported by `check_start`.
    with contextlib.suppress(OSError):
        for path in list(Path(options.output_dir or "").iterdir()):
            if pattern.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def describe_optimizer(optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> str:
    """Class and arguments in one text: `torch.optim.adamw.AdamW(weight_decay=0.1)`."""
    arguments = ",".join(f"{k}={v}" for k, v in given.items())
    name = class_name(optimizer)
    return f"{name}({arguments})" if arguments else name
