"""Commands about this machine: `download`, `doctor` and `demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from anima_fast.commands.app import MACHINE, app


@app.command("download", rich_help_panel=MACHINE)
def _download(
    dit: Annotated[
        str, typer.Option(help="Release of the DiT, or its file name in the repository.")
    ] = "base-v1.0",
    models_dir: Annotated[
        Path | None, typer.Option("--models_dir", "--models-dir", help="Folder to fill.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the known DiT releases.")] = False,
    tokenizers_only: Annotated[
        bool, typer.Option("--tokenizers_only", "--tokenizers-only", help="Only the tokenizers.")
    ] = False,
) -> None:
    """Fetch the published model files and tokenizers, then print the train command to use."""
    from anima_fast.models.download import DIT_RELEASES, download_models, train_command

    if list_only:
        typer.echo("\n".join(f"{name:16} {file}" for name, file in DIT_RELEASES.items()))
        return
    found = download_models(models_dir, dit=dit, tokenizers_only=tokenizers_only, say=typer.echo)
    if not tokenizers_only:
        typer.echo("\n" + train_command(found))


@app.command("doctor", rich_help_panel=MACHINE)
def _doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    models_dir: Annotated[
        Path | None, typer.Option("--models_dir", "--models-dir", help="Models folder.")
    ] = None,
) -> None:
    """Report what this machine has and what missing pieces would bring."""
    from anima_fast.inspection.doctor import doctor_text, examine

    report = examine(models_dir)
    text = json.dumps(report, indent=1, ensure_ascii=False) if as_json else doctor_text(report)
    typer.echo(text)
    raise typer.Exit(0 if report["can_train"] else 1)


@app.command("demo", rich_help_panel=MACHINE)
def _demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to fill.")] = Path("demo_output"),
) -> None:
    """Train a tiny random model on photographs, end to end, and write a report."""
    from anima_fast.demo.run import run_demo

    run_demo(out)
