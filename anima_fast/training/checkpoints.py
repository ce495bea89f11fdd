"""Names, saving and clean-up of the files and resume states of one run.

NAME-000004.safetensors after epoch 4, NAME-step00000500.safetensors after step 500,
NAME.safetensors at the end; with a running mean each has a NAME...-ema next to it. States have the
same stem plus `-state`. A rolling state `NAME-autosave-state` lets a killed run go on.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anima_fast.errors import UserError
from anima_fast.files import remove
from anima_fast.training.optimizers.build import averaged_weights
from anima_fast.training.state import save_state
from anima_fast.training.state_checks import class_name

if TYPE_CHECKING:
    from anima_fast.options.output import SaveOptions
    from anima_fast.training.run import Position, Run

logger = logging.getLogger("anima_fast")

# Ends the name of the file that holds the running mean.
EMA_MARK = "-ema"
# A file that is being written is younger than this.
OLD_SECONDS = 3600.0


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
                self._at_step,
                lambda kept: step - kept - 1,
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
                self._after_epoch,
                lambda kept: epoch - every * kept,
                options.save_last_n_epochs,
                options.save_last_n_epochs_state,
            )

    def final(self) -> Path:
        """Save the finished file and its state, and remove the autosave.

        A LoRA keeps its state, which a longer run goes on from, also unasked.
        """
        options, stem = self.options, self.options.output_stem
        asked = options.save_state or options.save_state_on_train_end
        small = not self.run.training.saves_whole_model
        try:
            if asked or (options.autosave_minutes and small):
                save_state(self.folder / f"{stem}-state", self.run, self.position)
        except UserError as error:
            if asked:
                raise
            logger.warning("no state is kept for a longer run: %s", error)
        finally:
            path = self._save_weights(stem)
        for end in ("", ".prev"):
            remove(self.folder / f"{stem}-autosave-state{end}")
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
            "run_id": self.run.id,
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

    def _drop(
        self,
        name: Callable[[int], str],
        outdated: Callable[[int], int],
        files: int | None,
        states: int | None,
    ) -> None:
        """Remove the files and the states that are too old.

        `name` gives the stem of a step or an epoch, `outdated` the newest of them that goes by how
        many are kept. None keeps all files, and as many states as files.
        """
        stem = name(0).rstrip("0")
        number = rf"{re.escape(stem)}(\d{{{len(name(0)) - len(stem)}}})"
        for kept, end in ((files, rf"(?:{EMA_MARK})?\.safetensors"), (states or files, "-state")):
            pattern = re.compile(number + end)
            for path in list(self.folder.iterdir()) if kept else ():
                found = pattern.fullmatch(path.name)
                if kept and found and int(found[1]) <= outdated(kept):
                    remove(path)


def own_names(options: SaveOptions) -> str:
    """A pattern of how the names of a run's files and states begin."""
    return re.escape(options.output_name) if options.output_name else "last|epoch|at"


def without_effect(options: SaveOptions) -> Iterator[str]:
    """One line for each option of pruning that cannot act with the saving chosen."""
    by_epochs = "save_every_n_epochs", "save_n_epoch_ratio"
    for kind, makers in (("epochs", by_epochs), ("steps", ("save_every_n_steps",))):
        for end in ("", "_state"):
            name = f"save_last_n_{kind}{end}"
            if not getattr(options, name):
                continue
            if not any(getattr(options, maker) for maker in makers):
                yield f"{name} has no effect without {makers[0]}"
            elif end and not options.save_state:
                yield f"{name} has no effect without save_state"


def remove_leftovers(options: SaveOptions) -> None:
    """Delete half-written files, of gigabytes perhaps, that a kill left in the output folder.

    Only old ones: another run may be at work in the same folder.
    """
    pattern = re.compile(
        rf"\.(?:(?:{own_names(options)})(?:-\d{{6}}|-step\d{{8}}|-best|-autosave)?(?:{EMA_MARK})?"
        r"(?:\.safetensors|\.toml|-state(?:\.prev)?)|dataset\.json|run\.json|log\.jsonl|report\.html)"
        r"\.[0-9a-f]{8}\.tmp"
    )
    # A folder that is missing or cannot be read is reported by `check_start`.
    with contextlib.suppress(OSError):
        for path in list(Path(options.output_dir or "").iterdir()):
            if pattern.fullmatch(path.name) and time.time() - path.stat().st_mtime > OLD_SECONDS:
                remove(path)


def describe_optimizer(optimizer: torch.optim.Optimizer, given: Mapping[str, Any]) -> str:
    """Class and arguments in one text: `torch.optim.adamw.AdamW(weight_decay=0.1)`."""
    arguments = ",".join(f"{k}={v}" for k, v in given.items())
    name = class_name(optimizer)
    return f"{name}({arguments})" if arguments else name
