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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anima_fast.training.optimizers.build import averaged_weights
from anima_fast.training.state import save_state
from anima_fast.training.state_checks import class_name

if TYPE_CHECKING:
    from anima_fast.options.output import SaveOptions
    from anima_fast.training.position import Position
    from anima_fast.training.run import Run

# Ends the name of the file that holds the running mean.
EMA_MARK = "-ema"


@dataclass
class Checkpoints:
    """Saves what is due and removes what is outdated."""

    run: Run
    last_autosave: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    session_id: int = field(default_factory=lambda: secrets.randbits(32))

    @property
    def options(self) -> SaveOptions:
        """What is saved, and when."""
        return self.run.options

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.run.folder

    def after_step(self, position: Position) -> None:
        """Step checkpoints, their clean-up, and the timed autosave."""
        step, every = position.step, self.options.save_every_n_steps
        if every and step % every == 0 and step < self.run.length.steps:
            self._save(f"{self._name('at')}-step{step:08d}", position)
            self._drop_old_steps(step, every)
        minutes = self.options.autosave_minutes
        if minutes and time.monotonic() - self.last_autosave >= 60 * minutes:
            self.autosave(position)

    def after_epoch(self, position: Position, *, finished_epoch: int) -> None:
        """Epoch checkpoints; the last epoch is saved under the final name only."""
        every = self._epoch_interval()
        if every and finished_epoch % every == 0 and position.step < self.run.length.steps:
            self._save(f"{self._name('epoch')}-{finished_epoch:06d}", position)
            self._drop_old_epochs(finished_epoch, every)

    def final(self, position: Position) -> Path:
        """Save the finished file, its state if asked for, and remove the autosave."""
        stem = self._name("last")
        path = self.save_weights(stem, position)
        if self.options.save_state or self.options.save_state_on_train_end:
            self.save_state(f"{stem}-state", position)
        for name in (self.autosave_name, f"{self.autosave_name}.prev"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return path

    def best(self, position: Position) -> Path:
        """Save the weights of the lowest validation loss so far, NAME-best.safetensors."""
        return self.save_weights(f"{self._name('last')}-best", position)

    def interrupted(self, position: Position) -> Path:
        """After Ctrl-C or SIGTERM: save the weights and a state to go on from."""
        path = self.save_weights(f"{self._name('at')}-step{position.step:08d}", position)
        self.autosave(position)
        return path

    @property
    def autosave_name(self) -> str:
        """Folder name of the rolling state."""
        return f"{self._name('last')}-autosave-state"

    def autosave(self, position: Position) -> None:
        """Write the rolling state; the previous one stays until the new one is complete."""
        # A LoRA's stays even after that; a whole model's would take gigabytes.
        keep_previous = not self.run.training.saves_whole_model
        self.save_state(self.autosave_name, position, keep_previous=keep_previous)
        self.last_autosave = time.monotonic()

    def save_weights(self, stem: str, position: Position) -> Path:
        """Write the LoRA, or the whole model, in the format and precision asked for."""
        with averaged_weights(self.run.optimizer):
            path = self._write(stem, position)
        if self.run.training.ema is not None:
            # The mean over the steps themselves, not over a schedule-free optimizer's averages.
            with self.run.training.ema.in_place():
                self._write(f"{stem}{EMA_MARK}", position)
        return path

    def _write(self, stem: str, position: Position) -> Path:
        path = self.folder / f"{stem}.safetensors"
        self.run.training.save(path, self.run.plan, self._facts(position))
        return path

    def save_state(self, name: str, position: Position, *, keep_previous: bool = False) -> None:
        """Write a resume state folder."""
        run = self.run
        save_state(
            self.folder / name,
            network=run.network,
            optimizer=run.optimizer,
            scheduler=run.scheduler,
            scaler=run.scaler,
            position={**position.as_dict(), "sigma_bins": run.sigma_bins.copy().tolist()},
            seed=run.seed,
            fingerprint=run.fingerprint,
            ema=run.training.ema,
            keep_previous=keep_previous,
        )

    def _facts(self, position: Position) -> dict[str, Any]:
        """What the metadata of a file says about this moment."""
        length = self.run.length
        return {
            "session_id": self.session_id,
            "started_at": self.started_at,
            "finished_at": time.time(),
            "seed": self.run.seed,
            "steps": position.step,
            "epoch": position.last_epoch,
            "num_epochs": length.epochs,
            "max_train_steps": length.steps,
            "num_batches_per_epoch": length.batches_per_epoch,
            "optimizer": describe_optimizer(self.run.optimizer, self.run.options.optimizer_kwargs),
        }

    def _save(self, stem: str, position: Position) -> None:
        self.save_weights(stem, position)
        if self.options.save_state:
            self.save_state(f"{stem}-state", position)
        if self.options.autosave_minutes and not self.run.training.saves_whole_model:
            self.autosave(position)

    def _name(self, default: str) -> str:
        return self.options.output_name or default

    def _epoch_interval(self) -> int | None:
        if self.options.save_n_epoch_ratio:
            return max(1, self.run.length.epochs // self.options.save_n_epoch_ratio)
        return self.options.save_every_n_epochs

    def _drop_old_epochs(self, epoch: int, every: int) -> None:
        options = self.options
        keep_state = options.save_last_n_epochs_state or options.save_last_n_epochs
        if options.save_last_n_epochs:
            self._drop_file(
                f"{self._name('epoch')}-{epoch - every * options.save_last_n_epochs:06d}"
            )
        if keep_state:
            self._drop_state(f"{self._name('epoch')}-{epoch - every * keep_state:06d}")

    def _drop_old_steps(self, step: int, every: int) -> None:
        options = self.options
        keep_state = options.save_last_n_steps_state or options.save_last_n_steps
        if options.save_last_n_steps:
            old = (step - options.save_last_n_steps - 1) // every * every
            self._drop_file(f"{self._name('at')}-step{old:08d}")
        if keep_state:
            old = (step - keep_state - 1) // every * every
            self._drop_state(f"{self._name('at')}-step{old:08d}")

    def _drop_file(self, stem: str) -> None:
        for name in (stem, f"{stem}{EMA_MARK}"):
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def _drop_state(self, stem: str) -> None:
        shutil.rmtree(self.folder / f"{stem}-state", ignore_errors=True)


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
