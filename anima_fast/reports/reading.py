"""Reading the files of a run, which its trainer may write, replace or delete at any moment.

A file is opened, read and closed at once. On Windows it is opened so that the writer may rename or
delete it meanwhile: Python's own `open` would make the writer's `os.replace` fail.
"""

from __future__ import annotations

import json
import math
import os
import re
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

# `FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE` of the Windows API.
_SHARE_ALL = 1 | 2 | 4
# A larger run.json or dataset.json, or a log with a longer line, is not one of ours.
MOST_JSON_BYTES = 16 << 20
MOST_LINE_BYTES = 1 << 20
# This many bytes before the place reached are compared at every read.
_CHECKED = 256


def open_shared(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading without keeping its writer from replacing it. Raises `OSError`."""
    if os.name != "nt":
        return open(path, "rb")
    return open(path, "rb", opener=_share_on_windows)


def _share_on_windows(path: str, flags: int) -> int:
    # Any: these modules exist on Windows only.
    api: Any = import_module("_winapi")
    runtime: Any = import_module("msvcrt")
    access, opening, nothing = api.GENERIC_READ, api.OPEN_EXISTING, api.NULL
    handle = api.CreateFile(str(path), access, _SHARE_ALL, nothing, opening, 0, nothing)
    return runtime.open_osfhandle(handle, flags)


def read_whole(path: str | os.PathLike, most: int) -> bytes | None:
    """The bytes of a regular file of at most `most` bytes; None when there is no such file."""
    try:
        if not Path(path).is_file():
            return None
        with open_shared(path) as file:
            content = file.read(most + 1)
    except (OSError, ValueError):
        return None
    return content if len(content) <= most else None


class JsonFile:
    """A JSON object in a file that is replaced now and then.

    The last one that could be read stays while the file is half written, and goes with the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.value: dict[str, Any] | None = None
        # Counts the contents seen, so that unchanged ones are not sent again.
        self.version = 0
        self._stamp: tuple | None = None

    def refresh(self) -> dict[str, Any] | None:
        """The object that is in the file now; the file is read only when it has changed."""
        stamp = file_stamp(self.path)
        if stamp != self._stamp:
            self._stamp = stamp
            found = None if stamp is None else self._read()
            if stamp is None or found is not None:
                self.version += 1
                self.value = found
        return self.value

    def _read(self) -> dict[str, Any] | None:
        content = read_whole(self.path, MOST_JSON_BYTES)
        try:
            value = plain(json.loads(content.decode("utf-8"))) if content is not None else None
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None


class Tail:
    """The lines added to a file since the last read.

    A file that was replaced or cut is noticed by its contents: the last bytes that were read must
    still be where they were. Inode numbers are not compared, as some network file systems change
    them.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.position = 0
        self.size = 0
        self.bytes_read = 0
        # Whether the last read took all it could, so that more may be waiting.
        self.behind = False
        # Counts how often reading started over, and whether the last read did.
        self.generation = 0
        self.restarted = False
        self._before = b""
        self._skipping = False

    def read(self, most: int, start_at_end: bool = False) -> list[bytes]:
        """The complete lines that follow, without their line ends; none when the file is absent.

        At most `most` bytes are read, the rest comes with the next call. `start_at_end` begins a
        file, when reading starts over, only so many bytes before its end.
        """
        self.restarted = False
        try:
            if not self.path.is_file():
                self.size, self.behind = 0, False
                if self.position:
                    self._restart()
                return []
            with open_shared(self.path) as file:
                self.size = file.seek(0, os.SEEK_END)
                if not self._is_the_same(file):
                    self._restart()
                if start_at_end and self.position == 0 and self.size > most:
                    self._restart(self.size - most)
                file.seek(self.position)
                content = file.read(most)
        except (OSError, ValueError):
            return []
        self.bytes_read += len(content)
        self.behind = len(content) == most
        return self._take(content, most)

    def _restart(self, position: int = 0) -> None:
        """Read from `position` on; the line that it may cut is left out."""
        self.generation += 1
        self.restarted = True
        self.position = position
        self._before = b""
        self._skipping = position > 0

    def _is_the_same(self, file: BinaryIO) -> bool:
        if self.size < self.position:
            return False
        file.seek(self.position - len(self._before))
        found = file.read(len(self._before))
        self.bytes_read += len(found)
        return found == self._before

    def _take(self, content: bytes, most: int) -> list[bytes]:
        """Move behind the last complete line of `content` and return its lines."""
        end = content.rfind(b"\n") + 1
        if not end and len(content) >= min(most, MOST_LINE_BYTES):
            end, self._skipping = len(content), True
            lines = []
        else:
            lines = content[:end].split(b"\n")[:-1]
            if lines and self._skipping:
                self._skipping = False
                del lines[0]
        self.position += end
        self._before = (self._before + content[:end])[-_CHECKED:]
        return [line.removesuffix(b"\r") for line in lines]


def log_record(line: str | bytes) -> dict[str, Any] | None:
    """The record in a line of `log.jsonl`; None for a line that a crash cut off or broke."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and number(record.get("step")) is not None else None


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All records of a `log.jsonl`; none when there is no such file."""
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [record for line in text.splitlines() if (record := log_record(line)) is not None]


def picture_prompt(parameters: object) -> str:
    """The prompt in the text that viewers of pictures read: what precedes the settings."""
    if not isinstance(parameters, str):
        return ""
    return re.split(r"\n(?:Negative prompt|Steps):", f"\n{parameters}", maxsplit=1)[0].strip()


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None when there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def changed_at(path: Path) -> float | None:
    """When a file was last written, in seconds since 1970; None when there is none."""
    stamp = file_stamp(path)
    return None if stamp is None else stamp[0] / 1e9


def plain(value: Any) -> Any:
    """The value with numbers that JSON cannot hold (NaN, infinities, vast integers) as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if number(value) is not None else None
    return value


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else, a boolean included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def moment(value: Any) -> float | None:
    """Seconds since 1970 from such a number or from ISO 8601, local without an offset, or None."""
    if isinstance(value, str):
        try:
            # Before 3.11 `fromisoformat` does not know the letter Z.
            return datetime.fromisoformat(value.strip().replace("Z", "+00:00")).timestamp()
        except (ValueError, OverflowError, OSError):
            return None
    return number(value)
