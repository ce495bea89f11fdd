"""`anima-fast watch` and the web server of its page: this machine only, reading only.

It listens on 127.0.0.1 and answers only requests that name this machine as their host, so that a
web page elsewhere cannot reach it through a name of its own that points here (DNS
rebinding). It serves the files of the page, one JSON answer, and the pictures in `OUT/sample`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socketserver
import sys
import threading
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from anima_fast import __version__
from anima_fast.errors import UserError
from anima_fast.reports.watch.run import WatchedRun

ADDRESS = "127.0.0.1"
# As other local tools use it; if one of them is running, the next free port is taken.
DEFAULT_PORT = 7860
PORTS_TRIED = 20
_OWN_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# An idle connection is closed.
_IDLE_S = 60


def page_files() -> dict[str, tuple[bytes, str]]:
    """The files of the page by path, as bytes with their type."""
    found = {
        f"/{file.name}": (file.read_bytes(), _TYPES[Path(file.name).suffix])
        for file in (files(__package__) / "page").iterdir()
        if Path(file.name).suffix in _TYPES
    }
    return {**found, "/": found["/index.html"]}


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = "HTTP/1.1"
    server_version = f"anima_fast/{__version__}"
    sys_version = ""
    timeout = _IDLE_S
    server: WatchServer

    def do_GET(self) -> None:
        """Answer with the page, the run, or a picture."""
        if not self._names_this_machine():
            self._refuse(HTTPStatus.FORBIDDEN, f"open http://{ADDRESS}:{self.server.port}/")
            return
        path, _, query = self.path.partition("?")
        try:
            path = unquote(path, errors="strict")
        except UnicodeDecodeError:
            path = ""
        found = self.server.page.get(path)
        if path == "/api/run":
            answer = self.server.run.answer(dict(parse_qsl(query)))
            text = json.dumps(answer, allow_nan=False, separators=(",", ":"))
            found = text.encode("utf-8"), "application/json"
        elif path.startswith("/sample/"):
            found = self.server.run.pictures.read(path.removeprefix("/sample/"))
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        else:
            self._send(*found)

    do_HEAD = do_GET

    def _names_this_machine(self) -> bool:
        """Whether the request was made to this machine by one of its own names, on any port.

        The port may differ: an ssh tunnel ends at another one.
        """
        hosts = self.headers.get_all("Host") or []
        return len(hosts) == 1 and _OWN_HOST.fullmatch(hosts[0].strip().lower()) is not None

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._send((text + "\n").encode("utf-8"), "text/plain; charset=utf-8", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        # One request a connection: no thread waits for a browser, no body is left unread.
        self.send_header("Connection", "close")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse_method(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method

    def log_message(self, *_: Any) -> None:
        """Print nothing: the console is for the address and for errors."""


class WatchServer(ThreadingHTTPServer):
    """Serves a run on 127.0.0.1; port 0 takes any free one, one that is taken raises `OSError`."""

    daemon_threads = True
    # A page with many pictures asks for them at once.
    request_queue_size = 128
    # On Windows the option would let two programs listen on one port.
    allow_reuse_address = os.name != "nt"
    allow_reuse_port = False

    def __init__(self, run: WatchedRun, port: int = DEFAULT_PORT) -> None:
        self.run = run
        self.page = page_files()
        super().__init__((ADDRESS, port), Handler)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server_address[1]

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.port}/"

    def server_bind(self) -> None:
        """Bind without asking the network for this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.port

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of an answer is not an error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def open_server(run: WatchedRun, port: int | None = None) -> WatchServer:
    """A server on `port`, or, when it is None, on the first free one from `DEFAULT_PORT` on.

    Raises `UserError` when the port is taken or not allowed.
    """
    tried = range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED) if port is None else [port]
    for number in tried:
        try:
            return WatchServer(run, number)
        except OSError as error:
            last = error
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                break
    if port is None:
        raise UserError(
            f"no free port from {tried[0]} to {tried[-1]} ({last.strerror}): give one with --port"
        )
    if last.errno == errno.EACCES:
        raise UserError(f"port {port} is not allowed: choose one from 1024 to 65535 with --port")
    raise UserError(
        f"port {port} is in use ({last.strerror}): choose another --port, or --port 0 for any "
        "free one"
    )


def watch(
    out: Path, *, port: int | None, open_browser: bool, say: Callable[[str], None] = print
) -> None:
    """Serve the page of a run until Ctrl-C; its output folder `out` may be created later.

    `port` is as `open_server` takes it, 0 means any. Raises `UserError` when `out` is a file, or
    when the port cannot be had.
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
