"""Writing safetensors files one tensor at a time."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anima_fast import files
from anima_fast.errors import UserError
from anima_fast.files import LazyTensor, read_safetensors_header, save_safetensors, write_text

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def test_every_dtype_shape_and_layout_comes_back(tmp_path):
    base = torch.arange(24.0)
    tensors = {f"t{i}.{dtype}": base.to(dtype).view(4, 6) for i, dtype in enumerate(DTYPES)}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "turned": base.view(4, 6).T,
        "shared": base[3:7],
        "odd": torch.arange(3, dtype=torch.uint8),
        "ünï": torch.ones(1),
    }
    save_safetensors(tensors, tmp_path / "a.safetensors", {"note": "größe"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        plain = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*plain), name
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"note": "größe"}
    entries = read_safetensors_header(tmp_path / "a.safetensors")
    sizes = {n: tensors[n].dtype.itemsize for n in tensors}
    assert all(entries[n]["data_offsets"][0] % sizes[n] == 0 for n in tensors)


def test_lazy_tensors_are_made_one_after_the_other(tmp_path):
    alive = []

    def read(index):
        alive.append(index)
        return torch.full((2, index), float(index))

    lazy = {str(i): LazyTensor((2, i), torch.float32, lambda i=i: read(i)) for i in range(1, 4)}
    save_safetensors(lazy, tmp_path / "a.safetensors")
    assert alive == [1, 2, 3]
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[str(i)], torch.full((2, i), float(i))) for i in range(1, 4))


def test_a_failing_tensor_leaves_the_file_before(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors({"a": torch.zeros(2)}, path)

    def broken():
        raise RuntimeError("gone")

    for bad in (broken, lambda: torch.zeros(3), lambda: torch.zeros(2).half()):
        with pytest.raises((RuntimeError, ValueError)):
            save_safetensors({"a": torch.ones(2), "b": LazyTensor((2,), torch.float32, bad)}, path)
        assert torch.equal(load_file(path)["a"], torch.zeros(2))
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"a is torch\.complex64"):
        save_safetensors({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_order_is_kept_within_an_item_size(tmp_path):
    tensors = {
        "b": torch.ones(3, dtype=torch.uint8),
        "z": torch.ones(2),
        "a": torch.ones(3),
        "c": torch.ones(5, dtype=torch.uint8),
    }
    for keep, expected in ((True, ["z", "a", "b", "c"]), (False, ["a", "z", "b", "c"])):
        save_safetensors(tensors, tmp_path / "a.safetensors", keep_order=keep)
        entries = read_safetensors_header(tmp_path / "a.safetensors")
        assert sorted(entries, key=lambda n: entries[n]["data_offsets"][0]) == expected
        assert load_file(tmp_path / "a.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize(("busy", "winerror"), [(3, 32), (10**6, 32), (1, None)])
def test_a_file_that_is_open_elsewhere_is_tried_again(tmp_path, monkeypatch, busy, winerror):
    path, calls, rename = tmp_path / "log.txt", [], os.replace
    path.write_text("old")

    def refuse(source, target):
        calls.append(target)
        if len(calls) > busy:
            return rename(source, target)
        error = PermissionError(13, "in use")
        error.winerror = winerror
        raise error

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    if busy == 3:
        write_text(path, "new")
        assert (path.read_text(), len(calls)) == ("new", 4)
        return
    with pytest.raises(UserError, match="close that program" if winerror else "permission denied"):
        write_text(path, "new")
    assert len(calls) == (21 if winerror else 1)
    assert [file.name for file in tmp_path.iterdir()] == ["log.txt"]
    assert path.read_text() == "old"
