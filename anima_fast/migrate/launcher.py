"""What stands before a script: the environment, and the options of accelerate and its like."""

from __future__ import annotations

from anima_fast.migrate.command import Launch
from anima_fast.migrate.ledger import Ledger
from anima_fast.migrate.sd_scripts_tables import DEEPSPEED, LAUNCHER, LAUNCHER_REST


def settle_launch(launch: Launch, ledger: Ledger) -> None:
    """Settle the keys `STARTER --option` and `environment NAME` of a ledger."""
    for name, value in launch.launcher.items():
        key = f"{launch.starter} {name}"
        if name in ("--gpu_ids", "--gpu-ids") and value.isdigit():
            ledger.change(key, "device", f"cuda:{value}", "the device is an option here")
        elif name == "--cpu":
            ledger.change(key, "device", "cpu", "the device is an option here")
        elif "deepspeed" in name or "fsdp" in name or "zero" in name:
            ledger.drop(key, DEEPSPEED)
        else:
            ledger.drop(
                key, LAUNCHER.get(name.replace("-", "_").replace("__", "--", 1), LAUNCHER_REST)
            )
    several = str(launch.launcher.get("--num_processes", "1"))
    if several.isdigit() and int(several) > 1:
        ledger.todo.append(
            f"{several} devices saw {several} batches a step there: for the same, multiply "
            f"gradient_accumulation_steps by {several}"
        )
    for name in launch.environment:
        ledger.drop(f"environment {name}", "set it before the command here, in the same way")
