"""Length, memory, optimizer, schedule, noise and loss of diffusion-pipe as our options."""

from __future__ import annotations

from typing import Any

from anima_fast.migrate.diffusion_pipe_tables import DTYPES
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.optimizers import DIFFUSION_PIPE, Known, argument_words
from anima_fast.migrate.values import is_off

# Where its cosine ends.
LOWEST_RATE = 1e-6


def convert_length(ledger: Ledger, examples_a_step: int) -> None:
    """Epochs, steps, and how often is saved."""
    if ledger.has("max_steps"):
        ledger.take("max_steps", "max_train_steps", int(ledger.number("max_steps")))
        if ledger.has("epochs"):
            ledger.drop("epochs", "max_steps ends the run; max_train_epochs would beat it here")
    elif ledger.has("epochs"):
        why = "a batch that is not full ends an epoch here, and is left out there"
        ledger.change("epochs", "max_train_epochs", int(ledger.number("epochs")), why)
    if ledger.has("save_every_n_examples"):
        steps = max(1, int(ledger.number("save_every_n_examples")) // examples_a_step)
        ledger.change("save_every_n_examples", "save_every_n_steps", steps, "counted in steps here")
    if ledger.has("checkpoint_every_n_epochs"):
        why = "a resume state comes with every saved file"
        ledger.change("checkpoint_every_n_epochs", "save_state", True, why)


def convert_memory(ledger: Ledger) -> None:
    """Checkpointing and the types of numbers."""
    key = "activation_checkpointing"
    value = ledger.get(key)
    if value == "unsloth" and not is_off(ledger.get("blocks_to_swap")):
        why = "blocks_to_swap does not go with offloaded checkpoints"
        ledger.change(key, "gradient_checkpointing", True, why)
    elif value == "unsloth":
        ledger.take(key, "unsloth_offload_checkpointing", True)
    elif not is_off(value):
        ledger.take(key, "gradient_checkpointing", True)
    elif ledger.has(key):
        ledger.drop(key, "it is off")
    _dtype(ledger, "model.dtype", "mixed_precision", {})
    _dtype(ledger, "save_dtype", "save_precision", {"no": "float"})
    for key in ("model.transformer_dtype", "model.diffusion_model_dtype"):
        if ledger.has(key):
            same = ledger.get(key) == ledger.get("model.dtype")
            why = "8-bit base weights are not supported: blocks_to_swap saves memory"
            ledger.drop(key, "as model.dtype" if same else why)


def _dtype(ledger: Ledger, key: str, option: str, names: dict[str, str]) -> None:
    if not ledger.has(key):
        return
    name = DTYPES.get(str(ledger.get(key)))
    if name is None:
        ledger.drop(key, "this type does not exist here")
    else:
        ledger.take(key, option, names.get(name, name))


def convert_optimizer(ledger: Ledger, examples_a_step: int, command: str) -> None:
    """[optimizer]: the name, the rate, and the arguments that the optimizer takes here."""
    kind = str(ledger.get("optimizer.type", "adamw_optimi"))
    known = DIFFUSION_PIPE.get(kind.lower())
    if known is None:
        known = _other_optimizer(ledger, kind)
    elif ledger.has("optimizer.type") and known.why:
        ledger.change("optimizer.type", "optimizer_type", known.name, known.why)
    elif ledger.has("optimizer.type"):
        ledger.take("optimizer.type", "optimizer_type", known.name)
    if ledger.has("optimizer.lr") and "learning_rate" in ledger.options:
        ledger.drop("optimizer.lr", "force_constant_lr beats it")
    elif ledger.has("optimizer.lr"):
        ledger.take("optimizer.lr", "learning_rate", ledger.number("optimizer.lr"))
    _gradient_release(ledger, command)
    _arguments(ledger, known, examples_a_step)


def _other_optimizer(ledger: Ledger, kind: str) -> Known:
    """A type without a name here: two of its own, or one of the package pytorch-optimizer."""
    if kind.lower() in ("automagic", "genericoptim"):
        why = f"{kind} exists in diffusion-pipe only"
        ledger.change("optimizer.type", "optimizer_type", "AdamW", why)
        ledger.todo.append(f"choose learning_rate for AdamW: {kind} does not exist here")
        return Known("AdamW")
    name = f"pytorch_optimizer.{kind}"
    ledger.change("optimizer.type", "optimizer_type", name, "where diffusion-pipe takes it from")
    ledger.todo.append(f"install the package of {name}: pip install pytorch-optimizer")
    return Known(name, accepts=("*",))


def _gradient_release(ledger: Ledger, command: str) -> None:
    key = "optimizer.gradient_release"
    if not ledger.has(key):
        return
    several = ledger.number("gradient_accumulation_steps", 1) > 1
    if is_off(ledger.get(key)):
        ledger.drop(key, "it is off")
    elif command == "train":
        ledger.drop(key, "a LoRA's gradients are small")
    elif several:
        ledger.drop(key, "it does not go with gradient_accumulation_steps here")
        ledger.todo.append("see with --plan_memory whether it fits without gradient_release")
    else:
        ledger.take(key, "fused_backward_pass", True)


def _arguments(ledger: Ledger, known: Known, examples_a_step: int) -> None:
    arguments: dict[str, Any] = dict(known.defaults)
    for key in ledger.open_keys("optimizer."):
        name, value = key.removeprefix("optimizer."), ledger.get(key)
        if name == "betas" and known.betas and isinstance(value, list):
            arguments["betas"] = [float(v) for v in value][: known.betas]
            ledger.take_elsewhere(key, "optimizer_args betas")
        elif name == "beta2_half_life" and known.betas:
            beta2 = 0.5 ** (examples_a_step / max(ledger.number(key), 1e-9))
            first = next(iter(arguments.get("betas", (0.9, 0.999))))
            arguments["betas"] = [first, round(beta2, 6)]
            why = f"beta2 = 0.5 ^ ({examples_a_step} images a step / half-life)"
            ledger.change(key, None, None, f"{beta2:.6f} in optimizer_args betas: {why}")
        elif name in ("eps", "weight_decay", *known.accepts) or "*" in known.accepts:
            arguments[name] = value
            ledger.take_elsewhere(key, f"optimizer_args {name}")
        else:
            ledger.drop(key, f"{known.name} has no such argument")
    if arguments:
        why = "its arguments there, its own defaults included"
        ledger.put("optimizer_args", argument_words(arguments), why)


def convert_schedule(ledger: Ledger) -> None:
    """The curve of the rate; settles force_constant_lr, so it comes before the optimizer."""
    warmup = int(ledger.number("warmup_steps"))
    kind, rate = str(ledger.get("lr_scheduler", "constant")), ledger.number("optimizer.lr")
    if ledger.has("force_constant_lr"):
        why = "it beats the optimizer's rate and every schedule"
        forced = ledger.number("force_constant_lr")
        ledger.change("force_constant_lr", "learning_rate", forced, why)
        kind, warmup = "constant", 0
    if ledger.has("warmup_steps") and warmup:
        ledger.take("warmup_steps", "lr_warmup_steps", warmup)
    elif ledger.has("warmup_steps"):
        ledger.drop("warmup_steps", "there is no warm-up")
    ours, why = kind, ""
    if kind == "constant" and warmup:
        ours, why = "constant_with_warmup", "constant has no warm-up here"
    elif kind == "cosine" and rate > LOWEST_RATE:
        ours, why = "cosine_with_min_lr", f"its cosine ends at a rate of {LOWEST_RATE:g}"
        ratio = round(LOWEST_RATE / rate, 6)
        ledger.add("lr_scheduler_min_lr_ratio", ratio, "the end of its cosine")
    if ledger.has("lr_scheduler") and (why or ours != ledger.get("lr_scheduler")):
        ledger.change("lr_scheduler", "lr_scheduler", ours, why or "force_constant_lr beats it")
    elif ledger.has("lr_scheduler"):
        ledger.take("lr_scheduler")
    elif why:
        ledger.add("lr_scheduler", ours, why)


def convert_noise(ledger: Ledger) -> None:
    """How the noise level is drawn."""
    method = str(ledger.get("model.timestep_sample_method", "logit_normal"))
    shift, flux = ledger.number("model.shift"), bool(ledger.get("model.flux_shift"))
    uniform = method == "uniform"
    sampling, why = "uniform" if uniform else "sigmoid", ""
    if shift and uniform:
        sampling, why = "sigma", "a shifted uniform draw has this name here"
    elif shift:
        sampling, why = "shift", "with model.shift it has this name here"
    elif flux:
        sampling = "flux_shift"
        why = "of a logit-normal draw: a uniform one has no such shift here" if uniform else ""
    key = "model.timestep_sample_method"
    if ledger.has(key) and why:
        ledger.change(key, "timestep_sampling", sampling, why)
    elif ledger.has(key):
        ledger.take(key, "timestep_sampling", sampling)
    else:
        ledger.add("timestep_sampling", sampling, "its default" + (f"; {why}" if why else ""))
    if ledger.has("model.shift") and shift:
        ledger.take("model.shift", "discrete_flow_shift", shift)
    elif ledger.has("model.shift"):
        ledger.drop("model.shift", "it is off")
    if ledger.has("model.flux_shift"):
        used = "timestep_sampling" if sampling == "flux_shift" else ""
        if used:
            ledger.take("model.flux_shift", used, sampling)
        else:
            ledger.drop("model.flux_shift", "model.shift beats it" if flux else "it is off")
    if ledger.has("model.sigmoid_scale") and uniform:
        ledger.drop("model.sigmoid_scale", "it has no effect on a uniform draw")
    elif ledger.has("model.sigmoid_scale"):
        scale = ledger.number("model.sigmoid_scale", 1.0)
        ledger.take("model.sigmoid_scale", "sigmoid_scale", scale)


def convert_loss(ledger: Ledger) -> None:
    """Losses other than the mean square."""
    losses = {
        "pseudo_huber_c": ("huber", "the same curve, 2c times as high"),
        "huber_delta": ("huber", "a smooth form of it, with the same threshold"),
        "smooth_l1_beta": ("smooth_l1", "a smooth form of it, with the same threshold"),
    }
    for key, (kind, why) in losses.items():
        if not ledger.has(key):
            continue
        if is_off(ledger.get(key)) or "loss_type" in ledger.options:
            ledger.drop(key, "it is off" if is_off(ledger.get(key)) else "another loss is chosen")
            continue
        ledger.change(key, "huber_c", ledger.number(key), f"{why}; loss_type = {kind}")
        ledger.put("loss_type", kind, f"{key} chooses it")
        ledger.put("huber_schedule", "constant", f"{key} is one threshold for all")
