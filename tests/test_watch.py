"""`anima-fast watch`: the command, and what its server gives to whom."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from PIL import Image
from typer.testing import CliRunner
from watch_run import FakeRun

from anima_fast.cli import app
from anima_fast.errors import UserError
from anima_fast.reports.watch import server as server_module
from anima_fast.reports.watch.run import WatchedRun
from anima_fast.reports.watch.server import WatchServer, open_server, page_files

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "anima_fast" / "reports" / "watch" / "page"


@contextmanager
def serving(out, port=0):
    """A server on a thread."""
    with WatchServer(WatchedRun(out), port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path, method="GET", headers=None, host=None):
    """Status, headers and body of one request, its path sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    hosts = [f"127.0.0.1:{server.port}"] if host is None else host
    for name, value in [("Host", one) for one in hosts] + list((headers or {}).items()):
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def test_the_page_is_served_to_this_machine_only(tmp_path):
    with serving(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        for path, (content, kind) in page_files().items():
            status, headers, body = ask(server, path)
            assert (status, body, headers["Content-Type"]) == (200, content, kind)
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Content-Type-Options"] == "nosniff"
            policy = headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy and "object-src 'none'" in policy
            assert "unsafe" not in policy and "*" not in policy
        assert {path.name for path in PAGE.iterdir()} <= {p[1:] for p in page_files()}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (["127.0.0.1"], 200), (["localhost:9000"], 200), (["LOCALHOST"], 200),
        (["[::1]:7860"], 200), (["evil.example"], 403), (["127.0.0.1.evil.example"], 403),
        (["localhost.evil.example"], 403),
        (["evil.example:127"], 403), (["localhost:x"], 403), (["localhost@evil.example"], 403),
        (["192.168.0.7:7860"], 403), (["0.0.0.0"], 403), ([""], 403), ([], 403),
        (["127.0.0.1", "evil.example"], 403), (["[::1"], 403), (["[::2]"], 403),
    ],
)  # fmt: skip
def test_only_own_names_of_this_machine_are_answered(tmp_path, host, status):
    FakeRun(tmp_path).run_file()
    with serving(tmp_path) as server:
        for path in ("/", "/api/run"):
            found, _, body = ask(server, path, host=host)
            assert found == status
            assert (b"mika" in body) == (status == 200 and path != "/")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(tmp_path, method):
    with serving(tmp_path) as server:
        status, headers, _ = ask(server, "/api/run", method=method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_has_no_body(tmp_path):
    with serving(tmp_path) as server:
        status, headers, body = ask(server, "/", method="HEAD")
        assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 100


def test_pictures_are_served_whole(tmp_path):
    run = FakeRun(tmp_path)
    run.preview()
    Image.new("RGB", (4, 4)).save(run.out / "sample" / "ü 100% #1?.webp")
    with serving(tmp_path) as server:
        for path in (run.out / "sample").iterdir():
            status, headers, body = ask(server, f"/sample/{quote(path.name)}?v=1")
            assert (status, body) == (200, path.read_bytes())
            assert headers["Content-Type"] == f"image/{path.suffix[1:]}"


@pytest.mark.parametrize(
    "path",
    [
        "/sample/../run.json", "/sample/..%2frun.json", "/sample/%2e%2e/run.json",
        "/sample/..%5crun.json", "/sample/../../secret.png", "/sample/%2e%2e%2f%2e%2e%2fsecret.png",
        "/sample/..\\..\\secret.png", "/sample/SECRET", "/sample//etc/passwd", "//etc/passwd",
        "/sample/sub/inner.png", "/sample/sub%2finner.png", "/sample/.hidden.png",
        "/sample/notes.txt", "/sample/outside.png", "/sample/folder.png", "/sample/a.png%00.txt",
        "/sample/a.png::$DATA", "/sample/", "/sample", "/sample/a%FF.png", "/run.json",
        "/log.jsonl", "/page/index.html", "/server.py", "/../server.py", "http://evil.example/",
        "/sample/absent.png", "/sample/dangling.png",
    ],
)  # fmt: skip
def test_nothing_else_is_served(tmp_path, path):
    out, sample = tmp_path / "out", tmp_path / "out" / "sample"
    (sample / "sub").mkdir(parents=True)
    (sample / "folder.png").mkdir()
    secret = tmp_path / "secret.png"
    Image.new("RGB", (2, 2)).save(secret)
    for name in ("a.png", ".hidden.png", "sub/inner.png"):
        Image.new("RGB", (2, 2)).save(sample / name)
    for name in ("sample/notes.txt", "run.json", "log.jsonl"):
        (out / name).write_text("{}")
    if hasattr(os, "symlink") and os.name != "nt":
        (sample / "outside.png").symlink_to(secret)
        (sample / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    with serving(out) as server:
        status, _, body = ask(server, path.replace("SECRET", quote(str(secret), safe="")))
        assert status == 404 and b"PNG" not in body
        shown = json.loads(ask(server, "/api/run")[2])["pictures"]["pictures"]
        assert [one["name"] for one in shown] == ["a.png"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_sample_folder_that_leads_out_is_not_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "out" / "sample").symlink_to(tmp_path / "elsewhere")
    with serving(tmp_path / "out") as server:
        assert ask(server, "/sample/a.png")[0] == 404
        assert json.loads(ask(server, "/api/run")[2])["pictures"]["pictures"] == []


def test_a_link_inside_the_folder_is_followed(tmp_path):
    (tmp_path / "sample").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "sample" / "a.png")
    try:
        (tmp_path / "sample" / "newest.png").symlink_to("a.png")
    except OSError:
        pytest.skip("links need rights on Windows")
    with serving(tmp_path) as server:
        assert ask(server, "/sample/newest.png")[0] == 200


def test_ports(tmp_path, monkeypatch):
    with open_server(WatchedRun(tmp_path), 0) as taken:
        assert taken.port > 0
        with pytest.raises(UserError, match=rf"port {taken.port} is in use.*--port 0"):
            open_server(WatchedRun(tmp_path), taken.port)
        monkeypatch.setattr("anima_fast.reports.watch.server.DEFAULT_PORT", taken.port)
        with open_server(WatchedRun(tmp_path)) as found:
            assert taken.port < found.port <= taken.port + 20
        monkeypatch.setattr("anima_fast.reports.watch.server.PORTS_TRIED", 1)
        with pytest.raises(UserError, match=r"no free port.*--port"):
            open_server(WatchedRun(tmp_path))


def test_what_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 5 6.7.8.9 22")
    opened, said = [], []
    monkeypatch.setattr(server_module.webbrowser, "open", lambda url: opened.append(url))
    with open_server(WatchedRun(tmp_path), 0) as server:
        lines = server_module.greeting(tmp_path, None, server)
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "log.jsonl").touch()
        assert f"but {tmp_path / 'b'} does" in server_module.greeting(tmp_path, None, server)[1]
        server_module.show(server.url, said.append)
    assert server.url in lines[0]
    assert "7860 is in use" in lines[1]
    assert f"ssh -L {server.port}:127.0.0.1:{server.port}" in lines[2]
    assert opened == [server.url] and "open the address yourself" in said[0]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["FILE"], 2, "is a file: give the output folder"),
        (["OUT", "--port", "TAKEN"], 2, "is in use"),
        (["OUT", "--port", "70000"], 2, "65535"),
        (["OUT", "--port", "http"], 2, "port"),
        ([], 2, "OUT"),
    ],
)
def test_bad_input(tmp_path, words, status, text):
    (tmp_path / "log.jsonl").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {"OUT": tmp_path, "FILE": tmp_path / "log.jsonl", "TAKEN": taken.getsockname()[1]}
        done = CliRunner().invoke(app, ["watch", *(str(names.get(w, w)) for w in words)])
    assert done.exit_code == status and text in done.output
    assert "Traceback" not in done.output


@pytest.mark.skipif(os.name == "nt", reason="sends the signal of Ctrl-C")
def test_the_command_says_where_it_is_and_ends_quietly(tmp_path):
    out = tmp_path / "not yet"
    words = [sys.executable, "-m", "anima_fast", "watch", str(out), "--port", "0"]
    environment = {**os.environ, "SSH_CONNECTION": "", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
        assert "does not exist yet" in process.stdout.readline()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/api/run?" + urlencode({"row": "0"}))
        assert json.loads(connection.getresponse().read())["state"]["name"] == "waiting"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, rest, errors) == (0, "", "")


def test_the_page_needs_nothing_from_elsewhere_and_is_packaged():
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`]*", text)
        assert set(links) <= {"http://www.w3.org/2000/svg"}, path.name
        # The content security policy would not run these.
        assert not re.search(r"\son\w+=|\sstyle=|<script>|<style>|javascript:", text), path.name
    packaged = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"anima_fast.reports.watch" = ["page/*"]' in packaged
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    scripts = "\n".join(p.read_text(encoding="utf-8") for p in PAGE.glob("*.js"))
    ids = set(re.findall(r'\bid="([\w-]+)"', html))
    asked = set(re.findall(r'(?:byId|getElementById|say)\("([\w-]+)"', scripts))
    assert asked and asked <= ids
