"""The training loop: one function that reads from the first step to the last.

    anima-fast train --pretrained_model_name_or_path=DIT --qwen3=DIR --vae=VAE \\
        --dataset_config=data.toml --output_dir=OUT --network_module=networks.lora_anima

Rectified flow: x = (1−σ)·x0 + σ·noise, target noise − x0, loss w(σ)·(v − target)². Every random
number of a micro-step (noise, σ, dropout masks) follows from (seed, step, micro-step) alone, and
the order of the batches from (seed, epoch), so a resumed run computes exactly what an uninterrupted
one would have.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anima_fast.console import ConsoleLog
from anima_fast.errors import UserError
from anima_fast.memory.free import peak_memory_mib
from anima_fast.models.flow import FlowSettings
from anima_fast.progress import Progress
from anima_fast.reports.run_page import report_run
from anima_fast.training.bad_batches import BadBatchTracker
from anima_fast.training.checkpoints import Checkpoints, remove_leftovers
from anima_fast.training.logs import RunLog
from anima_fast.training.oom import MemoryPolicies, one_line_out_of_memory
from anima_fast.training.optimizers.build import effective_rates, learning_rates, train_mode
from anima_fast.training.position import Position
from anima_fast.training.run import Run, TrainResult
from anima_fast.training.run_files import RunFile
from anima_fast.training.setup import choose_seed, prepare, resume_run, show_dataset, write_run_file
from anima_fast.training.signals import StopSignal
from anima_fast.training.state import resolve_resume, state_seed
from anima_fast.training.step import Group, forward_backward, optimizer_step
from anima_fast.training.validation import validate_or_skip

if TYPE_CHECKING:
    from anima_fast.options.run import TrainOptions


def train(options: TrainOptions) -> TrainResult | None:
    """Train a LoRA and save it.

    Args:
        options: the resolved options; `anima-fast train --help` lists them all.

    Returns:
        `TrainResult`: the LoRA file, `log.jsonl`, the number of optimizer steps made, the smoothed
        loss, and the signal number when Ctrl-C or SIGTERM ended the run early. None with
        `debug_dataset`, which lists the first epoch and trains nothing.

    Raises:
        UserError: for bad options, files or data, a full disk, or a run that stopped being finite.
    """
    state = resolve_resume(options.resume, options.output_dir, options.output_stem)
    saved_seed = state_seed(state) if state else None
    seed = choose_seed(options) if saved_seed is None else saved_seed
    folder = None if options.debug_dataset else options.output_dir
    console = ConsoleLog(folder, fresh=state is None)
    with console, one_line_out_of_memory(), Progress(options, log=console) as progress:
        if options.debug_dataset:
            show_dataset(options, seed, say=progress.say)
            return None
        if options.seed not in (None, seed):
            progress.say(f"the seed stays {seed}, that of the state; --seed is not used")
        if options.resume and state is None:
            progress.say("no resume state of this run is here: it starts from the beginning")
        remove_leftovers(options)
        # From here on the run's files say which it was.
        options = replace(options, seed=seed)
        # Ctrl-C while encoding ends the program at once: every finished cache file stays.
        run = prepare(options, seed=seed, say=progress.say)
        position = resume_run(run, state, say=progress.say) if state else Position()
        write_run_file(options)
        with (
            RunFile(run, position.step) as file,
            RunLog(options, first_step=position.step) as log,
            StopSignal() as stop,
        ):
            outcome = run_steps(run, position, log=log, progress=progress, stop=stop)
            file.finish(outcome)
        try:
            report_run(options, outcome)
        except UserError as error:
            # The LoRA is saved: a page that cannot be written is no failed run.
            progress.say(f"no report: {error}")
        return outcome


def run_steps(
    run: Run, position: Position, *, log: RunLog, progress: Progress, stop: StopSignal
) -> TrainResult:
    """Every step from `position` to the end of the run: the loop itself."""
    options, length, network = run.options, run.length, run.network
    settings = FlowSettings.from_options(options)
    bad_batches = BadBatchTracker(options)
    checkpoints = Checkpoints(run)

    def tell(text: str) -> None:
        progress.say(text)
        log.event(position.step, text)

    policies = MemoryPolicies(run, tell)
    network.train()
    train_mode(run.optimizer)
    previews = run.previews
    if previews and previews.due_at_first(position):
        log_previews(run, "000000", position, log, progress, stop)
    progress.start(position.step, length.steps)

    while position.step < length.steps:
        order = run.plan.epoch_batches(position.epoch, run.seed)
        batches = run.batches.iterate(
            order[position.batch :], epoch=position.epoch, first_step=position.batch
        )
        waiting, started = [], time.perf_counter()
        for batch in batches:
            waiting.append(batch)
            full = len(waiting) == length.accumulation
            if not full and position.batch + len(waiting) < len(order):
                continue

            # Forward and backward of each micro-batch; gradients add up in the flat buffer.
            try:
                group = forward_backward(run, waiting, settings, policies, step=position.step)
            except UserError:
                # Nothing of this step is done: whoever has a remedy can go on from here.
                if not getattr(options, "fused_backward_pass", False):
                    checkpoints.autosave(position)
                raise
            position.batch += len(waiting)

            # Clip, step, schedule, zero; then log, save, validate, and stop when asked to.
            facts = optimizer_step(run, group, bad_batches, say=progress.say)
            position.step += 1
            position.record_loss(facts["loss"], slots=length.updates_per_epoch)
            record = step_record(run, position, group, facts, time.perf_counter() - started)
            log.step(record)
            progress.step(record)
            if is_due(position.step, options.validate_every_n_steps):
                log_validation(run, settings, position, log, progress, checkpoints)
            checkpoints.after_step(position)
            if previews and previews.due_after_step(position.step):
                log_previews(run, f"{position.step:06d}", position, log, progress, stop)
            if stop.received or position.step >= length.steps:
                break
            if ends_early(run, position, log, progress):
                batches.close()
                return finish(run, position, checkpoints, log, progress)
            waiting, started = [], time.perf_counter()
        batches.close()

        if stop.received and position.step < length.steps:
            path = checkpoints.interrupted(position)
            progress.say(f"stopped by signal {stop.received}; saved {path.name} and a resume state")
            progress.say("go on with the same command and --resume auto")
            return result(position, path, log, interrupted_by=stop.received)
        if position.batch >= len(order):
            if options.validate_every_n_steps is None and is_due(
                position.epoch, options.validate_every_n_epochs or 1
            ):
                log_validation(run, settings, position, log, progress, checkpoints)
            log.epoch(position.step, position.epoch, position.loss_average)
            log.sigma_bins(position.step, position.epoch, run.sigma_bins.take())
            # A state saved here goes on with the next epoch.
            position.next_epoch()
            finished = position.epoch - 1
            checkpoints.after_epoch(position, finished_epoch=finished)
            if previews and previews.due_after_epoch(finished):
                log_previews(run, f"e{finished:06d}", position, log, progress, stop)
            if position.step < length.steps and ends_early(run, position, log, progress):
                break
    return finish(run, position, checkpoints, log, progress)


def step_record(
    run: Run,
    position: Position,
    group: Group,
    facts: dict,
    seconds: float,
) -> dict:
    """What is logged and shown about one optimizer step."""
    small = sum(batch.small for batch, _ in group)
    return {
        "step": position.step,
        "epoch": position.epoch,
        **({"lowres": small / len(group)} if run.options.sigma_lowres else {}),
        **facts,
        "loss_avg": position.loss_average,
        "lr": learning_rates(run.optimizer),
        "d_lr": effective_rates(run.optimizer),
        "step_s": seconds,
        "images_per_s": sum(len(batch.items) for batch, _ in group) / seconds,
        "memory_mib": peak_memory_mib(run.device),
    }


def finish(
    run: Run, position: Position, checkpoints: Checkpoints, log: RunLog, progress: Progress
) -> TrainResult:
    """Save the final file and name it."""
    log.sigma_bins(position.step, position.last_epoch, run.sigma_bins.take())
    path = checkpoints.final(position)
    progress.say(f"saved {path}")
    return result(position, path, log)


def is_due(count: int, every: int | None) -> bool:
    """Whether something done every `every` steps or epochs is due after `count` of them."""
    return bool(every) and count % every == 0


def log_validation(
    run: Run,
    settings: FlowSettings,
    position: Position,
    log: RunLog,
    progress: Progress,
    checkpoints: Checkpoints,
) -> None:
    """Compute, log and print the validation loss, if anything is held out."""
    found = validate_or_skip(run, settings, progress.say)
    if found is None:
        return
    average, options = position.loss_average, run.options
    log.validation(position.step, position.epoch, found.loss, average, found.per_sigma)
    progress.say(f"step {position.step}: validation loss {found.loss:.4f}")
    best = position.record_validation(found.loss, options.early_stop_min_delta)
    if best and options.early_stop_patience:
        checkpoints.best(position)


def ends_early(run: Run, position: Position, log: RunLog, progress: Progress) -> bool:
    """Whether the validation loss has stopped falling, which is said."""
    patience = run.options.early_stop_patience
    if not patience or position.stale < patience:
        return False
    text = f"stopped early: {position.stale} validations without a "
    if position.best_loss is None:
        text += "finite loss"
    else:
        text += (
            f"better loss than {position.best_loss:.4f} at step {position.best_step}, whose "
            f"weights are in {run.options.output_stem}-best.safetensors"
        )
    progress.say(text)
    log.event(position.step, text)
    return True


def log_previews(
    run: Run, stage: str, position: Position, log: RunLog, progress: Progress, stop: StopSignal
) -> None:
    """Render, log and name the previews of this moment."""
    files = run.previews.make(run, stage, say=progress.say, stopped=lambda: bool(stop.received))
    if files:
        log.preview(position.step, position.last_epoch, files)
        what = "a preview" if len(files) == 1 else f"{len(files)} previews"
        progress.say(f"{what} in {run.options.output_dir}/sample")


def result(
    position: Position, path: Path, log: RunLog, interrupted_by: int | None = None
) -> TrainResult:
    """The `TrainResult` of this run."""
    return TrainResult(path, log.path, position.step, position.loss_average, interrupted_by)
