"""Reading files that another process may write, replace or delete at any moment.

A file is opened, read and closed at once. On Windows it is opened so that the writer may rename or
delete it meanwhile: Python's own `open` would make the writer's `os.replace` fail.
"""

from __future__ import annotations

import json
import math
import os
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

# `FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE` of the Windows API.
_SHARE_ALL = 1 | 2 | 4
# A larger run.json or dataset.json is no file of ours.
MOST_JSON_BYTES = 16 << 20


def open_shared(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading without keeping its writer from replacing it. Raises `OSError`."""
    if os.name != "nt":
        return open(path, "rb")
    return open(path, "rb", opener=_share_on_windows)


def _share_on_windows(path: str, flags: int) -> int:
    import _winapi
    import msvcrt

    handle = _winapi.CreateFile(
        str(path),
        _winapi.GENERIC_READ,
        _SHARE_ALL,
        _winapi.NULL,
        _winapi.OPEN_EXISTING,
        0,
        _winapi.NULL,
    )
    return msvcrt.open_osfhandle(handle, flags)


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

    The last object that could be read stays when the file is half written, and goes when the file
    goes.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.value: dict[str, Any] | None = None
        # Counts the contents seen, so that an unchanged one need not be sent again.
        self.version = 0
        self._stamp: tuple | None = None

    def refresh(self) -> dict[str, Any] | None:
        """The object as it stands in the file now; the file is read only when it has changed."""
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
    """The value as a finite float, None when it is none (a boolean is none)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def moment(value: Any) -> float | None:
    """A time written as seconds since 1970 or in ISO 8601, as seconds; None when it is neither.

    A text without an offset is local time.
    """
    if isinstance(value, str):
        try:
            # Before 3.11 `fromisoformat` does not know the letter Z.
            return datetime.fromisoformat(value.strip().replace("Z", "+00:00")).timestamp()
        except (ValueError, OverflowError, OSError):
            return None
    return number(value)
