"""What `anima-fast watch` does: check the folder, open the port, say where, serve."""

from __future__ import annotations

import os
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

from anima_fast.errors import UserError
from anima_fast.reports.watch.run import WatchedRun
from anima_fast.reports.watch.server import DEFAULT_PORT, WatchServer, open_server


def watch(
    out: Path, *, port: int | None, open_browser: bool, say: Callable[[str], None] = print
) -> None:
    """Serve the page of a run until Ctrl-C.

    Args:
        out: the run's output folder; it may be made later.
        port: None for the default one or the next that is free, 0 for any.
        open_browser: show the page in the system's browser.
        say: takes each line for the console.

    Raises:
        UserError: `out` is a file, or the port cannot be had.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give the output folder of the run ({out.parent})")
    with open_server(WatchedRun(out), port) as server:
        for line in greeting(out, port, server):
            say(line)
        if open_browser:
            # A browser in the terminal returns only when it is closed.
            threading.Thread(target=show, args=(server.url, say), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            # The way to end it.
            return


def show(url: str, say: Callable[[str], None]) -> None:
    """Open the page in the system's browser, or say that there is none."""
    if not webbrowser.open(url):
        say("no browser could be opened: open the address yourself")


def greeting(out: Path, port: int | None, server: WatchServer) -> list[str]:
    """The lines printed at the start."""
    lines = [f"watching {out}: {server.url} (Ctrl-C ends it, the run goes on)"]
    if not out.is_dir():
        lines.append(f"{out} does not exist yet: the page waits for a run")
    elif not (out / "console.log").exists() and (below := list(out.glob("*/log.jsonl"))):
        newest = max(below, key=lambda path: path.stat().st_mtime).parent
        lines.append(f"{out} holds no run yet, but {newest} does")
    if port is None and server.port != DEFAULT_PORT:
        lines.append(f"port {DEFAULT_PORT} is in use, {server.port} is not")
    if os.environ.get("SSH_CONNECTION"):
        tunnel = f"ssh -L {server.port}:127.0.0.1:{server.port} HOST"
        lines.append(f"from your own machine: {tunnel}, then open the same address there")
    return lines
