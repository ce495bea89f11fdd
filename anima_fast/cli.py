"""The command line. Nothing heavy is imported before a command runs.

`anima-fast COMMAND --help` lists the options of each command. Bad input ends with one line on
stderr and exit status 2, an interrupt with 130.
"""

from __future__ import annotations

import importlib
import sys

from anima_fast.commands.app import app
from anima_fast.commands.bench import bench

# Panels of the help page and the modules of `commands` in them, in its order.
PANELS = {
    "Prepare and train": ("dataset", "migrate", "presets", "train", "watch"),
    "Use": ("sample", "files", "networks"),
    "This machine": ("machine",),
}
for panel, themes in PANELS.items():
    for theme in themes:
        known = len(app.registered_commands)
        importlib.import_module(f"anima_fast.commands.{theme}")
        for command in app.registered_commands[known:]:
            command.rich_help_panel = panel
app.add_typer(bench, rich_help_panel="This machine")


def main() -> None:
    """The entry of the `anima-fast` script."""
    # A pipe or an old console may use another encoding than the paths and captions that are shown.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(prog_name="anima-fast")
