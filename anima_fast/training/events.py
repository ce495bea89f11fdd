"""What happens around the steps of a run: log, console, validation, files, previews, its end."""

from __future__ import annotations

from pathlib import Path

from anima_fast.errors import Stopped, UserError
from anima_fast.memory.free import peak_memory_mib
from anima_fast.progress import Progress
from anima_fast.training.bad_batches import NO_STEP
from anima_fast.training.checkpoints import Checkpoints
from anima_fast.training.kind import given
from anima_fast.training.logs import RunLog
from anima_fast.training.optimizers.build import learning_rates
from anima_fast.training.previews import Previews
from anima_fast.training.run import Position, Run, TrainResult
from anima_fast.training.step import Group
from anima_fast.training.stopping import StopSignal
from anima_fast.training.validation import validate_or_skip


class Events:
    """Says, logs and saves what is due at each point of the loop, which moves the position."""

    def __init__(
        self, run: Run, position: Position, *, log: RunLog, progress: Progress, stop: StopSignal
    ) -> None:
        self.run, self.position, self._first = run, position, position.step
        self.log, self.progress, self.stop = log, progress, stop
        self.say = progress.say
        self.checkpoints = Checkpoints(run, position)
        self.previews = Previews(run, run.prompts) if run.prompts else None

    def tell(self, text: str) -> None:
        """Say something that changes how the run goes on, and log it."""
        self.say(text)
        self.log.event(self.position.step, text)

    def start(self) -> None:
        """Before the first step; from here on a signal waits for the loop to save."""
        self.stop.waits = True
        arithmetic = self.run.training.arithmetic
        self.log.start(self.position.step, arithmetic.precision, arithmetic.sums)
        if self.run.options.sample_at_first and self.position.step == 0:
            self._make_previews("000000")
        self.progress.start(self.position.step, self.run.length.steps)

    def after_step(self, group: Group, facts: dict, seconds: float) -> None:
        """Log a step of so many seconds, then validate, save and make previews where they are due.

        `facts` are those of `optimizer_step`, and `wait_s`: how much of it was waiting for data.
        """
        options, step = self.run.options, self.position.step
        record = self._step_record(group, facts, seconds)
        self.log.step(record)
        self.progress.step(record)
        if is_due(step, options.validate_every_n_steps):
            self._validate("step")
        with self.stop.saving():
            self.checkpoints.after_step()
        if is_due(step, options.sample_every_n_steps) and not options.sample_every_n_epochs:
            self._make_previews(f"{step:06d}")

    def after_epoch(self) -> None:
        """Validate, log, save and make previews; the position moves to the next epoch."""
        options, position = self.run.options, self.position
        epoch = position.epoch
        if options.validate_every_n_steps is None and is_due(
            epoch, options.validate_every_n_epochs or 1
        ):
            self._validate("epoch")
        self.log.epoch(position.step, epoch, position.loss_average)
        self.log.sigma_bins(position.step, epoch, self.run.sigma_bins.take())
        # A state saved here goes on with the next epoch.
        position.next_epoch()
        with self.stop.saving():
            self.checkpoints.after_epoch(epoch)
        if is_due(epoch, options.sample_every_n_epochs):
            self._make_previews(f"e{epoch:06d}")

    def ends_early(self) -> bool:
        """Whether the validation loss has stopped falling; says so."""
        position, patience = self.position, self.run.options.early_stop_patience
        if not patience or position.stale < patience:
            return False
        text = f"stopped early: {position.stale} validations without a "
        if position.best_loss is None:
            text += "finite loss"
        else:
            text += (
                f"better loss than {position.best_loss:.4f} at step {position.best_step}, whose "
                f"weights are in {self.run.options.output_stem}-best.safetensors"
            )
        self.tell(text)
        return True

    def interrupted(self) -> TrainResult:
        """Save the weights and a state after a signal.

        Raises `Stopped` when no step was made since the start.
        """
        if self.position.step == self._first:
            raise Stopped(given(self.stop.received))
        self._refuse_nothing()
        with self.stop.saving():
            path = self.checkpoints.interrupted()
        self.say(f"stopped by signal {self.stop.received}; saved {path.name} and a resume state")
        self.say("go on with the same command and --resume auto")
        return self._result(path, self.stop.received)

    def finished(self) -> TrainResult:
        """Save the final file and name it.

        Raises `UserError` when steps were tried and none was made: there is nothing to save.
        """
        position = self.position
        self._refuse_nothing()
        self.log.sigma_bins(position.step, position.last_epoch, self.run.sigma_bins.take())
        with self.stop.saving():
            path = self.checkpoints.final()
        self.say(f"saved {path}")
        return self._result(path)

    def _refuse_nothing(self) -> None:
        if self.position.step > self._first and not self.position.made:
            raise UserError(
                f"nothing is saved: not one step was made, every batch failed: {NO_STEP}"
            )

    def autosave(self) -> None:
        """Write the rolling state now."""
        with self.stop.saving():
            self.checkpoints.autosave()

    def _result(self, path: Path, interrupted_by: int | None = None) -> TrainResult:
        position = self.position
        return TrainResult(
            path, self.log.path, position.step, position.loss_average, interrupted_by
        )

    def _step_record(self, group: Group, facts: dict, seconds: float) -> dict:
        """What is logged and shown about one optimizer step."""
        run, position = self.run, self.position
        small = sum(batch.small for batch, _ in group)
        rates, effective_rates = learning_rates(run.optimizer)
        return {
            "step": position.step,
            "epoch": position.epoch,
            **({"lowres": small / len(group)} if run.options.sigma_lowres else {}),
            **facts,
            "loss_avg": position.loss_average,
            "lr": rates,
            "d_lr": effective_rates,
            "step_s": seconds,
            "images_per_s": sum(len(batch.items) for batch, _ in group) / seconds,
            "memory_mib": peak_memory_mib(run.device),
        }

    def _validate(self, per: str) -> None:
        """Compute, log and print the validation loss, if anything is held out."""
        options, position = self.run.options, self.position
        # Where validations decide when a run ends, a resumed one may not lack this one.
        decides = options.early_stop_patience
        stopped = None if decides else self.stop.is_due
        found = validate_or_skip(self.run, self.say, stopped)
        self._tell_saturated()
        if found is None:
            return
        loss = sum(found.values()) / len(found)
        self.log.validation(
            position.step, position.epoch, loss, position.loss_average, found, per=per
        )
        self.say(f"step {position.step}: validation loss {loss:.4f}")
        best = position.record_validation(loss, options.early_stop_min_delta)
        if best and options.early_stop_patience:
            with self.stop.saving():
                self.checkpoints.best()

    def _tell_saturated(self) -> None:
        """What float16 could not hold outside of a step, which counts its own."""
        if (saturation := self.run.dit.saturation) is not None:
            saturation.tell(self.say)

    def _make_previews(self, stage: str) -> None:
        """Render, log and name the previews of this moment, if there are prompts."""
        if self.previews is None:
            return
        files = self.previews.make(stage, say=self.say, stopped=self.stop.is_due)
        self._tell_saturated()
        if files:
            self.log.preview(self.position.step, self.position.last_epoch, files)
            what = "a preview" if len(files) == 1 else f"{len(files)} previews"
            self.say(f"{what} in {self.run.options.output_dir}/sample")


def is_due(count: int, every: int | None) -> bool:
    """Whether something done every `every` steps or epochs is due after `count` of them."""
    return every is not None and every != 0 and count % every == 0
