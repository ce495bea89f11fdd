"""The command line. Nothing heavy is imported before a command runs.

`anima-fast COMMAND --help` lists the options of each command. Bad input ends with one line on
stderr and exit status 2, an interrupt with 130.
"""

from __future__ import annotations

import sys

from anima_fast.commands import dataset, files, machine, migrate, sample, train  # noqa: F401 - each registers its commands
from anima_fast.commands.app import MACHINE, app
from anima_fast.commands.bench import bench
from anima_fast.commands.parity import parity

app.add_typer(parity, rich_help_panel=MACHINE)
app.add_typer(bench, rich_help_panel=MACHINE)


def main() -> None:
    """The entry of the `anima-fast` script."""
    # A pipe or an old console may use another encoding than the paths and captions that are shown.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="anima-fast")
