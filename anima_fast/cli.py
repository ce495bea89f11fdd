"""The command line. Nothing heavy is imported before a command runs.

`anima-fast COMMAND --help` lists the options of each command. Bad input ends with one line on
stderr and exit status 2, an interrupt with 130.
"""

from __future__ import annotations

import importlib
import sys

from anima_fast.bench.commands import bench
from anima_fast.commands.app import app

# In the order of the help page.
for theme in (
    "train",
    "watch",
    "migrate",
    "presets",
    "dataset",
    "sample",
    "files",
    "networks",
    "machine",
):
    importlib.import_module(f"anima_fast.commands.{theme}")
app.add_typer(bench)


def main() -> None:
    """The entry of the `anima-fast` script."""
    # A pipe or an old console may use another encoding than the paths and captions that are shown.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="anima-fast")
