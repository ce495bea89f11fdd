"""Cache files and their keys, folders and hash index."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from anima_fast.data import cache, cache_folders
from anima_fast.data.cache import CacheError, LatentEntry, Stored, TextEntry
from anima_fast.data.cache_folders import CacheFolders, file_hashes
from anima_fast.errors import UserError

LATENTS = LatentEntry(torch.zeros(16, 4, 8))


def item(**more):
    subset = {"resize_interpolation": None, "flip_aug": False, "alpha_mask": False}
    subset |= {name: more.pop(name) for name in list(more) if name in subset}
    values = {"bucket": (64, 64), "resized": (70, 64), "subset": SimpleNamespace(**subset),
              "is_turned": False}  # fmt: skip
    return SimpleNamespace(**{**values, **more})


def key(made=None, image="i", vae="v", dtype=torch.float32):
    return cache.latent_key(made or item(), image_sha256=image, vae=vae, dtype=dtype)


def test_every_part_of_the_key_counts():
    keys = [
        key(),
        key(item(is_turned=True)),
        key(image="j"),
        key(vae="w"),
        key(dtype=torch.bfloat16),
        key(item(bucket=(64, 48))),
        key(item(resized=(71, 64))),
        key(item(flip_aug=True)),
        key(item(alpha_mask=True)),
        key(item(resize_interpolation="lanczos")),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] and len(keys[0]) == 64


def test_format_version_is_part_of_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(cache, "CACHE_VERSION", cache.CACHE_VERSION + 1)
    assert key() != before


def test_latents_round_trip(tmp_path):
    path = tmp_path / "a.safetensors"
    entry = LatentEntry(
        torch.randn(16, 4, 8), torch.randn(16, 4, 8), torch.randint(0, 255, (32, 64)).byte()
    )
    cache.write(path, entry, "k", {"image": "a.png"})
    cache.check_latents(path, "k", item(bucket=(64, 32), flip_aug=True, alpha_mask=True))
    back = vars(cache.read_latents(path))
    assert set(back) == {"latents", "latents_flipped", "alpha_mask"}
    for name, tensor in vars(entry).items():
        assert torch.equal(back[name], tensor)


@pytest.mark.parametrize(
    ("key", "wanted", "reason"),
    [
        ("other", {}, "other contents"),
        ("k", {"bucket": (64, 64)}, "shape"),
        ("k", {"flip_aug": True}, "latents_flipped"),
        ("k", {"alpha_mask": True}, "alpha_mask"),
    ],
)
def test_check_refuses_other_contents(tmp_path, key, wanted, reason):
    path = tmp_path / "a.safetensors"
    cache.write(path, LATENTS, "k", {})
    with pytest.raises(CacheError, match=reason):
        cache.check_latents(path, key, item(**{"bucket": (64, 32), **wanted}))


def test_text_round_trip_in_both_forms(tmp_path):
    path = tmp_path / "a.safetensors"
    cache.write(path, TextEntry(context=torch.ones(3, 4, dtype=torch.bfloat16)), "k", {})
    cache.check_text(path, "k", "context")
    assert cache.read_text(path).context.dtype == torch.bfloat16
    with pytest.raises(CacheError, match="source_states"):
        cache.check_text(path, "k", "states")
    states = TextEntry(source_states=torch.zeros(0, 4), t5_ids=torch.tensor([1]))
    cache.write(path, states, "k", {})
    cache.check_text(path, "k", "states")
    back = cache.read_text(path)
    assert back.source_states.shape == (0, 4) and back.t5_ids.tolist() == [1]


def test_values_that_are_not_finite_are_refused_when_read(tmp_path):
    path = tmp_path / "a.safetensors"
    cache.write(path, LatentEntry(torch.full((16, 4, 8), torch.nan)), "k", {})
    with pytest.raises(CacheError, match="not finite"):
        cache.read_latents(path)
    stored = Stored(path, cache.read_latents)
    with pytest.raises(UserError, match="delete it and run again"):
        stored.get()


def test_file_names():
    name = cache_folders.latent_name("日本" * 100, "0123456789abcdef" * 4)
    assert name.endswith("-0123456789abcdef.latents.safetensors") and len(name.encode()) < 200
    assert cache_folders.latent_name("pic", "f" * 64).startswith("pic-ffff")
    assert cache_folders.printable("a\udcffb") == "a_b"


def test_hashes_are_read_once(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(path.name.encode())
    read = []
    original = cache_folders.files.sha256_file
    monkeypatch.setattr(cache_folders.files, "sha256_file", lambda p: read.append(p) or original(p))

    def hashes():
        read.clear()
        return file_hashes(CacheFolders(None, None, [], print), [*paths, paths[0]], 2)

    first = hashes()
    assert len(read) == 2
    assert hashes() == first and read == []
    paths[1].write_bytes(b"changed")
    assert hashes()[paths[1]] != first[paths[1]] and read == [paths[1]]
    paths[0].unlink()
    paths.pop(0)
    paths[0].write_bytes(b"again")
    hashes()
    index = tmp_path / ".anima_cache" / "index.json"
    assert [Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))] == ["b"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3, "y": [1, 2, 3]}'])
def test_damaged_index_is_ignored(tmp_path, text):
    (tmp_path / ".anima_cache").mkdir()
    (tmp_path / ".anima_cache" / "index.json").write_text(text)
    (tmp_path / "a").write_bytes(b"a")
    found = file_hashes(CacheFolders(None, None, [], print), [tmp_path / "a"], 1)
    assert len(found[tmp_path / "a"]) == 64


def test_missing_image_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png"):
        file_hashes(CacheFolders(None, None, [], print), [tmp_path / "gone.png"], 1)


def test_no_folder_to_write_to_is_a_user_error(tmp_path):
    (tmp_path / ".anima_cache").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        CacheFolders(None, None, [], print).place("x", tmp_path / "a.png")


def test_identity_of_a_model_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"w")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("x")
    before = cache.model_identity(tmp_path)
    (tmp_path / "README.md").write_text("y")
    assert cache.model_identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert cache.model_identity(tmp_path) != before
    with pytest.raises(UserError, match="missing"):
        cache.model_identity(tmp_path / "missing")
