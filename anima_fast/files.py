"""Atomic writes, content hashes and safetensors files.

Every file of a run goes through here: it is written under a temporary name in the same folder,
flushed to the disk and renamed, so that a reader (or the next run after a power cut) sees the old
file or the new one, never half a file. Disk errors become one readable `UserError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import operator
import os
import re
import shutil
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from anima_fast.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    import torch

# Windows' error codes for a rename that meets an open file.
ACCESS_DENIED, SHARING_VIOLATION = 5, 32


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """A UTF-8 text file without its byte-order mark; `UserError` naming the file otherwise."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist: check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {path}: {reason}") from None


def parse_config(text: str, where: object, kind: str = "TOML") -> Any:
    """TOML or JSON text as Python values; `UserError` that begins with `where` otherwise."""
    parse, wrong = {
        "TOML": (tomllib.loads, "is not valid TOML"),
        "JSON": (json.loads, "is not valid JSON"),
    }[kind]
    try:
        return parse(text)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply for a configuration") from None
    except ValueError as error:
        hint = "; write Windows paths in 'single quotes' or with /" if "\\" in text else ""
        raise UserError(f"{where} {wrong}: {error}{hint}") from None


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that appears at `path` only when the block ends without an error."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Where a file or folder is made before it is moved to `path`; see `remove_leftovers`."""
    return path.with_name(f".{path.name[:80]}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Fill a new folder that replaces `path` only when the block ends without an error.

    A folder that is already at `path` is moved aside first and deleted last, so a crash between
    the two renames leaves it next to the new one as `.NAME.old`.
    """
    path = Path(path)
    temporary = _temporary(path)
    old = path.with_name(f".{path.name}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            replace(path, old)
        replace(temporary, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder; what the system refuses stays.

    A folder is renamed first, so that none keeps its name while it is half deleted.
    """
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            return
        aside = _temporary(path)
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def replace(source: Path, target: Path) -> None:
    """`os.replace` that waits up to two seconds for a program that has one of the two open.

    Windows refuses to rename such a file; a virus scanner or a viewer lets go of it soon.
    """
    for _ in range(20):
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in (ACCESS_DENIED, SHARING_VIOLATION):
                raise
            time.sleep(0.1)
    return os.replace(source, target)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk (a no-op where the system has no such call)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: Path) -> UserError:
    """The `UserError` for a failed write to `path`."""
    # Windows has no quota of this name.
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return UserError(
            f"no space left while writing {path}: free some disk space and run again; "
            "nothing was left half-written"
        )
    if getattr(error, "winerror", None) == SHARING_VIOLATION:
        why = "another program has it open; close that program"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        why = "permission denied; choose a folder that you may write"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        why = "a part of it is a file; choose another folder"
    else:
        why = f"{error.strerror or error}; choose another folder"
    return UserError(f"cannot write {path}: {why}")


def remove_leftovers(path: str | os.PathLike) -> None:
    """Delete what killed runs left half-written under the names of `atomic_write` and its like."""
    path = Path(path)
    pattern = re.compile(rf"\.{re.escape(path.name[:80])}\.[0-9a-f]{{8}}\.tmp")
    # A folder that is missing or cannot be read is for whoever writes there to report.
    with contextlib.suppress(OSError):
        for found in list(path.parent.iterdir()):
            if pattern.fullmatch(found.name):
                shutil.rmtree(found) if found.is_dir() else found.unlink()


def check_folder(path: str | os.PathLike) -> None:
    """Prove that a folder can be written, creating it if needed, before hours are spent."""
    path = Path(path)
    probe = path / f".write_test.{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"ok")
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a value as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written, so that a large file is never all in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def save_safetensors(
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    path: str | os.PathLike,
    metadata: Mapping[str, str] | None = None,
    *,
    keep_order: bool = False,
) -> None:
    """Write tensors (any device) and string metadata as one safetensors file, atomically.

    One tensor at a time is copied to host memory. Tensors may share memory; each is written fully.
    With `keep_order` tensors of one item size stay in the order given, else they go by name.
    Raises `UserError` when the disk refuses, and whatever a lazy tensor's `read` raises; an
    existing file then stays as it was.
    """
    given = list(tensors) if keep_order else sorted(tensors)
    # The largest items first, as safetensors does: every tensor is aligned to its item size.
    names = sorted(given, key=lambda name: -tensors[name].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        shape, dtype = list(tensors[name].shape), tensors[name].dtype
        start, end = end, end + math.prod(shape) * dtype.itemsize
        code = dtype_code(dtype, name)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    header += b" " * (-len(header) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in names:
            file.write(_tensor_bytes(tensors[name], name))


def dtype_code(dtype: torch.dtype, name: str) -> str:
    """safetensors' name of a dtype: float32 is F32, bfloat16 BF16, float8_e4m3fn F8_E4M3."""
    match = re.fullmatch(r"torch\.([a-z]+?)(\d*(?:_e\dm\d)?)(?:fn)?", str(dtype))
    kinds = {"float": "F", "bfloat": "BF", "int": "I", "uint": "U", "bool": "BOOL"}
    if match is None or match[1] not in kinds:
        raise TypeError(f"{name} is {dtype}, which a safetensors file cannot hold")
    return kinds[match[1]] + match[2].upper()


def _tensor_bytes(tensor: torch.Tensor | LazyTensor, name: str) -> memoryview:
    import torch

    found = tensor.read() if isinstance(tensor, LazyTensor) else tensor
    if found.dtype != tensor.dtype or tuple(found.shape) != tuple(tensor.shape):
        raise ValueError(
            f"{name} is {found.dtype} {list(found.shape)}, expected {tensor.dtype} "
            f"{list(tensor.shape)}"
        )
    plain = found.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(plain.view(torch.uint8).numpy())


def read_safetensors_header(path: str | os.PathLike) -> dict:
    """The JSON header of a safetensors file (tensor entries and `__metadata__`), without its data.

    Raises `UserError` when the file is missing, cut off or not a safetensors file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise UserError(
                    f"{path} is not a safetensors file, or is cut off: copy or download it again"
                )
            header = json.loads(file.read(length))
        tensors = (entry for name, entry in header.items() if name != "__metadata__")
        end = max((operator.index(entry["data_offsets"][1]) for entry in tensors), default=0)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} has no readable safetensors header: copy or download it again"
        ) from error
    if size < 8 + length + end:
        raise UserError(
            f"{path} is cut off: {size} bytes, but its header announces {8 + length + end}; "
            "copy or download it again"
        )
    return header


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def cached_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a large file, remembered by (path, size, mtime) in the user's cache folder.

    A base model of 4 GB takes seconds to hash; it changes almost never.
    """
    path = Path(path).resolve()
    stat = path.stat()
    index = cache_home() / "hashes.json"
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    entry = known.get(str(path))
    if entry and entry[:2] == [stat.st_size, stat.st_mtime_ns]:
        return entry[2]
    digest = sha256_file(path)
    known[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
    # An unwritable home only costs the next run the same seconds.
    with contextlib.suppress(UserError):
        write_json(index, known)
    return digest


def cache_home() -> Path:
    """The program's own cache folder: `ANIMA_FAST_HOME`, else `~/.cache/anima_fast`."""
    return Path(os.environ.get("ANIMA_FAST_HOME") or Path.home() / ".cache" / "anima_fast")
