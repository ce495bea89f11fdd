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
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from anima_fast.console import ConsoleLog
from anima_fast.data.batches import Batch, in_steps
from anima_fast.errors import UserError
from anima_fast.files import write_text
from anima_fast.measure.arithmetic import sums_of_run
from anima_fast.options.files import to_toml
from anima_fast.progress import Progress
from anima_fast.reports.run_page import report_run
from anima_fast.training.arithmetic import FORMER
from anima_fast.training.bad_batches import BadBatchTracker, fault_of_files
from anima_fast.training.checkpoints import remove_leftovers, without_effect
from anima_fast.training.events import Events
from anima_fast.training.kind import AnyOptions, given
from anima_fast.training.logs import RunFile, RunLog
from anima_fast.training.oom import MemoryPolicies, one_line_out_of_memory
from anima_fast.training.optimizers.build import train_mode
from anima_fast.training.previous import ahead, notice, set_aside
from anima_fast.training.run import Position, Run, TrainResult
from anima_fast.training.setup import choose_seed, prepare, show_dataset
from anima_fast.training.state import load_state
from anima_fast.training.state_files import resolve_resume, state_record
from anima_fast.training.step import forward_backward, optimizer_step
from anima_fast.training.stopping import StopSignal

# Where `--resume auto` finds the state of a run that differs.
OTHER_WAYS = (
    "or give another --output_name, --resume and the path of another state, or no --resume: a new "
    "run moves the old one aside"
)


def train(options: AnyOptions) -> TrainResult | None:
    """Train a LoRA, or the whole model, and save it.

    Args:
        options: the resolved options; `anima-fast train --help` lists them all.

    Returns:
        `TrainResult`: the saved file, `log.jsonl`, the number of optimizer steps made, the smoothed
        loss, and the signal number when one ended the run early. None with
        `debug_dataset`, which lists the first epoch and trains nothing.

    Raises:
        Stopped: a signal came before the first step, or again after `ONE_STOP_SECONDS`.
        UserError: for bad options, files or data, a full disk, or a run that stopped being finite
            or made no step; its `status` is 3 once the loop has begun.
    """
    state = resolve_resume(options.resume, options.output_dir, options.output_stem)
    saved = state_record(state) if state else None
    seed = choose_seed(options.seed) if saved is None else saved["seed"]
    folder = None if options.debug_dataset else options.output_dir
    console = ConsoleLog(folder, fresh=state is None)
    progress = Progress(simple=options.console_log_simple, log=console)
    stop = StopSignal(progress.say)
    with console, one_line_out_of_memory(), progress, sums_of_run(), stop:
        if options.debug_dataset:
            show_dataset(options, seed, say=progress.say)
            return None
        if options.seed not in (None, seed):
            progress.say(f"the seed stays {seed}, that of the state; --seed is not used")
        if options.resume and state is None:
            progress.say("no resume state of this run is here: it starts from the beginning")
        if state is None and (line := notice(options)):
            progress.say(line)
        remove_leftovers(options)
        for line in without_effect(options):
            progress.say(line)
        # From here on the run's files say which it was.
        options = replace(options, seed=seed)
        # A signal while encoding ends the program at once: every finished cache file stays.
        arithmetic = None if saved is None else saved.get("arithmetic", FORMER)
        run = prepare(options, seed=seed, say=progress.say, saved=arithmetic)
        position = Position()
        if state:
            try:
                position = load_state(state, run, say=progress.say)
            except UserError as error:
                if options.resume != "auto":
                    raise
                raise UserError(f"{error}; {OTHER_WAYS}") from None
            check_end(state, position, run)
            progress.say(f"resumed from {state.name} at step {position.step}")
            if line := ahead(options, run.id, position.step):
                progress.say(line)
        set_aside(options, run.id, fresh=state is None, say=progress.say)
        # `--config_file NAME.toml` repeats the run; what `auto` was is in run.json and the files.
        write_text(run.folder / f"{options.output_stem}.toml", to_toml(options))
        with (
            RunFile(run, position.step) as file,
            RunLog(run.folder, run.options, first_step=position.step) as log,
        ):
            events = Events(run, position, log=log, progress=progress, stop=stop)
            try:
                outcome = run_steps(run, position, events)
            except UserError as error:
                error.status = 3
                raise
            file.finish(outcome)
        save_report(run, outcome, say=progress.say)
        return outcome


def check_end(state: Path, position: Position, run: Run) -> None:
    """Refuse a state of more steps than the run has."""
    if position.step > run.length.steps:
        raise UserError(
            f"{state} is at step {position.step}, this run has {run.length.steps}: "
            f"raise {longer(run.options)} to go on"
        )


def longer(options: AnyOptions) -> str:
    """The option that gives a run more steps, and its value."""
    name = "max_train_epochs" if options.max_train_epochs else "max_train_steps"
    return f"--{name} (now {getattr(options, name)})"


def run_steps(run: Run, position: Position, events: Events) -> TrainResult:
    """Every step from `position` to the end of the run: the loop itself."""
    options, length, stop = run.options, run.length, events.stop
    bad_batches = BadBatchTracker(
        options.max_bad_batches,
        precision=options.mixed_precision,
        learning_rate=options.learning_rate,
        # A state of an older version only has the losses.
        made=position.made or len(position.losses),
        base_fault=partial(
            fault_of_files,
            (options.pretrained_model_name_or_path, options.llm_adapter_path),
            run.dit.dtype,
        ),
    )
    policies = MemoryPolicies(run, events.tell)
    run.network.train()
    train_mode(run.optimizer)
    events.start()
    if position.step >= length.steps:
        # The file is written again: a kill may have come between the last state and it.
        events.say(f"all {length.steps} steps are done: raise {longer(options)} to go on")
    while position.step < length.steps:
        if stop.received:
            return events.interrupted()
        order = run.plan.epoch_batches(position.epoch, run.seed)
        started = time.perf_counter()
        for batches, wait_s in step_batches(run, order, position):
            # Noise, σ, forward and backward of each micro-batch; gradients add up.
            try:
                group = forward_backward(run, batches, policies, step=position.step)
            except UserError:
                # This step has changed nothing: with a remedy the run can go on from here.
                if not run.training.updates_in_backward:
                    events.autosave()
                raise
            # Clip, step, schedule, zero.
            facts = optimizer_step(run, group, bad_batches, say=events.say)
            position.made = bad_batches.made
            position.advance(len(batches), facts["loss"], slots=length.updates_per_epoch)
            # Log, validate, save, preview.
            facts["wait_s"] = wait_s
            events.after_step(group, facts, time.perf_counter() - started)
            if stop.received or position.step >= length.steps:
                break
            if events.ends_early():
                return events.finished()
            started = time.perf_counter()

        if stop.received and position.step < length.steps:
            return events.interrupted()
        if position.batch >= len(order):
            events.after_epoch()
            if position.step < length.steps and events.ends_early():
                break
    return events.finished()


def step_batches(
    run: Run, order: list[list[int]], position: Position
) -> Iterator[tuple[list[Batch], float]]:
    """The rest of an epoch: the micro-batches of each step, and the seconds it waited for them.

    `order` has all batches of the epoch, as indices of images.
    """
    loader = run.batches.iterate(
        order[position.batch :], epoch=position.epoch, first_step=position.batch
    )
    # Closing it ends the thread that loads ahead.
    with closing(loader):
        yield from in_steps(loader, run.length.accumulation)


def save_report(run: Run, outcome: TrainResult, *, say: Callable[[str], None]) -> None:
    """Write the page of a run that has ended; one that cannot be written does not make it fail."""
    options = run.options
    try:
        report_run(
            options.output_stem,
            kind=run.training.name,
            facts=run.training.facts,
            base_model=given(options.pretrained_model_name_or_path),
            optimizer=options.optimizer_type,
            precision=run.training.arithmetic.text,
            output=outcome.output,
            log=outcome.log,
            steps=outcome.steps,
            loss=outcome.loss,
            interrupted_by=outcome.interrupted_by,
        )
    except UserError as error:
        say(f"no report: {error}")
