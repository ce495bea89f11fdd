"""`anima-fast download` against a local stand-in of the hub, in processes of their own."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from anima_fast.errors import UserError
from anima_fast.models.download import (
    DIT_RELEASES,
    TOKENIZERS,
    Downloaded,
    dit_file,
    fetch,
    train_command,
)

ROOT = Path(__file__).parent.parent
ANIMA = "circlestone-labs/Anima"
MODEL = save({"w": torch.arange(200_000, dtype=torch.float32)})


def hub_files() -> dict[str, bytes]:
    folder = f"{ANIMA}/split_files/diffusion_models"
    files = {f"{folder}/{name}": MODEL for name in DIT_RELEASES.values()}
    files[f"{ANIMA}/split_files/text_encoders/qwen_3_06b_base.safetensors"] = MODEL[:-4] + b"text"
    files[f"{ANIMA}/split_files/vae/qwen_image_vae.safetensors"] = MODEL[:-4] + b"vae "
    for repository, names in TOKENIZERS.values():
        files |= {f"{repository}/{name}": f"{repository} {name}".encode() for name in names}
    return files


class Hub:
    """Answers HEAD and GET of `/REPO/resolve/REVISION/FILE`, with ranges; may cut one answer."""

    def __init__(self):
        self.files = hub_files()
        self.cut_after: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(with_body=False)

            def do_GET(self):
                self.answer(with_body=True)

            def answer(self, with_body):
                name = self.path.split("?")[0].lstrip("/").replace("/resolve/main/", "/")
                wanted = self.headers.get("Range")
                hub.requests.append((self.command, name, wanted))
                data = hub.files.get(name)
                if data is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = int(wanted.split("=")[1].split("-")[0]) if wanted else 0
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(data) - start))
                if wanted:
                    span = f"bytes {start}-{len(data) - 1}/{len(data)}"
                    self.send_header("Content-Range", span)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", "a" * 40)
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if not with_body:
                    return
                end = hub.cut_after.pop(name, len(data))
                self.wfile.write(data[start:end])
                self.close_connection = end < len(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def download(endpoint, *words, **more):
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "PYTHONUTF8": "1",
    } | more  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "anima_fast", "download", *map(str, words)],
        env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


def test_everything_is_fetched_and_the_command_has_the_real_paths(hub, tmp_path):
    done = download(hub.url, "--models_dir", tmp_path / "my models")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "my models"
    dit = folder / "split_files/diffusion_models/anima-base-v1.0.safetensors"
    assert dit.read_bytes() == MODEL
    for name, (repository, files) in TOKENIZERS.items():
        for file in files:
            assert (folder / name / file).read_text() == f"{repository} {file}"
    command = done.stdout.split("anima-fast train", 1)[1]
    assert f"--pretrained_model_name_or_path='{dit}'" in command
    assert f"--models_dir='{folder}'" in command
    # A second call asks again but fetches nothing.
    before = len(hub.requests)
    assert download(hub.url, "--models-dir", folder).returncode == 0
    assert {method for method, _, _ in hub.requests[before:]} <= {"HEAD"}


def test_a_cut_download_goes_on_where_it_stopped(hub, tmp_path):
    name = f"{ANIMA}/split_files/diffusion_models/anima-preview.safetensors"
    # The hub's library writes in pieces of 10 MB, so the cut comes inside the second one.
    hub.files[name] = large = save({"w": torch.arange(6_000_000, dtype=torch.float32)})
    hub.cut_after[name] = 15_000_000
    words = ("--models_dir", tmp_path, "--dit", "preview")
    first = download(hub.url, *words)
    # The hub's library may go on by itself; if not, the same command does.
    if first.returncode:
        assert first.returncode == 2
        assert "run the same command again" in first.stderr
        second = download(hub.url, *words)
        assert second.returncode == 0, second.stderr
    path = tmp_path / "split_files/diffusion_models/anima-preview.safetensors"
    assert path.read_bytes() == large
    ranges = [r for method, n, r in hub.requests if method == "GET" and n == name]
    resumed_at = int(ranges[-1].removeprefix("bytes=").rstrip("-"))
    assert 0 < resumed_at <= 15_000_000, ranges


def test_a_damaged_file_is_named(hub, tmp_path):
    hub.files[f"{ANIMA}/split_files/vae/qwen_image_vae.safetensors"] = b"<html>blocked</html>"
    done = download(hub.url, "--models_dir", tmp_path)
    assert done.returncode == 2
    assert "qwen_image_vae.safetensors" in done.stderr and "safetensors" in done.stderr


def test_an_unknown_file_and_an_unknown_release(hub, tmp_path):
    done = download(hub.url, "--models_dir", tmp_path, "--dit", "nothing.safetensors")
    assert done.returncode == 2
    assert "does not exist on the hub" in done.stderr
    done = download(hub.url, "--models_dir", tmp_path, "--dit", "v9")
    assert done.returncode == 2
    assert "base-v1.0" in done.stderr.replace("\n", " ")


# Without HF_HUB_OFFLINE the hub's library waits between several tries.
@pytest.mark.parametrize(
    "more", [pytest.param({}, marks=pytest.mark.slow), {"HF_HUB_OFFLINE": "1"}]
)
def test_without_a_connection(tmp_path, more):
    done = download("http://127.0.0.1:9", "--models_dir", tmp_path, "--tokenizers_only", **more)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot fetch Qwen/Qwen3-0.6B-Base/vocab.json"), done.stderr
    assert "Traceback" not in done.stderr
    assert ("HF_HUB_OFFLINE" in last) == bool(more)


def failing(module):
    """An error class as an HTTP client of that name would raise it."""
    return type("ConnectTimeout", (Exception,), {"__module__": f"{module}._exceptions"})


@pytest.mark.parametrize(
    "error", [failing("httpx"), failing("httpx2"), ConnectionError, TimeoutError]
)
def test_every_kind_of_lost_connection_is_one_clear_line(monkeypatch, tmp_path, error):
    import huggingface_hub

    def fail(*_, **__):
        raise error("timed out")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"cannot fetch a/b/c from .* run the same command again"):
        fetch("a/b", "c", tmp_path)


def test_a_defect_is_no_lost_connection(monkeypatch, tmp_path):
    import huggingface_hub

    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        fetch("a/b", "c", tmp_path)


def test_a_full_disk(monkeypatch, tmp_path):
    import errno

    import huggingface_hub

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match="no space left"):
        fetch("a/b", "c", tmp_path)


def test_a_folder_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = download(hub.url, "--models_dir", tmp_path / "file" / "models")
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot write"), done.stderr


def test_names_of_releases():
    assert dit_file("base-v1.0") == dit_file("anima-base-v1.0")
    assert dit_file("other.safetensors") == "split_files/diffusion_models/other.safetensors"
    assert dit_file("a/b.safetensors") == "a/b.safetensors"
    with pytest.raises(UserError, match="known release"):
        dit_file("base")


def test_the_printed_command_is_accepted():
    import shlex

    from anima_fast.options.command_line import read_words
    from anima_fast.options.declare import specs
    from anima_fast.options.files import resolve_train_options
    from anima_fast.options.run import TrainOptions

    folder = Path("/models")
    text = train_command(Downloaded(folder, folder / "d e", folder / "q", folder / "v"))
    words = shlex.split(text.replace("\\\n", " "))[2:]
    options, _ = resolve_train_options(read_words(words, specs(TrainOptions)))
    assert options.pretrained_model_name_or_path == str(folder / "d e")
    assert options.models_dir == str(folder)
    assert options.network_dim == 16
